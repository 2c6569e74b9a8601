"""Every covariance against its definition, written out; every matrix under its own name; errors by name."""

import numpy as np
import pytest
import torch
from torch import nn

from isouq.studies.isotropy import covariance
from isouq.studies.isotropy.covariance import Products

N, C, P = 12, 3, 20
DAMPINGS = (1e-3, 0.1, 10.0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def net(rng):
    """(jacobian, logits) of a random model with N examples and C classes."""
    return rng.normal(size=(N, C, P)), rng.normal(size=(N, C))


@pytest.fixture
def queries(rng):
    return rng.normal(size=(7, P))


def by_inverse(matrix, g, damping):
    return np.einsum("qp,pr,qr->q", g, np.linalg.inv(matrix + damping * np.eye(len(matrix))), g)


def fisher(jacobian, logits):
    return covariance.from_rows(covariance.fisher_rows(jacobian, logits), n_examples=len(logits))


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("n", [1, 5, P - 1, P, 3 * P])
def test_fewer_and_more_rows_than_parameters_equal_the_dense_inverse(rng, queries, n, damping):
    rows = rng.normal(size=(n, P))
    built = covariance.from_rows(rows)
    expected = by_inverse(rows.T @ rows / n, queries, damping)
    np.testing.assert_allclose(built.quadratic_form(queries, damping=damping), expected, rtol=1e-9)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("n", [5, 3 * P])
def test_inner_products_alone_equal_the_dense_inverse(rng, queries, n, damping):
    rows = rng.normal(size=(n, P))
    built = covariance.from_products(rows @ rows.T)
    products = Products(np.square(queries).sum(1), queries @ rows.T)
    expected = by_inverse(rows.T @ rows / n, queries, damping)
    np.testing.assert_allclose(built.quadratic_form(products, damping=damping), expected, rtol=1e-8)


def test_scores_and_fisher_are_what_autograd_says(rng):
    """For a model that is linear in its parameters the Hessian is the GGN, which a softmax shares with the Fisher."""
    inputs, labels = torch.tensor(rng.normal(size=(N, 4))), torch.tensor(rng.integers(0, C, N))

    def loss(weights, rows=slice(None)):
        return nn.functional.cross_entropy(inputs[rows] @ weights.reshape(4, C), labels[rows])

    weights = torch.tensor(rng.normal(size=4 * C), requires_grad=True)
    logits = (inputs @ weights.reshape(4, C)).detach().numpy()
    jacobian = np.einsum("ni,cd->ncid", inputs.numpy(), np.eye(C)).reshape(N, C, 4 * C)
    each = [-torch.autograd.grad(loss(weights, slice(i, i + 1)), weights)[0].numpy() for i in range(N)]
    np.testing.assert_allclose(covariance.scores(jacobian, logits, labels.numpy()), each, rtol=1e-9, atol=1e-12)
    hessian = torch.autograd.functional.hessian(loss, weights.detach()).numpy()
    rows = covariance.fisher_rows(jacobian, logits)
    np.testing.assert_allclose(rows.T @ rows / N, hessian, rtol=1e-9, atol=1e-12)
    observed = covariance.scores(jacobian, logits, labels.numpy())
    assert np.abs(observed.T @ observed / N - hessian).max() > 0.01, "the empirical Fisher is neither"


def test_one_logit_is_that_of_class_one_of_two(rng, queries):
    jacobian, logits = rng.normal(size=(N, 1, P)), rng.normal(size=(N, 1))
    labels = rng.integers(0, 2, N)
    p = 1 / (1 + np.exp(-logits[:, 0]))
    expected = (labels - p)[:, None] * jacobian[:, 0]
    np.testing.assert_allclose(covariance.scores(jacobian, logits, labels), expected, rtol=1e-12)
    weighted = np.sqrt(p * (1 - p))[:, None] * jacobian[:, 0]
    expected = by_inverse(weighted.T @ weighted / N, queries, 0.1)
    np.testing.assert_allclose(fisher(jacobian, logits).quadratic_form(queries, damping=0.1), expected)


def test_large_damping_leaves_the_squared_norm(net, queries):
    damped = 1e9 * fisher(*net).quadratic_form(queries, damping=1e9)
    np.testing.assert_allclose(damped, np.square(queries).sum(1), rtol=1e-6)


def test_more_curvature_never_raises_the_variance(net, queries):
    rows = covariance.fisher_rows(*net)
    forms = [covariance.from_rows(k**0.5 * rows).quadratic_form(queries, damping=0.1) for k in (0.0, 0.5, 1.0)]
    assert (forms[0] >= forms[1]).all()
    assert (forms[1] >= forms[2]).all()
    assert (forms[2] > 0).all()


def test_a_form_lost_in_rounding_is_an_error(rng):
    """A query inside the proxies' span at a damping far below the precision of its products."""
    rows = 1e3 * rng.normal(size=(4, P))
    gram = (rows @ rows.T).astype(np.float32)
    products = Products(np.diag(gram).astype(np.float64) * (1 - 1e-5), gram.astype(np.float64))
    with pytest.raises(ValueError, match="lost in the rounding"):
        covariance.from_products(gram).quadratic_form(products, damping=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda j, z: covariance.scores(j, z, np.full(N, C)), "labels: 3 to 3 given, classes 0 to 2"),
        (lambda j, z: fisher(j, z[:, :2]), "jacobian and logits: shapes"),
        (lambda j, z: covariance.from_products(-np.eye(3)), "negative"),
        (lambda j, z: fisher(j, z).quadratic_form(np.full((2, P), np.nan), damping=1.0), "g: NaN"),
        (lambda j, z: fisher(j, z).quadratic_form(np.ones((2, P)), damping=0.0), "damping: 0.0 given"),
        (lambda j, z: fisher(j, z).quadratic_form(np.ones((2, P)), damping=-1.0), "damping: -1.0"),
        (lambda j, z: fisher(j, z).quadratic_form(np.ones((2, P + 1)), damping=1.0), "g: shape"),
        (lambda j, z: Products(-np.ones(2), np.ones((2, 3))), "squares: negative"),
        (lambda j, z: Products(np.ones(2), np.full((2, 3), np.nan)), "with_rows: NaN"),
        (
            lambda j, z: covariance.from_products(np.eye(4)).quadratic_form(
                Products(np.ones(2), np.ones((2, 3))), damping=1.0
            ),
            "with 3 rows given, 4 wanted",
        ),
    ],
)
def test_what_is_wrong_is_named(net, call, message):
    with pytest.raises(ValueError, match=message):
        call(*net)


def test_a_covariance_built_from_products_takes_no_gradients():
    with pytest.raises(TypeError, match="give Products"):
        covariance.from_products(np.eye(4)).quadratic_form(np.ones((2, P)), damping=1.0)


@pytest.mark.parametrize("n", [5, 3 * P])
def test_share_below_a_threshold_is_that_of_the_eigenvectors(rng, queries, n):
    rows = rng.normal(size=(n, P)) * np.geomspace(0.1, 3, P)
    values, vectors = np.linalg.eigh(rows.T @ rows / n)
    threshold = values[-4:-2].mean()  # between two eigenvalues: at one, rounding would decide on which side it lies
    expected = np.square(queries @ vectors[:, values < threshold]).sum(1) / np.square(queries).sum(1)
    built = covariance.from_rows(rows)
    np.testing.assert_allclose(built.share_below(queries, threshold), expected, rtol=1e-9)
    assert (built.share_below(queries, 2 * values[-1]) > 1 - 1e-12).all()
