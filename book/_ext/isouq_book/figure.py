"""Draw values with their intervals from results.json, and say in words what the drawing shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # a book is built where no screen is

import matplotlib.pyplot as plt
import pandas as pd

from isouq.studies import plotting
from isouq.studies.results import Result

from .results import format_interval


def read_panels(
    patterns: Sequence[str], titles: Sequence[str], methods: Sequence[str], entries: Mapping[str, Result]
) -> dict[str, dict[str, Result]]:
    """Collect title → method → result for the panels that have any; a method without result is left out."""
    panels = {}
    for pattern, title in zip(patterns, titles, strict=True):
        keys = {method: pattern.format(method=method) for method in methods}
        if found := {method: entries[key] for method, key in keys.items() if key in entries}:
            panels[title] = found
    return panels


def draw(
    panels: Mapping[str, Mapping[str, Result]],
    methods: Sequence[str],
    file: Path,
    *,
    xlabel: str,
    reference: float | None = None,
) -> str:
    """Write the figure as SVG and return its description for those who cannot see it."""
    plotting.use_style()
    shown = [method for method in methods if any(method in panel for panel in panels.values())]
    height = (0.6 + 0.32 * len(shown)) / (plotting.WIDTH / len(panels))
    figure, axes = plotting.panels(len(panels), aspect=height, sharex=True, sharey=True)
    for ax, (title, panel) in zip(axes[0], panels.items(), strict=True):
        plotting.intervals(_table(panel, shown), ax, xlabel=xlabel, reference=reference)
        ax.set_title(title.replace(" (", "\n("))
        if reference == 0.5:  # an AUROC, whose ticks are at guessing and at both ends
            ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return "; ".join(f"{title}: {_words(panel)}" for title, panel in panels.items())


def _table(panel: Mapping[str, Result], methods: Sequence[str]) -> pd.DataFrame:
    rows = {method: (entry.value, entry.low, entry.high) for method, entry in panel.items()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"], dtype=float)
    return table.reindex(methods).rename_axis("method").reset_index()


def _words(panel: Mapping[str, Result]) -> str:
    return ", ".join(f"{plotting.METHODS[name].label} {format_interval(entry)}" for name, entry in panel.items())
