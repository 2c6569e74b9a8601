"""Spectra: two ways to the same number, closed forms, and a law that is recovered from random rows."""

from dataclasses import replace

import numpy as np
import pytest

from isouq.studies.isotropy import spectra
from isouq.studies.synthetic import point, problems


def make(name: str, width: int):
    model = problems.SPECS[name].model
    model = replace(model, network=replace(model.network, width=width))
    return problems.make(name, n_examples=40, resolution=6, model=model)


@pytest.mark.parametrize("name", ["binary_rings", "multiclass_spirals"])
def test_training_reaches_its_loss_and_the_spectrum_is_that_of_laplace(name):
    problem = make(name, 12)
    theta = spectra.train(problem)
    inverse_prior = np.diag(problem.model.scales() ** -2.0)
    loss = -float(problem.model.log_likelihood(theta, problem.inputs, problem.targets)) / 40
    assert loss <= spectra.TARGET_LOSS
    found = spectra.spectrum(problem)
    g = point.gradients(problem, theta, point.predicted_classes(problem, theta))
    after = point.quadratic_form(g, point.ggn(problem, theta))
    np.testing.assert_allclose(found.retained, after / point.quadratic_form(g, inverse_prior), rtol=1e-6)
    curvature = point.ggn(problem, theta) - inverse_prior
    scales = problem.model.scales()
    values, vectors = np.linalg.eigh(curvature * np.outer(scales, scales))
    inside = np.square((g * scales) @ vectors[:, values < 1]).sum(1) / np.square(g * scales).sum(1)
    np.testing.assert_allclose(found.bulk, inside, atol=1e-8)
    np.testing.assert_allclose(found.ggn[-5:], values[-5:], rtol=1e-8)


@pytest.mark.parametrize("name", ["binary_rings", "multiclass_spirals"])
def test_the_hessian_is_that_of_the_posterior_without_its_prior(name):
    problem = make(name, 24)
    theta, scales = spectra.train(problem), problem.model.scales()
    expected = point.hessian(problem, theta) * np.outer(scales, scales) - np.eye(len(scales))
    np.testing.assert_allclose(spectra.hessian_in_prior_units(problem, theta), expected, atol=1e-9)


def test_lanczos_agrees_with_the_whole_hessian():
    problem = make("multiclass_spirals", 16)
    theta = spectra.train(problem)
    exact = np.linalg.eigvalsh(spectra.hessian_in_prior_units(problem, theta))
    assert spectra.count_outliers(problem, theta, start=2) == (np.abs(exact) > 1).sum()
    grid, density = spectra.lanczos_density(problem, theta)
    assert np.trapezoid(density, grid) == pytest.approx(1, rel=1e-6)
    assert grid[0] <= exact[0]
    assert grid[-1] >= exact[-1]
    assert np.trapezoid(density * grid, grid) == pytest.approx(exact.mean(), abs=0.2 * exact.std())
    again = spectra.lanczos_density(problem, theta)[1]
    np.testing.assert_array_equal(again, density)


def test_a_large_network_takes_lanczos_for_its_outliers():
    whole, by_lanczos = (spectra.spectrum(make("binary_rings", 24), largest_dense=size) for size in (5000, 10))
    assert by_lanczos.hessian is None
    assert by_lanczos.n_outliers == whole.n_outliers
    np.testing.assert_array_equal(by_lanczos.retained, whole.retained)


def test_widths_go_over_widths_and_seeds():
    measured = spectra.widths("binary_rings", [0, 1], [4, 8])
    assert [(one.width, one.seed) for one in measured] == [(4, 0), (4, 1), (8, 0), (8, 1)]
    assert all(((one.bulk >= 0) & (one.bulk <= 1)).all() for one in measured)
    assert all(((one.retained > 0) & (one.retained <= 1)).all() for one in measured)


def test_training_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(spectra, "MAX_STEPS", 3)
    with pytest.raises(ValueError, match=r"binary_rings: loss .* after 3 steps, -1.0 wanted"):
        spectra.train(make("binary_rings", 4), target_loss=-1.0)


def test_effective_rank_counts_equal_eigenvalues():
    assert spectra.effective_rank([2.0] * 7 + [0.0] * 5) == pytest.approx(7)
    assert spectra.effective_rank([1.0, 0.0]) == pytest.approx(1)
    for wrong in ([], [0.0], [-1.0, 2.0], [np.nan]):
        with pytest.raises(ValueError, match="eigenvalues"):
            spectra.effective_rank(wrong)


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_marchenko_pastur_is_recovered_from_random_rows(ratio):
    rows = np.random.default_rng(0).normal(size=(120, int(120 / ratio)))
    fit = spectra.marchenko_pastur(np.linalg.eigvalsh(rows @ rows.T))
    assert fit.ratio == pytest.approx(ratio, rel=0.05)
    assert fit.scale == pytest.approx(120 / ratio, rel=0.05)
    assert fit.n_outliers == 0
    assert fit.distance < 0.05
    grid = np.linspace(*fit.edges, 20_001)[1:-1]
    assert np.trapezoid(fit.density(grid), grid) == pytest.approx(1, abs=1e-3)


def test_marchenko_pastur_sets_planted_outliers_aside_and_sees_a_wrong_law():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(100, 400))
    rows[:, :3] *= [30, 20, 15]
    assert spectra.marchenko_pastur(np.linalg.eigvalsh(rows @ rows.T)).n_outliers == 3
    two_humps = np.concatenate([rng.uniform(0.9, 1.0, 50), rng.uniform(2.0, 2.1, 50)])
    assert spectra.marchenko_pastur(two_humps).distance > 0.2
    with pytest.raises(ValueError, match="at least 10"):
        spectra.marchenko_pastur(np.ones(9))
