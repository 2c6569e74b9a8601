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
from isouq.studies.synthetic.findings import over_problems

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
    """Draw a map of log(estimate/reference) per entry of `fields` (point,), on one colour scale, with its proxies.

    Proxies outside the map are left out.
    """
    n_columns = 2 if len(fields) == 4 else 3
    figure, axes = panels(n_columns, -(-len(fields) // n_columns), aspect=1.0)
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
    bar.set_label("log(estimate / reference), scale removed (nats)")
    return figure


def responses(curves: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Draw the excess over the shift: a panel per reference of `labels`, a thin line per problem, the mean with a band.

    curves: columns reference, problem, shift, excess; the band is the 95 % t-interval over problems.
    """
    figure, axes = panels(len(labels), aspect=1.1, sharey=True)
    for ax, (reference, label) in zip(axes[0], labels.items(), strict=True):
        wide = curves[curves["reference"] == reference].pivot_table(index="shift", columns="problem", values="excess")
        ax.axhline(0, **GUIDE)
        ax.plot(wide.index, wide, color="#777777", linewidth=0.6, alpha=0.7)
        bands = [over_problems(row.dropna()) for _, row in wide.iterrows()]
        known = [(shift, b.value, b.low, b.high) for shift, b in zip(wide.index, bands, strict=True) if b is not None]
        shift, value, low, high = np.array(known).reshape(-1, 4).T
        ax.plot(shift, value, color=LOOKS[0][0], marker="o", markersize=4)
        ax.fill_between(shift, low, high, color=LOOKS[0][0], alpha=0.2, linewidth=0)
        ax.set(title=label, xlabel="shift of the proxies")
    axes[0, 0].set_ylabel("structure, more than\nisotropy's (share)")
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
