"""The figures of the chapter on posteriors. Functions take tables and arrays and return figures or Axes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from isouq.studies.plotting import GUIDE, panels, spread_curves

Array = NDArray[np.float64]
COLOURS = colormaps["RdBu"]  # of ρ from −1 to 1
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#7B3294")
TITLES = {"gn": "gradient norm ‖g‖²", "la": "Laplace", "aleatoric": "aleatoric p(1 − p)"}
WORDS = {"fan_in": "prior scaled", "fixed": "prior N(0, 1)", "relu": "ReLU"}
DESIGNS = {"few or gap": ("few", "gap"), "many or no gap": ("many", "no_gap")}
LOOKS = {"trained": "o", "mode": "s", "map": "X", "draws": "d"}
NAMES = {"trained": "trained", "mode": "local modes", "map": "MAP", "draws": "mean over draws"}


def atlas(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Draw the atlas: a row per problem, a column per setting, the paper's number last, a panel per method.

    table: problem, activation, width, prior, design, method, value, paper, headline (framed). Colour and number are ρ;
    × marks a setting without one. A problem without a hidden layer has one value for all activations and widths.
    titles: problem → its label, in the order of the rows.
    """
    hidden = table[table["activation"] != "linear"]
    inner = list(
        itertools.product(sorted(hidden["activation"].unique(), reverse=True), sorted(hidden["width"].unique()))
    )
    priors = [name for name in WORDS if name in set(table["prior"])]
    designs = [name for name, levels in DESIGNS.items() if table["design"].isin(levels).any()]
    outer = list(itertools.product(priors, designs))
    rows, n = [name for name in titles if name in set(table["problem"])], len(outer) * len(inner)
    methods = [name for name in TITLES if name in set(table["method"])]
    figure, axes = panels(1, len(methods), aspect=0.045 * (len(rows) + 3))
    for ax, method in zip(axes[:, 0], methods, strict=True):
        _grid_of(ax, n, rows, [titles[name] for name in rows], TITLES[method])
        for entry in table[table["method"] == method].to_dict("records"):
            design = next(name for name, levels in DESIGNS.items() if entry["design"] in levels)
            first, linear = outer.index((entry["prior"], design)) * len(inner), entry["activation"] == "linear"
            place = 0 if linear else inner.index((entry["activation"], entry["width"]))
            corner = float(first + place), float(rows.index(entry["problem"]))
            _cell(ax, corner, len(inner) if linear else 1, entry["value"], framed=entry["headline"])
        for problem, paper in table[table["method"] == method].groupby("problem")["paper"].first().items():
            _cell(ax, (n + 0.3, float(rows.index(str(problem)))), 1, paper, framed=False, absent="–")
    labels = [f"{WORDS.get(activation, activation)} {width}" for activation, width in inner] * len(outer)
    axes[-1, 0].set_xticks([*(np.arange(n) + 0.5), n + 0.8], [*labels, "the paper"], rotation=90, fontsize="xx-small")
    for place, (prior, design) in enumerate(outer):
        middle = (place + 0.5) * len(inner)
        axes[0, 0].text(middle, -0.15, f"{WORDS[prior]},\n{design}", ha="center", va="bottom", fontsize="xx-small")
    return figure


def _grid_of(ax: Axes, n: int, rows: list[str], labels: list[str], title: str) -> None:
    ax.set(xlim=(0, n + 1.3), ylim=(len(rows), 0), xticks=[])
    ax.set_yticks(np.arange(len(rows)) + 0.5, labels, fontsize="x-small")
    ax.set_title(title, fontsize="small", pad=26)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _cell(ax: Axes, corner: tuple[float, float], width: int, value: float, *, framed: bool, absent: str = "×") -> None:
    known = bool(np.isfinite(value))
    edge, linewidth = ("black", 1.6) if framed else ("white", 0.6)
    colour = COLOURS(0.5 + 0.5 * value) if known else "white"
    ax.add_patch(Rectangle(corner, width, 1, facecolor=colour, edgecolor=edge, linewidth=linewidth, zorder=1 + framed))
    text = f"{value:.2f}".replace("0.", ".").replace("-", "−") if known else absent
    ink = "white" if known and abs(value) > 0.7 else "black"
    ax.text(corner[0] + width / 2, corner[1] + 0.5, text, ha="center", va="center", fontsize=5.5, color=ink, zorder=3)


def points(table: pd.DataFrame, titles: Mapping[str, str], ax: Axes) -> Axes:
    """Draw a row per problem: ρ of every setting as a small mark and the median as a large one, by kind of θ*.

    table: problem, point (a key of NAMES) and rho; titles: problem → its label, in the order of the rows.
    """
    rows = [name for name in titles if name in set(table["problem"])]
    for place, (point, marker) in enumerate(LOOKS.items()):
        colour, shift = PALETTE[place], 0.2 * (place - 1.5)
        for row, problem in enumerate(rows):
            rho = table.loc[(table["problem"] == problem) & (table["point"] == point), "rho"].dropna()
            ax.plot(rho, np.full(len(rho), row + shift), marker, color=colour, markersize=2.5, alpha=0.4)
            label = NAMES[point] if row == 0 else None
            ax.plot(rho.median(), row + shift, marker, color=colour, markersize=7, mec="black", mew=0.6, label=label)
    ax.axvline(0, **GUIDE)
    ax.set_yticks(range(len(rows)), [titles[name] for name in rows])
    ax.set(xlim=(-1.05, 1.05), ylim=(len(rows) - 0.5, -0.5), xlabel="ρ of ‖g‖² with the MCMC variance")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="x-small")
    return ax


def explain(problem, curves: Mapping[str, Array], parts: Mapping[str, Array], features: Array) -> Figure:
    """Draw why ‖g‖² and the posterior part on a regression: spreads, ‖g‖² by layer, and the hidden units, over x.

    curves: key of METHODS → variance (point,); parts: name → its share of ‖g‖² (point,); features: (point, unit).
    """
    figure, axes = panels(3, aspect=1.0)
    x = problem.grid[:, 0]
    below = {"loc": "upper left", "bbox_to_anchor": (0, -0.45), "fontsize": "x-small"}
    spread_curves(problem, curves, axes[0, 0]).legend(**below)
    for (name, part), colour, style in zip(parts.items(), PALETTE, ("-", "--", "-.", ":"), strict=False):
        axes[0, 1].plot(x, part, style, color=colour, label=name)
    axes[0, 1].set(xlabel="input $x$", title="‖g‖² by layer")
    axes[0, 1].legend(**below)
    axes[0, 2].plot(x, features, color="#777777", linewidth=0.8)
    axes[0, 2].set(xlabel="input $x$", title="hidden units")
    for ax in axes[0]:
        ax.plot(problem.inputs[:, 0], np.full(len(problem.inputs), ax.get_ylim()[0]), "|", color="black", markersize=5)
    return figure
