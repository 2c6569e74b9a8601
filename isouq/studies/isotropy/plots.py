"""The figures of the isotropy chapter. Functions take tables and arrays and return figures or Axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from isouq.studies.plotting import GUIDE, panels, plane_map

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


def distortion_maps(problem, fields: Mapping[str, Array], proxies: Mapping[str, Array]) -> Figure:
    """Draw a map of log(estimate/reference) per entry of `fields` (point,), on one colour scale, with its proxies."""
    figure, axes = panels(3, -(-len(fields) // 3), aspect=1.0)
    reach = max(np.abs(field).max() for field in fields.values())
    norm = SymLogNorm(linthresh=0.5, vmin=-reach, vmax=reach, base=10)
    for ax in axes.flat[len(fields) :]:
        ax.set_axis_off()
    for ax, (title, field) in zip(axes.flat, fields.items(), strict=False):
        mesh = plane_map(problem, field, ax, cmap="RdBu_r", norm=norm)
        ax.tricontour(*problem.grid.T, field, levels=[0], colors="#444444", linewidths=0.6)
        if title in proxies:
            ax.scatter(*proxies[title].T, s=6, color="white", edgecolors="black", linewidths=0.5)
        ax.set_title(title)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.6, ticks=[-reach, -1, 0, 1, reach])
    bar.ax.set_yticklabels([f"{-reach:.1f}", "−1", "0", "1", f"{reach:.1f}"])
    bar.set_label("log(estimate / MCMC), scale removed (nats)")
    return figure


def differences(
    table: pd.DataFrame, columns: Mapping[str, str], *, rows: Sequence[str], series: Sequence[str]
) -> Figure:
    """Draw a panel for each of `columns` (column → axis label): a row per source, an interval per series, zero dashed.

    table: columns source, series, and for every column c its c, c_low, c_high.
    """
    figure, axes = panels(len(columns), aspect=1.3, sharey=True)
    for ax, (column, label) in zip(axes[0], columns.items(), strict=True):
        ax.axvline(0, **GUIDE)
        for place, name in enumerate(series):
            colour, marker, _ = LOOKS[place]
            part = table[table["series"] == name]
            at = [rows.index(source) + 0.18 * (place - (len(series) - 1) / 2) for source in part["source"]]
            ax.hlines(at, part[f"{column}_low"], part[f"{column}_high"], color=colour, linewidth=1.5)
            ax.plot(part[column], at, marker, color=colour, markersize=5, label=name)
        ax.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5))
    axes[0, 0].set_yticks(range(len(rows)), rows)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def sweeps(panels_: Mapping[str, tuple[pd.DataFrame, str, str]], *, ylabel: str, reference: float = 0.0) -> Figure:
    """Draw lines against n or λ. Each entry is (table, x, xlabel), the table with the columns of `_lines`."""
    figure, axes = panels(len(panels_), aspect=0.85, sharey=True)
    for ax, (title, (table, x, xlabel)) in zip(axes[0], panels_.items(), strict=True):
        ax.axhline(reference, **GUIDE)
        _lines(table, x, ax)
        ax.set(xscale="log", xlabel=xlabel, title=title)
    axes[0, 0].set_ylabel(ylabel)
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


def width_spectra(spectra: Sequence, shares: pd.DataFrame) -> Figure:
    """Draw eigenvalues of Hessian (thick) and GGN in units of the prior, and shares over the network's size.

    shares: columns n_parameters, series, value, low, high.
    """
    figure, axes = panels(2, aspect=0.8)
    left, right = axes[0]
    for spectrum, (colour, _, style) in zip(spectra, LOOKS, strict=False):
        for values, look in (
            (np.abs(spectrum.hessian), {"linestyle": style, "linewidth": 1.5, "label": f"width {spectrum.width}"}),
            (spectrum.ggn, {"linewidth": 0.6}),
        ):
            left.loglog(np.arange(1, len(values) + 1), np.sort(values)[::-1], color=colour, **look)
    left.axhline(1, **GUIDE)
    left.set(xlabel="rank of the eigenvalue", ylabel="|eigenvalue|, prior = 1", ylim=(1e-6, None))
    _lines(shares, "n_parameters", right)
    right.set(xscale="log", xlabel="parameters", ylabel="share", ylim=(0, 1.03))
    left.legend(fontsize="x-small")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure
