"""KFAC and EK-FAC: exact where theory says so."""

import numpy as np
import pytest

from isouq.studies.isotropy import covariance, kronecker
from isouq.studies.synthetic import point, problems


def small(name: str):
    problem = problems.make(name, seed=900, n_examples=12, resolution=4)
    theta = np.random.default_rng(0).normal(size=problem.model.network.n_parameters)
    return problem, theta, point.gradients(problem, theta, point.predicted_classes(problem, theta))


def fisher(problem, theta, inputs):
    rows = covariance.fisher_rows(*point.jacobian(problem, theta, inputs))
    return rows.T @ rows / len(inputs)


@pytest.mark.parametrize("kind", kronecker.KINDS)
def test_one_example_of_one_logit_has_the_fishers_own_blocks(kind):
    """Its block of a layer is p(1−p) aaᵀ ⊗ bbᵀ: one Kronecker product, which either factorisation keeps whole."""
    problem, theta, g = small("binary_moons")
    F, one = fisher(problem, theta, problem.inputs[:1]), problem.inputs[:1]
    split = (2 + 1) * problem.model.network.width
    F[:split, split:] = F[split:, :split] = 0
    expected = point.quadratic_form(g, F + 0.05 * np.eye(len(F)))
    found = kronecker.fit(problem, theta, one, kind).quadratic_form(g, damping=0.05)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("name", ["binary_moons", "multiclass_blobs"])
def test_ekfac_has_the_fishers_trace(name):
    problem, theta, _ = small(name)
    n, large = len(theta), 1e6
    kept = kronecker.fit(problem, theta, problem.inputs, "ekfac").quadratic_form(np.eye(n), damping=large)
    trace = ((1 - large * kept) * large).sum()  # (λ + F)⁻¹ ≈ 1/λ − F/λ²
    assert trace == pytest.approx(np.trace(fisher(problem, theta, problem.inputs)), rel=1e-3)


@pytest.mark.parametrize("kind", kronecker.KINDS)
def test_large_damping_leaves_isotropy(kind):
    problem, theta, g = small("multiclass_blobs")
    form = kronecker.fit(problem, theta, problem.inputs, kind).quadratic_form(g, damping=1e9)
    np.testing.assert_allclose(1e9 * form, np.square(g).sum(1), rtol=1e-6)


def test_an_unknown_kind_is_refused():
    problem, theta, _ = small("binary_moons")
    with pytest.raises(ValueError, match="did you mean 'kfac'"):
        kronecker.fit(problem, theta, problem.inputs, "kfca")
