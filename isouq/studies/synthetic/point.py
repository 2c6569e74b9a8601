"""The MAP, and what the estimates are made of: gradients, curvature and probabilities at a θ*."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special
import torch

from isouq.studies import require
from isouq.studies.synthetic.problems import Model, Problem, float64


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """The best of several MAP searches: θ* (param,) and its energy.

    `thetas` (start, param) are where every search ended, the lowest energy first.
    """

    theta: np.ndarray
    energy: float
    thetas: np.ndarray


@functools.partial(jax.jit, static_argnames="model")
def _energy_and_gradient(model: Model, z, scales, inputs, targets):
    return jax.value_and_grad(model.energy)(z, scales, inputs, targets)


def objective(problem: Problem, scales: float | None = None) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """Return z = θ/scale ↦ (energy in nats, its gradient in z), for an optimiser; `scales` stands for the prior's."""
    own = problem.model.scales()
    data = (own if scales is None else np.full_like(own, scales), problem.inputs, problem.targets)

    @float64
    def energy(z: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _energy_and_gradient(problem.model.unscaled(), z, *data)
        return float(value), np.asarray(gradient)

    return energy


def find_map(problem: Problem, *, n_starts: int = 16, seed: int = 0, max_steps: int = 5000) -> Point:
    """Minimise the energy by L-BFGS from `n_starts` draws of the prior and keep the lowest.

    Raises ValueError for fewer than one start or one step.
    """
    require.count("n_starts", n_starts)
    rng = np.random.default_rng(require.seed("seed", seed))
    return descend(problem, rng.normal(size=(n_starts, problem.model.network.n_parameters)), max_steps=max_steps)


def descend(problem: Problem, starts: np.ndarray, *, max_steps: int = 5000) -> Point:
    """Minimise the energy by L-BFGS from each of `starts` (start, param), in units of the prior's scale."""
    starts = require.numbers("starts", starts, 2, width=problem.model.network.n_parameters)
    require.count("max_steps", max_steps)
    options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "gtol": 1e-7, "ftol": 0.0, "maxcor": 30}
    search = {"jac": True, "method": "L-BFGS-B", "options": options}
    ends = [scipy.optimize.minimize(objective(problem), z, **search) for z in starts]
    ends.sort(key=lambda end: end.fun)
    thetas = np.stack([end.x for end in ends]) * problem.model.scales()
    return Point(theta=thetas[0], energy=float(ends[0].fun), thetas=thetas)


@float64
def predicted_classes(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Return the class (point,) that the estimates are about: the predicted one; 0 unless multiclass."""
    return np.asarray(problem.model.predict(problem.model.parameters(theta), problem.grid).argmax(axis=1))


@functools.partial(jax.jit, static_argnames="model")
def _gradients(model: Model, theta, inputs, classes):
    def one(example):
        x, c = example
        return jax.grad(lambda t: model.quantity(t, x[None], c[None])[0])(theta)

    return jax.lax.map(one, (inputs, classes), batch_size=64)


@float64
def gradients(problem: Problem, theta: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """g = ∇θ p(y_c|x, θ) at every grid point: (point, param)."""
    theta, classes = problem.model.parameters(theta), problem.classes(classes)
    return np.asarray(_gradients(problem.model.unscaled(), theta, problem.grid, classes))


@float64
def probabilities(problem: Problem, theta: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """p(y_c|x, θ) of the class given (or the mean) at every grid point: (point,)."""
    theta, classes = problem.model.parameters(theta), problem.classes(classes)
    return np.asarray(problem.model.quantity(theta, jnp.asarray(problem.grid), classes))


@functools.partial(jax.jit, static_argnames="model")
def _jacobian(model: Model, theta, inputs):
    return jax.vmap(jax.jacrev(model.network), (None, 0))(theta, inputs), model.network(theta, inputs)


@float64
def jacobian(problem: Problem, theta: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """∂outputs/∂θ (example, output, param) at any inputs (example, input), and the outputs (example, output)."""
    theta = problem.model.parameters(theta)
    inputs = require.numbers("inputs", inputs, 2, width=problem.model.network.n_inputs)
    J, outputs = _jacobian(problem.model.unscaled(), theta, inputs)
    return np.asarray(J), np.asarray(outputs)


@functools.partial(jax.jit, static_argnames="model")
def _curvature(model: Model, theta, inputs, targets):
    def product(vector):
        gradient = jax.grad(model.log_likelihood)
        return -jax.jvp(lambda t: gradient(t, inputs, targets), (theta,), (vector,))[1]

    return jax.lax.map(product, jnp.eye(len(theta)), batch_size=64)  # all products at once may take gigabytes


@float64
def hessian(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Hessian of the energy (param, param): of the negative log likelihood plus the prior's precision."""
    theta = problem.model.parameters(theta)
    curvature = _curvature(problem.model.unscaled(), theta, problem.inputs, problem.targets)
    return np.asarray(curvature) + np.diag(problem.model.scales() ** -2.0)


def ggn(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Generalised Gauss–Newton matrix JᵀΛJ plus the prior's precision (param, param).

    Λ is the Hessian of the negative log likelihood in the outputs: p(1−p), diag(p) − ppᵀ, or 1/noise².
    """
    model = problem.model
    J, outputs = jacobian(problem, theta, problem.inputs)
    if model.kind == "regression":
        Lambda = np.broadcast_to(1 / model.noise**2, (len(J), 1, 1))
    else:
        p = scipy.special.expit(outputs) if model.kind == "binary" else scipy.special.softmax(outputs, axis=1)
        Lambda = p[:, :, None] * (np.eye(p.shape[1]) - p[:, None, :])
    return np.einsum("ecp,ecd,edq->pq", J, Lambda, J, optimize=True) + np.diag(model.scales() ** -2.0)


def quadratic_form(g: np.ndarray, precision: np.ndarray) -> np.ndarray | None:
    """gᵀ P⁻¹ g (point,) for g (point, param), or None when P (param, param) is not positive definite."""
    precision = require.symmetric("precision", precision)
    g = require.numbers("g", g, 2, width=len(precision))
    try:
        factor = scipy.linalg.cho_factor(precision, lower=True)
    except np.linalg.LinAlgError:
        return None
    return np.einsum("ip,pi->i", g, scipy.linalg.cho_solve(factor, g.T))


def laplace(problem: Problem, theta: np.ndarray, classes: np.ndarray) -> np.ndarray | None:
    """Laplace's variance gᵀH⁻¹g at the grid (point,), or None where the energy's Hessian H is not positive definite."""
    return quadratic_form(gradients(problem, theta, classes), hessian(problem, theta))


def torch_module(model: Model, theta: np.ndarray) -> torch.nn.Sequential:
    """Return the same network as a float64 torch module that ends in its outputs, for isouq's own engines."""
    network = model.network
    activation = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[network.activation]
    modules: list[torch.nn.Module] = []
    for weight, bias in network.layers(model.parameters(theta)):
        linear = torch.nn.Linear(weight.shape[0], weight.shape[1], dtype=torch.float64)
        linear.load_state_dict({"weight": torch.tensor(weight.T), "bias": torch.tensor(bias)})
        modules += [linear, activation()]
    return torch.nn.Sequential(*modules[:-1]).eval()
