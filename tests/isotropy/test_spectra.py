"""Spectra: two ways to the same number, and closed forms."""

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
