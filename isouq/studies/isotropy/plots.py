"""The figures of the isotropy chapter: tables and arrays go in, Axes come out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from isouq.studies.plotting import WIDTH, panels

Array = NDArray[np.float64]

# One look per series in the chapter: colour, marker, line style; told apart without colour too.
LOOKS = [
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#7B3294", "D", ":"),
    ("#555555", "X", (0, (5, 1))),
    ("#B87700", "v", (0, (1, 1))),
]


def distortion_maps(problem, fields: Mapping[str, Array], proxies: Mapping[str, Array]) -> Figure:
    """One map of log(estimate/reference) per entry of `fields` (point,), in one colour scale, with their proxies."""
    n_columns = 3
    n_rows = -(-len(fields) // n_columns)
    figure, axes = panels(n_columns, n_rows, aspect=1.0)
    reach = max(np.abs(field).max() for field in fields.values())
    norm = SymLogNorm(linthresh=0.5, vmin=-reach, vmax=reach, base=10)
    x, y = (problem.grid[:, axis].reshape(problem.shape) for axis in (0, 1))
    for ax in axes.flat[len(fields) :]:
        ax.set_axis_off()
    for ax, (title, field) in zip(axes.flat, fields.items(), strict=False):
        values = field.reshape(problem.shape)
        mesh = ax.pcolormesh(x, y, values, shading="gouraud", cmap="RdBu_r", norm=norm, rasterized=True)
        ax.contour(x, y, values, levels=[0], colors="#444444", linewidths=0.6)
        if title in proxies:
            ax.scatter(*proxies[title].T, s=6, color="white", edgecolors="black", linewidths=0.5)
        ax.set(title=title, xlim=problem.limits, ylim=problem.limits, xticks=[], yticks=[], aspect="equal")
    bar = figure.colorbar(mesh, ax=axes, shrink=0.6, ticks=[-reach, -1, 0, 1, reach])
    bar.ax.set_yticklabels([f"{-reach:.1f}", "−1", "0", "1", f"{reach:.1f}"])
    bar.set_label("log(estimate / MCMC), scale removed (nats)")
    return figure


def differences(
    table: pd.DataFrame, columns: Mapping[str, str], *, rows: Sequence[str], series: Sequence[str]
) -> Figure:
    """For each of `columns` (column → axis label) a panel: a row per source, an interval per series, zero dashed.

    table: columns source, series, and for every column c its c, c_low, c_high.
    """
    figure, axes = panels(len(columns), aspect=1.3, sharey=True)
    for ax, (column, label) in zip(axes[0], columns.items(), strict=True):
        ax.axvline(0, color="#777777", linestyle="--", linewidth=1, zorder=0)
        for place, name in enumerate(series):
            colour, marker, _ = LOOKS[place]
            some = table[table["series"] == name]
            at = [rows.index(source) + 0.18 * (place - (len(series) - 1) / 2) for source in some["source"]]
            ax.hlines(at, some[f"{column}_low"], some[f"{column}_high"], color=colour, linewidth=1.5)
            ax.plot(some[column], at, marker, color=colour, markersize=5, label=name)
        ax.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5))
    axes[0, 0].set_yticks(range(len(rows)), rows)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def sweeps(
    panels_: Mapping[str, tuple[pd.DataFrame, str, str]], *, ylabel: str, reference: float | None = 0.0
) -> Figure:
    """Lines against n or λ: per panel a table with columns series, value, low, high and its x; (table, x, xlabel)."""
    figure, axes = panels(len(panels_), aspect=0.85, sharey=True)
    for ax, (title, (table, x, xlabel)) in zip(axes[0], panels_.items(), strict=True):
        if reference is not None:
            ax.axhline(reference, color="#777777", linestyle="--", linewidth=1, zorder=0)
        for (name, some), (colour, marker, style) in zip(table.groupby("series", sort=False), LOOKS, strict=False):
            ax.plot(some[x], some["value"], color=colour, marker=marker, linestyle=style, markersize=4, label=name)
            if "low" in some:
                ax.fill_between(some[x], some["low"], some["high"], color=colour, alpha=0.12, linewidth=0)
        ax.set(xscale="log", xlabel=xlabel, title=title)
    axes[0, 0].set_ylabel(ylabel)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def rank_lines(scores: pd.DataFrame, *, reference: str, marked: Array | None = None) -> Axes:
    """Each question's rank under every column of `scores` (question × covariance), lines between, lowest rank below.

    The line's shade follows the rank under `reference`; questions that move by more than a tenth of all are drawn bold.
    """
    ranks = scores.rank(axis=0)
    _, ax = plt.subplots(figsize=(WIDTH, 0.75 * WIDTH), layout="constrained")
    shade = plt.get_cmap("viridis")
    for _, row in ranks.iterrows():
        moved = np.abs(row - row[reference]).max() > len(ranks) / 10
        colour = shade(0.9 * row[reference] / len(ranks))
        ax.plot(range(len(row)), row, marker="o", markersize=3, color=colour, linewidth=2 if moved else 0.8)
    ax.set_xticks(range(ranks.shape[1]), [textwrap.fill(name, 12) for name in ranks.columns], fontsize="small")
    ax.set(ylabel="rank among the questions (1 = least uncertain)", xlim=(-0.2, ranks.shape[1] - 0.8))
    return ax


def width_spectra(spectra: Sequence, density: tuple[Array, Array], shares: pd.DataFrame) -> Figure:
    """Left: eigenvalues of Hessian (thick) and GGN in units of the prior; middle: density of a large one's Hessian.

    density: (grid, density), by Lanczos. shares, on the right: columns n_parameters, series, value, low, high.
    """
    figure, axes = panels(3, aspect=1.3)
    left, middle, right = axes[0]
    for one, (colour, _, style) in zip(spectra, LOOKS, strict=False):
        values = np.sort(np.abs(one.hessian))[::-1]
        label = f"width {one.width}"
        left.loglog(np.arange(1, len(values) + 1), values, color=colour, linestyle=style, linewidth=1.5, label=label)
        left.loglog(np.arange(1, len(one.ggn) + 1), np.sort(one.ggn)[::-1], color=colour, linewidth=0.6)
    left.axhline(1, color="#777777", linestyle="--", linewidth=1, zorder=0)
    left.set(xlabel="rank of the eigenvalue", ylabel="|eigenvalue|, prior = 1", ylim=(1e-6, None))
    middle.semilogy(*density, color="black", linewidth=1)
    middle.set(xlabel="eigenvalue", ylabel="density", ylim=(1e-7, 10 * density[1].max()))
    for (name, some), (colour, marker, style) in zip(shares.groupby("series", sort=False), LOOKS, strict=False):
        right.plot(some["n_parameters"], some["value"], color=colour, marker=marker, linestyle=style, label=name)
        right.fill_between(some["n_parameters"], some["low"], some["high"], color=colour, alpha=0.12, linewidth=0)
    right.set(xscale="log", xlabel="parameters", ylabel="share", ylim=(0, 1.03))
    left.legend(fontsize="x-small")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure


def gram_spectrum(eigenvalues: Mapping[str, Array], fit=None, *, ax: Axes | None = None) -> Axes:
    """Eigenvalues of cosine Grams, sorted, a line per kind of proxies; the Marchenko–Pastur edges of `fit` dotted."""
    ax = plt.gca() if ax is None else ax
    for (name, values), (colour, marker, style) in zip(eigenvalues.items(), LOOKS, strict=False):
        values = np.sort(values)[::-1]
        at = np.arange(1, len(values) + 1) / len(values)
        ax.plot(at, values, color=colour, marker=marker, linestyle=style, markersize=3, linewidth=1, label=name)
    for edge in fit.edges if fit is not None else ():
        ax.axhline(edge, color="#777777", linestyle=":", linewidth=1)
    ax.axhline(1, color="#777777", linestyle="--", linewidth=1, zorder=0)
    ax.set(yscale="log", xlabel="rank / number of proxies", ylabel="eigenvalue of the cosine Gram")
    ax.legend(fontsize="small")
    return ax


def scatter_by_kind(table: pd.DataFrame, *, xlabel: str, ylabel: str) -> Figure:
    """A panel per kind of proxies: distortion against similarity, question sets by marker; columns kind, set, x, y."""
    kinds = list(dict.fromkeys(table["kind"]))
    figure, axes = panels(len(kinds), aspect=1.7, sharey=True)
    for ax, kind in zip(axes[0], kinds, strict=True):
        for (name, some), (colour, marker, _) in zip(table[table["kind"] == kind].groupby("set"), LOOKS, strict=False):
            ax.plot(some["x"], some["y"], marker, color=colour, markersize=3.5, alpha=0.7, label=name, mfc="none")
        ax.axhline(0, color="#777777", linestyle="--", linewidth=1, zorder=0)
        ax.set_title(textwrap.fill(kind, 16), fontsize="small")
        ax.tick_params(labelsize="small")
    axes[0, 0].set_ylabel(ylabel)
    axes[0, len(kinds) // 2].set_xlabel(xlabel)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
