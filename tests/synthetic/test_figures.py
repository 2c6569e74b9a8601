"""The chapters' figures show the numbers they are given, each where it belongs."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from isouq.studies import plotting
from isouq.studies.synthetic import plots, problems

pytestmark = pytest.mark.usefixtures("figure_style")


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


def test_intervals_mark_the_paper_and_the_ceiling_of_each_labelled_row():
    row = {"method": "epistemic", "label": "rings", "value": 0.6, "low": 0.5, "high": 0.7, "paper": 0.44}
    ax = plotting.intervals(pd.DataFrame([row | {"ceiling": 0.98}]), plt.gca(), xlabel="ρ")
    marks = {line.get_label(): line.get_xdata()[0] for line in ax.lines}
    assert (marks["the paper"], marks["noise ceiling"]) == (0.44, 0.98)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rings"]


def atlas_rows(**changes):
    row = {
        "problem": "binary_rings",
        "activation": "tanh",
        "width": 32,
        "prior": "fixed",
        "design": "few",
        "method": "gn",
    }
    return pd.DataFrame([row | {"value": 0.5, "paper": 0.44, "headline": True} | changes])


def test_the_atlas_shows_each_number_in_its_cell_and_what_has_none():
    titles = {name: spec.title for name, spec in problems.SPECS.items()}
    others = [{"width": 8, "value": np.nan, "headline": False}, {"activation": "relu", "value": -0.25}]
    rows = pd.concat([atlas_rows(), *[atlas_rows(**one) for one in others]])
    linear = atlas_rows(problem="binary_linear", activation="linear", width=0, value=0.75, paper=0.99)
    ax = plots.atlas(pd.concat([rows, linear]), titles).axes[0]
    cells = {text.get_text(): text.get_position() for text in ax.texts}
    assert cells[".50"] == (1.5, 1.5)
    assert cells["×"] == (0.5, 1.5)
    assert cells["−.25"] == (3.5, 1.5)
    assert cells[".75"] == (2.0, 0.5), "a linear problem has one cell over all networks"
    assert cells[".44"][0] > 4
    shades = {patch.get_xy(): patch.get_facecolor() for patch in ax.patches}
    assert shades[1, 1] != shades[3, 1]


def test_points_shows_every_setting_and_the_median():
    table = pd.DataFrame({"problem": "binary_rings", "point": "mode", "rho": [0.1, 0.2, 0.9, np.nan]})
    ax = plots.points(table, {"binary_rings": "rings"}, plt.gca())
    marks = [list(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) and line.get_marker() == "s"]
    assert marks == [[0.1, 0.2, 0.9], [0.2]]


def test_explain_draws_the_parts_and_every_hidden_unit():
    wave, x = problems.make("regression_nonlinear", resolution=20), np.arange(20.0)
    figure = plots.explain(wave, {"mcmc": x + 1}, {"output layer, weights": x}, np.stack([x, -x], axis=1))
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), x)
    assert [line.get_ydata()[1] for line in figure.axes[2].lines[:2]] == [1, -1]


def test_stepwise_draws_a_line_of_slope_one_through_the_geometric_mean():
    x = np.array([1.0, 10.0, 100.0])
    ax = plotting.stepwise({"truth": x, "estimate": 3 * x}).axes[0]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [3, 300])


def test_spread_curves_are_scaled_to_one():
    wave = problems.make("regression_nonlinear", resolution=20)
    variance = np.linspace(1, 4, 20)
    ax = plotting.spread_curves(wave, {"mcmc": variance}, plt.figure().gca())
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.sqrt(variance) / 2)
