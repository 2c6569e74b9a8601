"""The chapter's figures: time and memory by method and model, time against sizes."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from isouq.studies import plotting
from isouq.studies.cost.findings import EVERY, Costs
from isouq.studies.qa.tables import model_name


def _methods(costs: Mapping[str, Costs]) -> list[str]:
    """Return the methods that ran on any of the models, in the order of the table of methods."""
    return [method for method in EVERY if any(method in of.times.index for of in costs.values())]


def times(costs: Mapping[str, Costs]) -> Figure:
    """Draw the time of every method in forward passes of the same texts, a panel per model."""
    figure, axes = plotting.panels(len(costs), aspect=0.55 * len(costs), sharex=True, sharey=True)
    for ax, (name, of) in zip(axes[0], costs.items(), strict=True):
        table = of.times.reindex(_methods(costs)).reset_index()
        plotting.intervals(table, ax, xlabel="forward passes", reference=1.0, logarithmic=True)
        ax.set_title(model_name(name))
    return figure


def peaks(costs: Mapping[str, Costs]) -> Figure:
    """Draw the peak memory of every method above the model, in units of the model's weights; isouq's are hatched."""
    figure, axes = plotting.panels(len(costs), aspect=0.55 * len(costs), sharey=True)
    xlabel, hatched = "peak above the model / weights", ["ghost", "token_mean"]
    for ax, (name, of) in zip(axes[0], costs.items(), strict=True):
        shares = of.memory.table["peak_bytes"].reindex(_methods(costs)) / of.memory.weights
        plotting.bars(shares, ax, hatched=hatched, xlabel=xlabel).set_title(model_name(name))
    return figure


def sweeps(tables: Mapping[str, pd.DataFrame], *, aspect: float) -> Figure:
    """Draw `timing.sweep`s in forward passes of the same size, a panel for each with its key as the label of x."""
    figure, axes = plotting.panels(len(tables), aspect=aspect, sharey=True)
    for ax, (xlabel, table) in zip(axes[0], tables.items(), strict=True):
        ylabel = "time, forward passes" if ax is axes[0, 0] else ""
        plotting.against(table, ax, x="size", xlabel=xlabel, ylabel=ylabel)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure
