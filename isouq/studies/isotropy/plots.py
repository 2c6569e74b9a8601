"""The figures of the isotropy chapter. Functions take tables and arrays and return figures or Axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from isouq.studies.plotting import GUIDE, panels, plane_map
from isouq.studies.synthetic.findings import means

Array = NDArray[np.float64]

# Colour, marker and line style of each series: told apart without colour too.
LOOKS = [
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#7B3294", "D", ":"),
    ("#555555", "X", (0, (5, 1))),
    ("#B87700", "v", (0, (1, 1))),
]
EXCESS = "structure, more than\nisotropy's (share)"


def distortion_maps(problem, fields: Mapping[str, Array], proxies: Mapping[str, Array]) -> Figure:
    """Draw four maps of log(estimate/reference), `fields` (point,) by title, on one colour scale, with their proxies.

    Proxies outside the map are left out.
    """
    figure, axes = panels(2, 2, aspect=1.0)
    reach = max(np.abs(field).max() for field in fields.values())
    norm = SymLogNorm(linthresh=0.5, vmin=-reach, vmax=reach, base=10)
    for ax, (title, field) in zip(axes.flat, fields.items(), strict=True):
        mesh = plane_map(problem, field, ax, cmap="RdBu_r", norm=norm)
        ax.tricontour(*problem.grid.T, field, levels=[0], colors="#444444", linewidths=0.6)
        if title in proxies:
            ax.scatter(*proxies[title].T, s=6, color="white", edgecolors="black", linewidths=0.5)
        ax.set_title(title)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.6, ticks=[-reach, -1, 0, 1, reach])
    bar.ax.set_yticklabels([f"{-reach:.1f}", "−1", "0", "1", f"{reach:.1f}"])
    bar.set_label("log(estimate / reference), scale removed (nats)")
    return figure


def responses(curves: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Draw the excess over the shift: a panel per reference of `labels`, a thin line per problem, the mean with a band.

    curves: columns reference, problem, shift, excess; the band is the 95 % t-interval over problems.
    """
    figure, axes = panels(len(labels), aspect=1.1, sharey=True)
    for ax, (reference, label) in zip(axes[0], labels.items(), strict=True):
        rows = curves[curves["reference"] == reference]
        wide = rows.pivot_table(index="shift", columns="problem", values="excess")
        ax.axhline(0, **GUIDE)
        ax.plot(wide.index, wide, color="#777777", linewidth=0.6, alpha=0.7)
        band = means(rows, ["shift"], "excess").query("n > 1")
        ax.plot(band["shift"], band["value"], color=LOOKS[0][0], marker="o", markersize=4)
        ax.fill_between(band["shift"], band["low"], band["high"], color=LOOKS[0][0], alpha=0.2, linewidth=0)
        ax.set(title=label, xlabel="shift of the proxies")
    axes[0, 0].set_ylabel(EXCESS)
    return figure


def damped(table: pd.DataFrame) -> Figure:
    """Draw the excess over the damping, a line and a band for each matrix; table: that of ``dose.swept``."""
    figure, axes = panels(1, aspect=0.5)
    axes[0, 0].axhline(0, **GUIDE)
    _lines(table, "damping", axes[0, 0])
    axes[0, 0].set(xscale="log", xlabel=r"damping $\lambda$ (1: Laplace's)", ylabel=EXCESS)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _lines(table: pd.DataFrame, x: str, ax: Axes) -> None:
    """Draw a line for each series of a table with columns series, `x`, value and, for a band, low and high."""
    for (name, part), (colour, marker, style) in zip(table.groupby("series", sort=False), LOOKS, strict=False):
        ax.plot(part[x], part["value"], color=colour, marker=marker, linestyle=style, markersize=4, label=name)
        if "low" in part:
            ax.fill_between(part[x], part["low"], part["high"], color=colour, alpha=0.12, linewidth=0)


def ladder(table: pd.DataFrame, spread_of_log_g: float) -> Figure:
    """Draw each kind of proxies' pull with its interval, and the size of its distortion beside that of log G (dashed).

    table: that of `language_findings.ladder`, drawn from top to bottom.
    """
    figure, axes = panels(2, aspect=0.9, sharey=True)
    (left, right), (colour, marker, _), at = axes[0], LOOKS[0], np.arange(len(table))
    left.axvline(0, **GUIDE)
    left.hlines(at, [pull.low for pull in table["pull"]], [pull.high for pull in table["pull"]], color=colour)
    left.plot([pull.value for pull in table["pull"]], at, marker, color=colour)
    left.set(xlabel="ρ with nearness", ylim=(len(table) - 0.5, -0.5))
    left.set_yticks(at, table["title"])
    right.axvline(spread_of_log_g, **GUIDE)
    right.plot(table["spread"], at, marker, color=colour)
    right.set(xscale="log", xlabel="spread of distortion (nats)")
    return figure


def ranks_by_width(means: pd.DataFrame) -> Figure:
    """Draw ρ and the spread of the retained share by region, and shares of the spectrum, over the width.

    means: the table of ``ranks.by_width``. Bands are intervals over problems, the cross is the positive control, the
    dashed line the largest share of eigenvalues that so many examples could move.
    """
    figure, axes = panels(3, aspect=1.25)
    fixed = means[(means["prior"] == "fixed") & (means["weight"] == 1)]
    whole = fixed[fixed["region"] == "whole"]
    scaled = means[(means["prior"] == "fan_in") & (means["region"] == "whole")].assign(series="whole, scaled prior")
    of_g = whole[whole["statistic"] == "rho_g"].assign(series="whole, of gᵀΣg with ‖g‖²", statistic="rho")
    lines = pd.concat([fixed.assign(series=fixed["region"]), scaled, of_g])
    for ax, statistic, label in (
        (axes[0, 0], "rho", "ρ of hᵀΣh with ‖h‖²"),
        (axes[0, 1], "sd", "sd of log share (nats)"),
    ):
        _lines(lines[lines["statistic"] == statistic], "width", ax)
        ax.set(ylabel=label)
    control = means[(means["weight"] != 1) & (means["region"] == "whole") & (means["statistic"] == "rho")]
    axes[0, 0].plot(control["width"], control["value"], "x", color="black", markersize=7, label="control")
    names = {"bulk": "‖h‖² in the bulk", "outliers": "eigenvalues above the prior's"}
    shares = whole[whole["statistic"].isin(list(names))].assign(series=lambda t: t["statistic"].map(names))
    _lines(shares, "width", axes[0, 2])
    bound = whole[whole["statistic"] == "bound"]
    axes[0, 2].plot(bound["width"], bound["value"], **GUIDE | {"label": "their bound"})
    axes[0, 2].set(yscale="log", ylim=(3e-4, 1.3), ylabel="share")
    ticks = sorted(means["width"].unique())
    for ax in axes[0]:
        ax.set(xscale="log", xlabel="width")
        ax.set_xticks(ticks, ticks, fontsize="x-small")
        ax.set_xticks([], minor=True)
        ax.legend(fontsize="xx-small", loc="upper center", bbox_to_anchor=(0.5, -0.3))
    return figure


def chain(means: pd.DataFrame, titles: Mapping[str, str], steps: Sequence[str]) -> Figure:
    """Draw a row per problem: the variance that each step adds (nats²), and ρ with MCMC after it.

    means: the table of ``chain.by_problem``; titles: problem → its label, in the order of the rows; steps: those of the
    chain. Colour and number are the same; × marks a problem without a chain.
    """
    rows = [name for name in titles if name in set(means["problem"])]
    figure, axes = panels(2, aspect=0.13 * (len(rows) + 1.5), sharey=True)
    for ax, column, last, title in (
        (axes[0, 0], "variance", "error", "squared log error added (nats²)"),
        (axes[0, 1], "rho", "error, trained", "ρ with MCMC's variance after the step"),
    ):
        table = means.pivot_table(index="problem", columns="step", values=column, dropna=False)
        values = table.reindex(index=rows, columns=[*steps, last]).to_numpy()
        scale = SymLogNorm(linthresh=0.1, vmin=0, vmax=50) if column == "variance" else Normalize(-1, 1)
        mesh = ax.imshow(values, cmap="Purples" if column == "variance" else "RdBu", norm=scale, aspect="auto")
        for (row, place), value in np.ndenumerate(values):
            dark = np.isfinite(value) and np.dot(mesh.to_rgba(value)[:3], (0.3, 0.6, 0.1)) < 0.5
            text = f"{round(value, 2) + 0:.{0 if value >= 10 else 2}f}".replace("-", "−") if np.isfinite(value) else "×"
            ax.text(place, row, text, ha="center", va="center", fontsize="small", color="white" if dark else "black")
        ax.axvline(len(steps) - 0.5, color="white", linewidth=4)
        labels = [*steps, "all four" if column == "variance" else "the same, trained"]
        ax.set_xticks(range(len(labels)), labels, rotation=35, ha="right", fontsize="small")
        ax.set_title(title, fontsize="small")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[0, 0].set_yticks(range(len(rows)), [titles[name] for name in rows], fontsize="small")
    return figure
