"""One style for every figure of the book. Functions take tables and return Axes; they compute nothing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

WIDTH = 7.0
"""Width of a full-width figure in inches: the text column of the book."""


class Method(NamedTuple):
    """How one method looks in every chapter."""

    colour: str
    marker: str | tuple[int, int, int]  # a tuple: points, 1 for a star, degrees
    label: str


# After Okabe and Ito's colours, darkened to a contrast of 3 to 1 on white. Every method has a marker of its
# own as well, so that nothing is told by colour alone.
METHODS: dict[str, Method] = {
    "p_true": Method("#009E73", "^", "P(True)"),
    "semantic_entropy": Method("#B87700", "v", "semantic entropy"),
    "naive_entropy": Method("#8C5A2B", "P", "naive entropy"),
    "aleatoric": Method("#D55E00", "s", "aleatoric"),
    "epistemic": Method("#0072B2", "o", "epistemic"),
    "combined": Method("#7B3294", "D", "fitted pair"),
    "combined_curved": Method("#9C4F96", "$c$", "fitted pair, curved"),
    "likelihood": Method("#555555", "X", "negative log-likelihood"),
    "likelihood_per_token": Method("#6B6B47", (3, 2, 0), "negative log-likelihood per token"),
    "log_gradient": Method("#3B93C9", "<", "log G"),
    "mcmc": Method("#000000", "*", "MCMC"),
    "laplace": Method("#CC79A7", "h", "Laplace"),
    "taylor": Method("#3B7D3B", ">", "Taylor"),
    "ensemble": Method("#222222", "d", "ensemble"),
    "length": Method("#8A8A8A", "p", "answer length"),
    "token_entropy": Method("#3E7A7A", "$e$", "token entropy"),
    "embedding_gradient": Method("#7A5C8E", "$g$", "embedding gradient"),
    "last_layers": Method("#2F6C9F", "$5$", "log G, last five blocks"),
    # 05_cost
    "forward": Method("#707070", "8", "forward pass"),
    "forward_answer": Method("#838383", (8, 1, 0), "forward, answer's logits"),
    "activation_gradient": Method("#4F7CAC", (4, 1, 0), "activation gradient alone"),
    "ghost": Method("#005B96", "H", "ghost (isouq)"),
    "token_mean": Method("#3F51B5", (6, 1, 0), "ghost, token mean"),
    "autograd": Method("#A63A3A", "x", "autograd, one by one"),
    "backward": Method("#C2506A", "+", "plain backward"),
    "vmap": Method("#5F7D00", "1", "torch.func vmap(grad)"),
    "opacus": Method("#A8409A", "2", "Opacus"),
}


CLASSES = (("#0072B2", "o"), ("#B84700", "^"), ("#2E8B6F", "s"))  # colour and marker of each class or problem
GUIDE: dict[str, Any] = {"color": "#777777", "linestyle": "--", "linewidth": 1, "zorder": 0}  # a line to compare with


def use_style() -> None:
    """Set the book's style: SVG output without dates, the same white page in light and dark mode.

    Call it once at the top of a notebook. Outside IPython it only sets matplotlib's parameters.
    """
    import seaborn as sns  # here alone, so that colours and axes need matplotlib only

    sns.set_theme(context="notebook", style="ticks", font_scale=0.85)
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, 0.5 * WIDTH),
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.prop_cycle": plt.cycler(color=[method.colour for method in METHODS.values()]),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "font.family": ["DejaVu Sans"],  # matplotlib ships it: no machine's fonts decide the layout
            "legend.frameon": False,
            "lines.markersize": 6,
            "svg.fonttype": "path",  # a page needs no font of ours
            "svg.hashsalt": "isouq",  # the same figure gives the same bytes
        }
    )
    _show_as_svg()


def _show_as_svg() -> None:
    from IPython.core.getipython import get_ipython

    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})


def panels(n_columns: int, n_rows: int = 1, *, aspect: float = 0.8, **kwargs) -> tuple[Figure, np.ndarray]:
    """Return a figure as wide as the text column and its Axes (n_rows, n_columns).

    Each panel is `aspect` times as high as it is wide.
    """
    size = (WIDTH, n_rows * aspect * WIDTH / n_columns)
    return plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained", **kwargs)


def intervals(
    table: pd.DataFrame,
    ax: Axes | None = None,
    *,
    xlabel: str,
    reference: float | None = None,
    published: str = "the paper",
    logarithmic: bool = False,
) -> Axes:
    """Draw one row per method: its value as a marker, its interval as a line, the published value hollow beside it.

    `table` has the columns method (a key of METHODS), value, low and high; label (a row's name, by default the
    method's), paper and ceiling (the noise ceiling, a bar) are optional. Rows are drawn from top to bottom. An absent
    value (NaN) leaves its row empty, so that panels stay aligned. `reference` draws a dashed line, such as at chance.

    Raises:
        KeyError: a column is missing, or a method is not in METHODS.
    """
    ax = plt.gca() if ax is None else ax
    if reference is not None:
        ax.axvline(reference, **GUIDE)
    rows = np.arange(len(table))
    for row, entry in enumerate(table.to_dict("records")):
        colour, marker, _ = METHODS[entry["method"]]
        ax.plot([entry["low"], entry["high"]], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
        ax.plot(entry["value"], row, marker=marker, linestyle="none", color=colour, markersize=7)
    if "ceiling" in table.columns:
        ax.plot(table["ceiling"], rows, "|", color="black", markersize=11, label="noise ceiling")
    if "paper" in table.columns:
        ax.plot(table["paper"], rows + 0.3, "o", mfc="white", mec="#444444", markersize=5, label=published)
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, handletextpad=0.1)
    ax.set_yticks(rows, table.get("label", table["method"].map(lambda name: METHODS[name].label)))
    ax.set(ylim=(len(table) - 0.4, -0.6), xlabel=xlabel)
    if logarithmic:
        ax.set_xscale("log")
        _round_numbers(ax.xaxis)
    return ax


def interval_grid(
    tables: Mapping[tuple[str, str], pd.DataFrame], *, xlabel: str, reference: float, absent: str, aspect: float = 1.0
) -> Figure:
    """Draw panels of `intervals` on one axis from 0 to 1, keyed by (label of the row, title of the column).

    All tables name the same methods in the same order. A panel without any value shows the text `absent`.
    """
    rows, columns = (list(dict.fromkeys(key[place] for key in tables)) for place in (0, 1))
    figure, axes = panels(len(columns), len(rows), aspect=aspect, sharex=True, sharey=True)
    for (row, column), table in tables.items():
        i, j = rows.index(row), columns.index(column)
        ax = intervals(table, axes[i, j], xlabel=xlabel, reference=reference)
        if table["value"].isna().all():
            box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
            ax.text(0.5, 0.75 * (len(table) - 1), absent, ha="center", va="center", size="small", bbox=box)
        ax.set(xlim=(0, 1), title=column if i == 0 else "", ylabel=row)
        ax.label_outer()
        if (legend := ax.get_legend()) is not None:
            legend.remove()
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        axes[i, j].set_visible((rows[i], columns[j]) in tables)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower right")
    return figure


def right_and_wrong(table: pd.DataFrame, ax: Axes, *, x: str, y: str, xlabel: str, ylabel: str) -> Axes:
    """Draw one point per answer, right ones as open circles and wrong ones as crosses; columns x, y and wrong."""
    wrong = table["wrong"].astype(bool)
    right, failed = table[~wrong], table[wrong]
    ax.scatter(failed[x], failed[y], s=20, marker="x", color="#D55E00", linewidths=1, label="wrong")
    ax.scatter(right[x], right[y], s=20, marker="o", facecolors="none", edgecolors="#0072B2", label="right")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def plane_map(problem, values: np.ndarray, ax: Axes, **look: Any) -> QuadMesh:
    """Draw `values` (point,) over the grid of a synthetic problem with two inputs; `look` goes to pcolormesh."""
    x, y, z = (array.reshape(problem.shape) for array in (*problem.grid.T, values))
    ax.set(xlim=problem.limits, ylim=problem.limits, xticks=[], yticks=[], aspect="equal")
    return ax.pcolormesh(x, y, z, shading="gouraud", rasterized=True, **look)


def _examples(problem, ax: Axes, **look: Any) -> None:
    """Mark a problem's examples with a marker, and unless `look` says otherwise a colour, for each class."""
    for label, (colour, marker) in zip(np.unique(problem.targets), CLASSES, strict=False):
        ax.scatter(*problem.inputs[problem.targets == label].T, marker=marker, **({"color": colour} | look))


def maps(problem, values: Mapping[str, np.ndarray]) -> Figure:
    """Draw a row of maps over the input plane, titled by the keys of `values`, each array (point,)."""
    figure, axes = panels(len(values), aspect=0.85)
    for ax, (title, array) in zip(axes[0], values.items(), strict=True):
        bar = figure.colorbar(plane_map(problem, array, ax, cmap="viridis"), ax=ax, shrink=0.75, pad=0.02)
        bar.ax.tick_params(labelsize="x-small")
        _examples(problem, ax, s=7, color="white", edgecolors="black", linewidths=0.5)
        ax.set_title(title)
    return figure


def stepwise(chain: Mapping[str, np.ndarray]) -> Figure:
    """Draw each array of `chain` (point,) against the one before it, logarithmic, with a line of slope one.

    The line passes through the geometric means, since some quantities are known only up to a factor.
    """
    names, arrays = list(chain), list(chain.values())
    figure, axes = panels(len(chain) - 1, aspect=1.0)
    for ax, x, y, xlabel, ylabel in zip(axes[0], arrays, arrays[1:], names, names[1:], strict=False):
        ax.loglog(x, y, ".", color=METHODS["epistemic"].colour, markersize=4, alpha=0.6)
        factor = np.exp(np.mean(np.log(y / x)))
        ends = np.array([x.min(), x.max()])
        ax.plot(ends, factor * ends, "--", color="black", linewidth=1)
        ax.set(xlabel=f"{xlabel} (units of $p^2$)", ylabel=ylabel)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_formatter(NullFormatter())
    return figure


def data_sets(problems: Mapping[str, Any]) -> Figure:
    """Draw the data of every synthetic problem, titled by the keys of `problems`, four panels a row."""
    figure, axes = panels(4, -(-len(problems) // 4), aspect=1.0)
    for ax, (title, problem) in zip(axes.flat, problems.items(), strict=False):
        ax.set_title(title, fontsize="small")
        if problem.inputs.shape[1] == 1:
            ax.plot(problem.inputs[:, 0], problem.targets, ".", color="#444444", markersize=4)
            ax.set(xlim=problem.limits)
            continue
        _examples(problem, ax, s=9, linewidths=0)
        ax.set(xlim=problem.limits, ylim=problem.limits, aspect="equal")
    return figure


def spread_curves(problem, curves: Mapping[str, np.ndarray], ax: Axes) -> Axes:
    """Draw standard deviations over a one-dimensional input, each divided by its largest; ticks mark the data.

    `curves`: key of METHODS → variance (point,).
    """
    for name, variance in curves.items():
        colour, marker, label = METHODS[name]
        height = np.sqrt(variance / variance.max())
        ax.plot(problem.grid[:, 0], height, color=colour, marker=marker, markevery=12, markersize=4, label=label)
    ax.plot(problem.inputs[:, 0], np.full(len(problem.inputs), -0.03), "|", color="#444444", markersize=6)
    ax.set(xlabel="input $x$", ylabel="standard deviation\n(largest = 1)", ylim=(-0.06, 1.05))
    return ax


def accuracy_by_share(curves: Mapping[str, np.ndarray], ax: Axes, *, right: float) -> Axes:
    """Draw the share of right answers among those given against the share given, the least certain left out first.

    `curves`: key of METHODS or another name → the share of right ones among the k most certain, (k,). `right`: the
    share among all, which random order keeps (dashed). Dotted: a score that knows which answers are wrong.
    """
    for name, curve in curves.items():
        colour, marker, label = METHODS.get(name, Method("#000000", f"${name[:1]}$", name))
        share, every = np.arange(1, len(curve) + 1) / len(curve), max(1, len(curve) // 5)
        ax.plot(share, curve, color=colour, marker=marker, markevery=every, markersize=4, linewidth=1, label=label)
    share = np.linspace(0.01, 1, 100)
    ax.axhline(right, **GUIDE)
    ax.plot(share, np.minimum(1, right / share), color="#777777", linestyle=":", linewidth=1)
    ax.set(xlabel="share answered", ylabel="right, of those", xlim=(0, 1.02), ylim=(-0.02, 1.04))
    return ax


def against(table: pd.DataFrame, ax: Axes, *, x: str, xlabel: str, ylabel: str) -> Axes:
    """Draw a line per method on logarithmic axes, with bars to the extremes; columns method, `x`, value, low, high."""
    for name, group in table.groupby("method", sort=False):
        colour, marker, label = METHODS[str(name)]
        ax.vlines(group[x], group["low"], group["high"], color=colour, linewidth=1)
        ax.plot(group[x], group["value"], color=colour, marker=marker, label=label, linewidth=1.3)
    ticks = sorted(table[x].unique())
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(ticks, ticks)
    ax.set_xticks([], minor=True)
    _round_numbers(ax.yaxis)
    return ax


def worth(table: pd.DataFrame, ax: Axes, *, xlabel: str, ylabel: str) -> Axes:
    """Draw a point per method and a bar to its interval, over a logarithmic cost: method, seconds, value, low, high."""
    for row in table.to_dict("records"):
        colour, marker, label = METHODS[str(row["method"])]
        ax.vlines(row["seconds"], row["low"], row["high"], color=colour, linewidth=0.7)
        ax.plot(row["seconds"], row["value"], color=colour, marker=marker, linestyle="none", label=label)
    ax.axhline(0.5, **GUIDE)
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    low, high = ax.get_xlim()
    grow = max(1.0, (10 * low / high) ** 0.5)  # to a decade, which has round numbers
    ax.set_xlim(low / grow, high * grow)
    _round_numbers(ax.xaxis)
    return ax


def _round_numbers(axis: Axis) -> None:
    """Put the ticks of a logarithmic axis at 1, 2 and 5 times the powers of ten, written plainly."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def bars(values: pd.Series, ax: Axes, *, hatched: Sequence[str] = (), xlabel: str) -> Axes:
    """Draw a horizontal bar for each entry with its number beside it, the first on top, hatched if in `hatched`."""
    names = [METHODS[name].label if name in METHODS else name for name in values.index]
    drawn = ax.barh(range(len(values)), values, color="#8FB3CC", edgecolor="#1F3B4D")
    for bar, name in zip(drawn, values.index, strict=True):
        bar.set(hatch="////" if name in hatched else None, facecolor="white" if name in hatched else "#8FB3CC")
    ax.bar_label(drawn, fmt="{:.2g}", padding=3, fontsize="small")
    ax.set_yticks(range(len(values)), names)
    ax.set(xlabel=xlabel, ylim=(len(values) - 0.4, -0.6))
    ax.margins(x=0.15)
    return ax
