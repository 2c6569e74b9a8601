"""Figures show what they are given: as many marks and lines as rows, in the place that the numbers say."""

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


def test_differences_put_each_interval_in_its_row():
    table = pd.DataFrame({"source": ["x", "y"], "series": "s", "c": [1.0, 2.0], "c_low": 0.5, "c_high": [1.5, 3.0]})
    ax = plots.differences(table, {"c": "label"}, rows=["y", "x"], series=["s"]).axes[0]
    marks, at = ax.get_lines()[1].get_data()
    assert (list(marks), list(at)) == ([1, 2], [1, 0])
    assert len(ax.collections[0].get_segments()) == 2


def test_sweeps_have_a_line_for_every_series():
    table = pd.DataFrame({"series": ["a", "a", "b", "b"], "n": [1, 2, 1, 2], "value": [0.0, 1, 2, 3]})
    ax = plots.sweeps({"t": (table, "n", "n")}, ylabel="y").axes[0]
    assert [list(line.get_ydata()) for line in ax.get_lines()[1:]] == [[0, 1], [2, 3]]
