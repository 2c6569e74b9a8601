"""Figures show what they are given: as many marks and lines as rows, in the place that the numbers say."""

import numpy as np
import pandas as pd
import pytest

from isouq.studies.isotropy import plots
from isouq.studies.synthetic import problems

pytestmark = pytest.mark.usefixtures("figure_style")


def test_maps_share_one_scale_and_mark_their_proxies():
    problem = problems.make("binary_xor", resolution=6)
    fields = {"a": np.linspace(-2, 1, 36)} | dict.fromkeys("bcd", np.zeros(36))
    figure = plots.distortion_maps(problem, fields, {"b": problem.inputs[:7]})
    first, second = figure.axes[:2]
    assert first.collections[0].norm.vmax == second.collections[0].norm.vmax == 2
    assert len(second.collections[-1].get_offsets()) == 7


def test_responses_draw_each_problem_and_their_mean():
    rows = [("r", problem, shift, shift * slope) for problem, slope in (("a", 0.1), ("b", 0.3)) for shift in (0.0, 2.0)]
    table = pd.DataFrame(rows, columns=["reference", "problem", "shift", "excess"])
    ax = plots.responses(table, {"r": "R"}).axes[0]
    _, *thin, mean = ax.get_lines()
    assert sorted(line.get_ydata()[1] for line in thin) == pytest.approx([0.2, 0.6])
    assert list(mean.get_ydata()) == pytest.approx([0, 0.4])
    one = table[table["problem"] == "a"]
    assert len(plots.responses(one, {"r": "R"}).axes[0].get_lines()[-1].get_xdata()) == 0, "one problem has no mean"


def test_the_damping_has_a_line_for_every_series():
    table = pd.DataFrame({"series": ["a", "a", "b", "b"], "damping": [1, 2, 1, 2], "value": [0.0, 1, 2, 3]})
    ax = plots.damped(table).axes[0]
    assert [list(line.get_ydata()) for line in ax.get_lines()[1:]] == [[0, 1], [2, 3]]


def test_ranks_by_width_draw_every_series_the_control_and_the_bound():
    settings = [(p, r, w, 1.0) for p in ("fixed", "fan_in") for r in ("whole", "near", "far") for w in (2, 8)]
    names = ["prior", "region", "width", "weight", "statistic"]
    rows = [
        dict(zip(names, [*setting, statistic], strict=True)) | {"value": 0.1 * place, "low": 0.0, "high": 1.0}
        for setting in [*settings, ("fixed", "whole", 2, 100.0)]
        for place, statistic in enumerate(["rho", "rho_g", "sd", "bulk", "outliers", "bound"])
    ]
    left, middle, right = plots.ranks_by_width(pd.DataFrame(rows).assign(value=lambda t: t["value"] + 0.01)).axes
    assert [len(ax.get_lines()) for ax in (left, middle, right)] == [6, 4, 3]
    assert [list(line.get_ydata()) for line in left.get_lines()][-1] == [0.01], "the control"
    assert [tuple(line.get_xdata()) for line in right.get_lines()] == [(2, 8)] * 3
    assert list(right.get_lines()[-1].get_ydata()) == pytest.approx([0.51, 0.51])


def test_the_chain_shows_each_number_in_its_place_and_a_cross_where_there_is_none():
    steps = ["one mode", "isotropy"]
    rows = [
        {"problem": problem, "step": step, "variance": variance, "rho": rho}
        for problem, values in {"a": [0.001, 12.3, 4.0, 5.0], "b": [np.nan] * 4}.items()
        for step, variance, rho in zip(
            [*steps, "error", "error, trained"], values, [1, -0.25, np.nan, 0.5], strict=True
        )
    ]
    left, right = plots.chain(pd.DataFrame(rows), {"b": "B", "a": "A", "none": "N"}, steps).axes
    assert [text.get_text() for text in left.texts] == ["×"] * 3 + ["0.00", "12", "4.00"]
    assert [text.get_text() for text in right.texts] == ["1.00", "−0.25", "0.50"] * 2
    assert [label.get_text() for label in left.get_yticklabels()] == ["B", "A"]
