"""Point estimates against the closed form, laplace-torch and isouq's own torch engines."""

import numpy as np
import pytest
import torch
from laplace import Laplace
from scipy import stats

import isouq
from isouq.classifier import score_outputs
from isouq.studies.synthetic import point
from isouq.studies.synthetic.plan import Job

KINDS = ("binary_rings", "multiclass_spirals", "regression_nonlinear")


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    problem = Job(problem=request.param, resolution=5).make()
    best = point.find_map(problem, n_starts=6)
    return problem, best, point.predicted_classes(problem, best.theta)


def test_map_is_a_minimum_and_the_best_start(case):
    problem, best, _ = case
    scales, energy = problem.model.scales(), point.objective(problem)
    assert np.linalg.norm(energy(best.theta / scales)[1]) < 1e-4
    ends = [energy(theta / scales)[0] for theta in best.thetas]
    assert best.energy == pytest.approx(min(ends)) == pytest.approx(ends[0])
    assert np.linalg.eigvalsh(point.hessian(problem, best.theta)).min() > 0
    rng = np.random.default_rng(1)
    near = [best.theta + 1e-2 * rng.normal(size=best.theta.shape) for _ in range(20)]
    energies = [energy(theta / scales)[0] for theta in near]
    assert min(energies) > best.energy


def test_the_jacobian_and_the_hessian_are_those_of_torch(case):
    problem, best, _ = case
    network = point.torch_module(problem.model, best.theta)
    names, weights = zip(*network.named_parameters(), strict=True)
    inputs, targets = torch.tensor(problem.inputs), torch.tensor(problem.targets)

    def outputs(*weights):
        return torch.func.functional_call(network, dict(zip(names, weights, strict=True)), (inputs,))

    def loss(*weights):
        kind, z = problem.model.kind, outputs(*weights)
        if kind == "multiclass":
            return torch.nn.functional.cross_entropy(z, targets, reduction="sum")
        if kind == "binary":
            return torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], targets.double(), reduction="sum")
        return 0.5 * ((targets - z[:, 0]) / problem.model.noise).square().sum()

    # torch stores a weight as (out, in) after our (in, out)
    parts = [(W.T.ravel(), b) for W, b in problem.model.network.layers(np.arange(len(best.theta)))]
    order = np.concatenate([part for pair in parts for part in pair])
    J = torch.autograd.functional.jacobian(outputs, weights)
    theirs = torch.cat([part.flatten(2) for part in J], dim=2).numpy()
    ours, values = point.jacobian(problem, best.theta, problem.inputs)
    np.testing.assert_allclose(ours[:, :, order], theirs, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(values, outputs(*weights).detach().numpy(), rtol=1e-10, atol=1e-12)
    rows = torch.autograd.functional.hessian(loss, weights)
    theirs = torch.cat(
        [torch.cat([h.reshape(w.numel(), -1) for h in row], 1) for w, row in zip(weights, rows, strict=True)], 0
    )
    ours = point.hessian(problem, best.theta) - np.diag(problem.model.scales() ** -2.0)
    ours = ours[np.ix_(order, order)]
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-7, atol=1e-8)


def test_gradients_are_those_of_the_torch_engine(case):
    problem, best, classes = case
    network, grid = point.torch_module(problem.model, best.theta), torch.tensor(problem.grid)
    ours = np.square(point.gradients(problem, best.theta, classes)).sum(axis=1)
    if problem.model.kind == "regression":
        theirs = score_outputs(network, grid, noise_variance=problem.model.noise**2).epistemic[:, 0]
    else:
        link = "sigmoid" if problem.model.kind == "binary" else "softmax"
        scores = isouq.score_classes(network, grid, link=link)
        theirs = scores.epistemic
        p = point.probabilities(problem, best.theta, classes)
        np.testing.assert_allclose(scores.aleatoric.numpy(), p * (1 - p), rtol=1e-9)
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-9)


@pytest.mark.parametrize("case", KINDS[1:], indirect=True)  # laplace-torch has no one-logit likelihood
def test_ggn_is_that_of_laplace_torch(case):
    problem, best, _ = case
    model = problem.model
    # torch stores a weight as (out, in) after our (in, out): where each of torch's parameters is in ours
    order = np.concatenate(
        [part for W, b in model.network.layers(np.arange(len(best.theta))) for part in (W.T.ravel(), b)]
    )
    is_regression = model.kind == "regression"
    theirs = Laplace(
        point.torch_module(model, best.theta),
        "regression" if is_regression else "classification",
        subset_of_weights="all",
        hessian_structure="full",
        sigma_noise=model.noise if is_regression else 1.0,
        prior_precision=torch.tensor(model.scales()[order] ** -2.0),
    )
    targets = torch.tensor(problem.targets)
    data = torch.utils.data.TensorDataset(torch.tensor(problem.inputs), targets[:, None] if is_regression else targets)
    theirs.fit(torch.utils.data.DataLoader(data, batch_size=50))
    ours = point.ggn(problem, best.theta)[np.ix_(order, order)]
    np.testing.assert_allclose(theirs.posterior_precision.numpy(), ours, rtol=1e-6, atol=1e-8)


def test_linear_regression_has_the_closed_form():
    problem = Job(problem="regression_linear").make()
    best = point.find_map(problem, n_starts=2)
    classes = np.zeros(len(problem.grid), dtype=int)
    g = point.gradients(problem, best.theta, classes)
    design, grid = (np.hstack([x, np.ones_like(x)]) for x in (problem.inputs, problem.grid))
    covariance = np.linalg.inv(design.T @ design / problem.model.noise**2 + np.diag(problem.model.scales() ** -2.0))
    mean = covariance @ design.T @ problem.targets / problem.model.noise**2
    np.testing.assert_allclose(best.theta, mean, rtol=1e-6)
    exact = np.einsum("ip,pq,iq->i", grid, covariance, grid)
    np.testing.assert_allclose(point.laplace(problem, best.theta, classes), exact, rtol=1e-8)
    np.testing.assert_allclose(point.quadratic_form(g, point.ggn(problem, best.theta)), exact, rtol=1e-8)
    np.testing.assert_allclose(np.square(g).sum(axis=1), 1 + problem.grid[:, 0] ** 2, rtol=1e-9)


def test_laplace_is_left_out_where_the_hessian_is_not_positive_definite():
    problem = Job(problem="binary_xor", resolution=5).make()
    theta = np.random.default_rng(0).normal(size=problem.model.network.n_parameters)
    assert np.linalg.eigvalsh(point.hessian(problem, theta)).min() < 0
    classes = point.predicted_classes(problem, theta)
    assert point.laplace(problem, theta, classes) is None
    found = point.quadratic_form(point.gradients(problem, theta, classes), point.ggn(problem, theta))
    assert (found > 0).all(), "the Gauss-Newton matrix is positive definite everywhere"


def test_rescaling_a_relu_layer_changes_the_norm_and_not_the_function():
    problem = Job(problem="binary_rings", activation="relu", resolution=6).make()
    theta = np.random.default_rng(0).normal(size=problem.model.network.n_parameters)
    classes = point.predicted_classes(problem, theta)
    other = theta.copy()
    (weight, bias), (following, _) = problem.model.network.layers(other)  # views, on which chapter 02 counts
    weight *= 10
    bias *= 10
    following /= 10
    before, after = (point.probabilities(problem, t, classes) for t in (theta, other))
    np.testing.assert_allclose(after, before, rtol=1e-10)
    norms = [np.square(point.gradients(problem, t, classes)).sum(axis=1) for t in (theta, other)]
    assert np.median(norms[1] / norms[0]) > 5
    assert stats.spearmanr(*norms)[0] > 0.3
