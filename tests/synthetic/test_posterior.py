"""The gate catches broken samplers; the reference is right where the answer is known."""

import itertools
from dataclasses import replace

import arviz
import numpy as np
import pytest
from scipy import stats

from isouq.studies.synthetic import point, posterior
from isouq.studies.synthetic.plan import Job
from isouq.studies.synthetic.posterior import Settings

SETTINGS = Settings(n_chains=4, n_warmup=200, n_draws=500)


@pytest.fixture(scope="module")
def logistic():
    return posterior.sample(Job(problem="binary_linear", resolution=8).make(), SETTINGS)


@pytest.fixture(scope="module")
def network():
    """Independent draws of a network's prior: chains that have converged by construction."""
    problem = Job(problem="multiclass_rings", width=4, resolution=4).make()
    draws = np.random.default_rng(0).normal(size=(4, 500, problem.model.network.n_parameters))
    return problem, draws * problem.model.scales()


def verdict(values, energy=None):
    energy = np.random.default_rng(1).normal(size=values.shape[:2]) if energy is None else energy
    return posterior.judge(values, divergent=np.zeros(values.shape[:2], dtype=bool), energy=energy, seconds=0.0)


def test_a_sound_posterior_passes(logistic):
    assert logistic.diagnostics.passed, logistic.diagnostics.failures
    assert logistic.draws.shape == (4, 500, 3)


def test_logistic_regression_by_quadrature(logistic):
    problem = logistic.problem
    axes = [np.linspace(-3.5, 3.5, 50) + centre for centre in logistic.draws.mean(axis=(0, 1))]
    theta = np.array(list(itertools.product(*axes)))
    design, grid = (np.hstack([x, np.ones((len(x), 1))]) for x in (problem.inputs, problem.grid))
    log_density = stats.norm(scale=problem.model.scales()).logpdf(theta).sum(axis=1)
    log_density -= np.logaddexp(0, (1 - 2 * problem.targets) * (theta @ design.T)).sum(axis=1)
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    p = 1 / (1 + np.exp(-theta @ grid.T))
    mean = weight @ p
    exact = weight @ np.square(p) - mean**2
    found = posterior.reference(logistic, np.zeros(len(grid), dtype=int))
    assert np.abs((found["variance"] - exact) / found["mcse"]).max() < 5
    assert np.median(np.abs(found["variance"] / exact - 1)) < 0.1
    np.testing.assert_allclose(found["mean"], mean, atol=0.02)
    np.testing.assert_allclose(found["aleatoric"], weight @ (p * (1 - p)), atol=0.01)


def test_hmc_agrees_with_the_closed_form():
    problem = Job(problem="regression_linear", resolution=8).make()
    settings = replace(SETTINGS, sampler="hmc")
    drawn = posterior.sample(problem, settings)
    assert drawn.diagnostics.passed, drawn.diagnostics.failures
    classes = np.zeros(8, dtype=int)
    theta = point.find_map(problem, n_starts=2).theta
    exact = point.laplace(problem, theta, classes)
    found = posterior.reference(drawn, classes)
    assert np.abs((found["variance"] - exact) / found["mcse"]).max() < 5
    assert "aleatoric" not in found


def test_the_variance_is_that_of_all_draws_and_its_halves_those_of_half_the_chains(logistic):
    found = posterior.reference(logistic, np.zeros(64, dtype=int))
    values = posterior.functions(logistic.problem, logistic.draws)[..., 0]
    np.testing.assert_allclose(found["variance"], values.var(axis=(0, 1)), rtol=1e-10)
    np.testing.assert_allclose(found["halves"][1], values[2:].var(axis=(0, 1)), rtol=1e-10)


def test_diagnostics_are_those_of_arviz(logistic):
    values = posterior.functions(logistic.problem, logistic.draws)[:, :, ::9, 0]
    for i in range(values.shape[2]):
        found = verdict(values[:, :, [i], None], energy=logistic.energy)
        both = max(found.rhat, found.rhat_folded)
        np.testing.assert_allclose(both, arviz.rhat(values[:, :, i], method="rank"), rtol=1e-6)
        np.testing.assert_allclose(found.ess, arviz.ess(values[:, :, i], method="bulk"), rtol=0.02)
    np.testing.assert_allclose(found.efmi, arviz.bfmi(logistic.energy).min(), rtol=0.02)


def test_a_huge_step_is_caught():
    broken = posterior.sample(Job(problem="binary_xor", resolution=4).make(), replace(SETTINGS, step_size=50.0))
    assert not broken.diagnostics.passed
    assert broken.diagnostics.n_divergent > 0


def test_one_stuck_chain_is_caught(network):
    problem, draws = network
    assert verdict(posterior.functions(problem, draws)).passed
    stuck = draws.copy()
    stuck[2] = stuck[2, 0]
    assert any("R-hat" in text for text in verdict(posterior.functions(problem, stuck)).failures)


def test_one_chain_of_another_spread_is_caught_by_folding():
    values = np.random.default_rng(0).normal(size=(4, 1000, 1, 1))
    values[1] *= 3
    found = verdict(values - values.mean(axis=1, keepdims=True))
    assert found.rhat < 1.01 < found.rhat_folded


def test_label_switching_is_caught_in_functions_and_forgiven_in_weights(network):
    problem, draws = network
    # with class 0 favoured, classes can be told apart: a chain that has two of them switched has not converged
    favoured = posterior.functions(problem, _shift_last_bias(problem, draws, class_=0))
    switched = favoured.copy()
    switched[1] = switched[1][..., [1, 0, 2]]
    assert verdict(favoured).passed
    assert any("R-hat" in text for text in verdict(switched).failures)

    permuted = draws.copy()
    permuted[1] = _swap_hidden_units(problem, permuted[1])
    assert np.abs(permuted[1] - draws[1]).max() > 1
    assert verdict(posterior.functions(problem, permuted)).passed


def _shift_last_bias(problem, draws, class_):
    shifted = draws.copy()
    shifted[..., -3 + class_] += 2.0
    return shifted


def _swap_hidden_units(problem, draws):
    swapped = draws.copy()
    (W, b), (V, _) = problem.model.network.layers(np.arange(draws.shape[-1]))
    for index in (W.T, b, V):
        swapped[:, index[0]], swapped[:, index[1]] = draws[:, index[1]], draws[:, index[0]]
    return swapped


def test_a_chain_of_nan_never_passes(network):
    problem, draws = network
    values = posterior.functions(problem, draws).copy()
    values[0, 10] = np.nan
    assert not verdict(values).passed


def test_low_energy_exchange_is_caught(network):
    problem, draws = network
    walk = np.cumsum(np.random.default_rng(0).normal(size=(4, 500)), axis=1)
    assert verdict(posterior.functions(problem, draws), energy=walk).failures[0].startswith("E-FMI")


def test_isotropy_of_known_covariances():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4, 1000, 50))
    assert posterior.isotropy(draws) == pytest.approx(1, abs=0.1)
    scales = np.linspace(0.1, 3, 50)
    exact = np.square(scales).sum() ** 2 / np.power(scales, 4).sum() / 50
    assert posterior.isotropy(5 + draws * scales) == pytest.approx(exact, rel=0.1)
    line = draws[..., :1] * np.ones(50)
    assert posterior.isotropy(line) == pytest.approx(1 / 50, rel=0.3)


def test_isotropy_reads_no_lower_for_few_draws_that_follow_one_another():
    found = []
    for seed in range(20):
        draws = np.random.default_rng(seed).normal(size=(4, 100, 500))
        for t in range(1, draws.shape[1]):  # an isotropic autoregression of variance 1
            draws[:, t] = 0.9 * draws[:, t - 1] + np.sqrt(1 - 0.9**2) * draws[:, t]
        found.append(posterior.isotropy(draws))
    assert np.mean(found) == pytest.approx(1, abs=0.05)
