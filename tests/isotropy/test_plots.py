"""Figures show what they are given: as many marks and lines as rows, in the place that the numbers say."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from isouq.studies import plotting
from isouq.studies.isotropy import plots
from isouq.studies.synthetic import problems


@pytest.fixture(autouse=True)
def style():
    plt.switch_backend("agg")
    plotting.use_style()
    yield
    plt.close("all")


def test_maps_share_one_scale_and_mark_their_proxies():
    problem = problems.make("binary_xor", resolution=6)
    fields = {"a": np.linspace(-2, 1, 36), "b": np.zeros(36)}
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


def test_sweeps_have_a_line_for_every_series():
    table = pd.DataFrame({"series": ["a", "a", "b", "b"], "n": [1, 2, 1, 2], "value": [0.0, 1, 2, 3]})
    ax = plots.sweeps({"t": (table, "n", "n")}, ylabel="y").axes[0]
    assert [list(line.get_ydata()) for line in ax.get_lines()[1:]] == [[0, 1], [2, 3]]


def test_spectra_are_sorted():
    one = SimpleNamespace(width=4, hessian=np.array([-3.0, 1.0, 2.0]), ggn=np.ones(2))
    shares = pd.DataFrame({"n_parameters": [3, 9], "series": "s", "value": 0.5, "low": 0.4, "high": 0.6})
    figure = plots.width_spectra([one], shares)
    assert list(figure.axes[0].get_lines()[0].get_ydata()) == [3, 2, 1]
