"""The chapters' figures show the numbers they are given, each where it belongs."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from isouq.studies import plotting
from isouq.studies.synthetic import problems

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def rings():
    return problems.make("multiclass_rings", resolution=5)


def test_data_sets_show_every_example_once_and_classes_by_marker(rings):
    wave = problems.make("regression_nonlinear")
    figure = plotting.data_sets({"rings": rings, "wave": wave})
    shown = figure.axes[0].collections
    assert sum(len(part.get_offsets()) for part in shown) == len(rings.inputs)
    assert len({part.get_paths()[0].vertices.shape for part in shown}) == 3
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), wave.targets)


def test_a_map_has_its_values_at_their_points(rings):
    values = rings.grid[:, 0] + 10 * rings.grid[:, 1]
    mesh, *examples = plotting.maps(rings, {"title": values}).axes[0].collections
    np.testing.assert_array_equal(np.ravel(mesh.get_array()), values)
    assert sum(len(part.get_offsets()) for part in examples) == len(rings.inputs)


def test_map_table_draws_differences_from_minus_one_to_one(rings):
    values = np.linspace(0, 1, 25)
    figure = plotting.map_table({"rings": rings}, {"GN": [values], "GN − MCMC": [values - 0.5]})
    limits = [ax.collections[0].get_clim() for ax in figure.axes]
    assert limits == [(0, 1), (-1, 1)]


def test_intervals_mark_the_paper_and_the_ceiling_of_each_labelled_row():
    row = {"method": "epistemic", "label": "rings", "value": 0.6, "low": 0.5, "high": 0.7, "paper": 0.44}
    ax = plotting.intervals(pd.DataFrame([row | {"ceiling": 0.98}]), plt.gca(), xlabel="ρ")
    marks = {line.get_label(): line.get_xdata()[0] for line in ax.lines}
    assert (marks["the paper"], marks["noise ceiling"]) == (0.44, 0.98)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rings"]


def test_against_width_has_a_line_per_seed_and_the_mean_of_a_problem():
    table = pd.DataFrame({"problem": "rings", "seed": [0, 0, 1, 1], "width": [4, 8, 4, 8], "rho": [0.1, 0.3, 0.3, 0.7]})
    ax = plotting.against_width(table, plt.gca(), y="rho", ylabel="ρ")
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.1, 0.3], [0.3, 0.7], pytest.approx([0.2, 0.5])]


def test_stepwise_draws_a_line_of_slope_one_through_the_geometric_mean():
    x = np.array([1.0, 10.0, 100.0])
    ax = plotting.stepwise({"truth": x, "estimate": 3 * x}).axes[0]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [3, 300])


def test_spread_curves_are_scaled_to_one():
    wave = problems.make("regression_nonlinear", resolution=20)
    variance = np.linspace(1, 4, 20)
    ax = plotting.spread_curves(wave, {"mcmc": variance}, plt.figure().gca())
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.sqrt(variance) / 2)
