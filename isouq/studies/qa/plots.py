"""The chapter's figures. Each takes tables keyed by pairs, (model, data set), and draws a panel for each pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from isouq.studies import plotting
from isouq.studies.evaluation import Ranking
from isouq.studies.plotting import GUIDE
from isouq.studies.qa import analysis, details, tables
from isouq.studies.qa.analysis import HEADLINE, Analysis
from isouq.studies.qa.details import Pair

ABSENT = tables.TOO_FEW.replace("or ", "or\n")
COLUMNS = 3


def heading(pair: Pair) -> tuple[str, str]:
    """Return a label for panels: the model, and the data set in two lines."""
    model, data_set = tables.label(pair)
    return model, data_set.replace(" (", "\n(")


def aurocs(found: Mapping[Pair, pd.DataFrame]) -> Figure:
    """Draw the headline AUROCs of `analysis.auroc_table`s, the paper's beside them."""
    panels = {heading(pair): tables.beside_paper(table, pair[1]) for pair, table in found.items()}
    return plotting.interval_grid(panels, xlabel="AUROC", reference=0.5, absent=ABSENT, aspect=1.4)


def within(answers: Mapping[Pair, pd.DataFrame], analysed: Analysis) -> Figure:
    """Draw the AUROCs of `analysis.within`: with p held fixed above, with the length below."""
    panels = {}
    for pair, table in answers.items():
        rows = analysis.within(table, analysed)
        for by, symbol in {"probability": "p", "length": "L"}.items():
            panels[f"same ${symbol}$", heading(pair)[1]] = rows[rows["within"] == by]
    return plotting.interval_grid(panels, xlabel="AUROC", reference=0.5, absent=ABSENT, aspect=0.6)


def against_probability(answers: Mapping[Pair, pd.DataFrame]) -> Figure:
    """Draw U_A, log U_E and log G of every answer against S = log p, a row each, right and wrong ones apart."""
    rows = {"U_A": "$U_A$", "log_epistemic_sequence": r"$\log U_E$", "log_gradient": r"$\log G$"}
    figure, axes = plotting.panels(len(answers), len(rows), aspect=0.8, sharex="col", sharey="row")
    for column, (pair, table) in enumerate(answers.items()):
        shown = analysis.scored(table)
        shown = shown.assign(U_A=np.exp(shown["log_aleatoric_sequence"]))
        log_p = np.linspace(shown["log_prob"].min(), 0, 500)
        axes[0, column].plot(log_p, np.exp(log_p) * -np.expm1(log_p), color="#777777", linewidth=1, zorder=0)
        axes[0, column].set_title(heading(pair)[1])
        for ax, (y, name) in zip(axes[:, column], rows.items(), strict=True):
            plotting.right_and_wrong(shown, ax, x="log_prob", y=y, xlabel=r"$S = \log p$ (nats)", ylabel=name)
            ax.axvline(np.log(0.5), **GUIDE)
            ax.label_outer(remove_inner_ticks=False)
    _legend(figure, axes.flat)
    return figure


def accuracies(answers: Mapping[Pair, pd.DataFrame], analysed: Analysis) -> Figure:
    """Draw the share of right answers among those given against the share given, the least certain left out first.

    Dashed: at random. Dotted: a score that knows which answers are wrong.
    """

    def draw(ax: Axes, pair: Pair) -> None:
        right = float(analysis.scored(answers[pair])["right"].mean())
        plotting.accuracy_by_share(details.curves(answers[pair], analysed), ax, right=right)

    return _each(answers, draw, aspect=0.95)


def layers(answers: Mapping[Pair, pd.DataFrame], analysed: Analysis) -> Figure:
    """Draw the AUROC of U_E over one block's attention or MLP alone, against the block."""

    def draw(ax: Axes, pair: Pair) -> None:
        rows, _ = details.layers(answers[pair], analysed)
        for kind, line in {"attention": "s--", "mlp": "o-"}.items():
            part = rows[rows["kind"] == kind]
            ax.plot(part["block"], part["auroc"], line, markersize=3, label=kind)
        ax.axhline(0.5, **GUIDE)
        ax.set(xlabel="block", ylabel="AUROC of $U_E$", ylim=(0, 1))

    return _each(answers, draw, aspect=0.75)


def worth(answers: Mapping[Pair, pd.DataFrame], ranked: Mapping[Pair, Mapping[str, Mapping[str, Ranking]]]) -> Figure:
    """Draw each score's AUROC against the seconds that it takes for a question after its answer."""

    def draw(ax: Axes, pair: Pair) -> None:
        costs = details.costs(answers[pair], ranked[pair].get(HEADLINE, {}))
        plotting.worth(costs, ax, xlabel=f"seconds ({answers[pair].attrs['made']})", ylabel="AUROC")

    return _each(answers, draw, aspect=0.9)


def _each(answers: Mapping[Pair, pd.DataFrame], draw: Callable[[Axes, Pair], None], *, aspect: float) -> Figure:
    """Draw a panel for each pair, COLUMNS a row."""
    figure, axes = plotting.panels(COLUMNS, -(-len(answers) // COLUMNS), aspect=aspect, sharey=True)
    for ax in axes.flat[len(answers) :]:
        ax.set_visible(False)
    for ax, pair in zip(axes.flat, answers, strict=False):
        ax.set_title(", ".join(tables.label(pair)), fontsize="small")
        draw(ax, pair)
    _legend(figure, axes.flat)
    return figure


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend under all panels, with what any of them shows."""
    entries: dict[str, Artist] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=COLUMNS, fontsize="small"
        )
