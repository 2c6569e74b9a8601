"""The one style: what makes a method recognisable, and figures that come out the same each time."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from isouq.studies import plotting
from isouq.studies.plotting import METHODS

pytestmark = pytest.mark.usefixtures("figure_style")


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    linear = [u / 12.92 if u <= 0.03928 else ((u + 0.055) / 1.055) ** 2.4 for u in to_rgb(colour)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_method_can_be_seen_on_white_and_shares_no_colour_marker_or_name():
    assert not [name for name in METHODS if 1.05 / (luminance(METHODS[name].colour) + 0.05) < 3]
    for column in zip(*METHODS.values(), strict=True):
        assert len(set(column)) == len(METHODS)


@pytest.fixture
def table():
    rows = [("epistemic", 0.6, 0.5, 0.7, 0.52), ("p_true", float("nan"), float("nan"), float("nan"), 0.69)]
    return pd.DataFrame(rows, columns=["method", "value", "low", "high", "paper"])


def test_intervals_draws_each_value_where_it_is_and_leaves_absent_rows_empty(table):
    ax = plotting.intervals(table, xlabel="AUROC", reference=0.5)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["epistemic", "P(True)"]
    drawn = [list(line.get_xdata()) for line in ax.lines]
    assert [0.5, 0.7] in drawn
    assert [0.6] in drawn
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first row is at the top"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["the paper"]


def test_a_missing_column_and_an_unknown_method_are_named(table):
    with pytest.raises(KeyError, match="low"):
        plotting.intervals(table.drop(columns="low"), xlabel="AUROC")
    with pytest.raises(KeyError, match="magic"):
        plotting.intervals(table.assign(method="magic"), xlabel="AUROC")


def test_panels_fill_the_text_column():
    figure, axes = plotting.panels(3, 2)
    assert axes.shape == (2, 3)
    assert figure.get_figwidth() == plotting.WIDTH


def test_the_same_figure_gives_the_same_bytes(table, tmp_path):
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        figure, axes = plotting.panels(1)
        plotting.intervals(table, axes[0, 0], xlabel="AUROC")
        figure.savefig(file, metadata={"Date": None})
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"<text" not in files[0].read_bytes(), "letters are paths: no reader's fonts are needed"


def test_worth_draws_every_method_of_the_chapter_where_its_cost_and_value_are():
    from isouq.studies.qa.details import STAGES

    rows = [(name, 10.0**i, 0.6, 0.5, 0.7) for i, name in enumerate(STAGES)]
    table = pd.DataFrame(rows, columns=["method", "seconds", "value", "low", "high"])
    figure, ax = plt.subplots()
    plotting.worth(table, ax, xlabel="seconds", ylabel="AUROC")
    points = [line for line in ax.lines if line.get_label() in {METHODS[name].label for name in STAGES}]
    assert [line.get_xdata()[0] for line in points] == [row[1] for row in rows]
    assert ax.get_xscale() == "log"
    figure.canvas.draw()
