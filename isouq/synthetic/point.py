"""Everything that one point estimate gives: MAP, ‖g‖², the Laplace family and p(1−p)."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.optimize
import torch

from isouq.synthetic.problems import Model, Problem, float64


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """The best of several MAP searches: θ* (param,), its energy, and how the searches ended."""

    theta: np.ndarray
    energy: float
    gradient_norm: float
    energies: np.ndarray  # of every start, sorted


@functools.partial(jax.jit, static_argnames="model")
def _energy_and_gradient(model: Model, z, inputs, targets):
    scales = model.scales()
    return jax.value_and_grad(lambda z: model.energy(scales * z, inputs, targets))(z)


@float64
def find_map(problem: Problem, *, n_starts: int = 16, seed: int = 0, max_steps: int = 5000) -> Point:
    """Minimise the energy by L-BFGS from `n_starts` draws of the prior and keep the lowest.

    The gradient norm is in units of the prior's scale: ‖∂E/∂z‖ with θ = scale · z.
    """
    model, rng = problem.model, np.random.default_rng(seed)
    inputs, targets = jnp.asarray(problem.inputs), jnp.asarray(problem.targets)

    def objective(z):
        value, gradient = _energy_and_gradient(model, z, inputs, targets)
        return float(value), np.asarray(gradient)

    options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "gtol": 1e-7, "ftol": 0.0, "maxcor": 30}
    starts = rng.normal(size=(n_starts, model.network.n_parameters))
    search = {"jac": True, "method": "L-BFGS-B", "options": options}
    ends = [scipy.optimize.minimize(objective, z, **search) for z in starts]
    best = min(ends, key=lambda end: end.fun)
    return Point(
        theta=best.x * model.scales(),
        energy=float(best.fun),
        gradient_norm=float(np.linalg.norm(best.jac)),
        energies=np.sort([end.fun for end in ends]),
    )


@float64
def predicted_classes(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Return the class (point,) that the estimates are about: the predicted one; 0 unless multiclass."""
    return np.asarray(problem.model.predict(theta, problem.grid).argmax(axis=1))


@functools.partial(jax.jit, static_argnames="model")
def _gradients(model: Model, theta, inputs, classes):
    def one(example):
        x, c = example
        return jax.grad(lambda t: model.quantity(t, x[None], c[None])[0])(theta)

    return jax.lax.map(one, (inputs, classes), batch_size=64)


@float64
def gradients(problem: Problem, theta: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """g = ∇θ p(y_c|x, θ) at every grid point: (point, param)."""
    return np.asarray(_gradients(problem.model, theta, problem.grid, classes))


@float64
def probabilities(problem: Problem, theta: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """p(y_c|x, θ) of the class given (or the mean) at every grid point: (point,)."""
    return np.asarray(problem.model.quantity(theta, jnp.asarray(problem.grid), classes))


@functools.partial(jax.jit, static_argnames="model")
def _hessian(model: Model, theta, inputs, targets):
    return jax.hessian(model.energy, argnums=0)(theta, inputs, targets)


@float64
def hessian(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Hessian of the energy (param, param): of the negative log likelihood plus the prior's precision."""
    return np.asarray(_hessian(problem.model, theta, problem.inputs, problem.targets))


@float64
def ggn(problem: Problem, theta: np.ndarray) -> np.ndarray:
    """Generalised Gauss–Newton matrix JᵀΛJ plus the prior's precision (param, param).

    Λ is the Hessian of the negative log likelihood in the outputs: p(1−p), diag(p) − ppᵀ, or 1/noise².
    """
    model = problem.model
    J = np.asarray(jax.jacrev(model.network)(theta, jnp.asarray(problem.inputs)))
    if model.kind == "regression":
        curvature = np.broadcast_to(1 / model.noise**2, (len(J), 1, 1))
    else:
        p = np.asarray(model.predict(theta, jnp.asarray(problem.inputs)))
        curvature = p[:, :, None] * (np.eye(p.shape[1]) - p[:, None, :])
    return np.einsum("ecp,ecd,edq->pq", J, curvature, J, optimize=True) + np.diag(model.scales() ** -2.0)


def quadratic_form(g: np.ndarray, precision: np.ndarray) -> np.ndarray | None:
    """gᵀ P⁻¹ g (point,) for g (point, param), or None when P (param, param) is not positive definite."""
    try:
        factor = scipy.linalg.cho_factor(precision, lower=True)
    except np.linalg.LinAlgError:
        return None
    return np.einsum("ip,pi->i", g, scipy.linalg.cho_solve(factor, g.T))


def estimates(problem: Problem, theta: np.ndarray, classes: np.ndarray) -> dict[str, np.ndarray]:
    """Return every point estimate of Var_θ[p] at the grid (point,), by name; what does not exist is left out.

    gn: ‖g‖² (up to σ²); la: gᵀH⁻¹g; la_diag: with the diagonal of H only; la_last: over the last layer's
    parameters only; ggn: gᵀ(GGN + prior)⁻¹g; aleatoric: p(1−p), not for a regression.
    """
    g, H = gradients(problem, theta, classes), hessian(problem, theta)
    fan_in, fan_out = problem.model.network.shapes[-1]
    last = slice(len(theta) - (fan_in + 1) * fan_out, None)
    diagonal = np.diag(H)
    found = {
        "gn": np.square(g).sum(axis=1),
        "la": quadratic_form(g, H),
        "la_diag": np.square(g) @ (1 / diagonal) if (diagonal > 0).all() else None,
        "la_last": quadratic_form(g[:, last], H[last, last]),
        "ggn": quadratic_form(g, ggn(problem, theta)),
    }
    if problem.model.kind != "regression":
        p = probabilities(problem, theta, classes)
        found["aleatoric"] = p * (1 - p)
    return {name: value for name, value in found.items() if value is not None}


def torch_module(model: Model, theta: np.ndarray) -> torch.nn.Sequential:
    """Return the same network as a float64 torch module, for isouq's own engines.

    A binary network's one logit f becomes the two logits (0, f), which give the same probabilities.
    """
    network = model.network
    activation = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[network.activation]
    modules: list[torch.nn.Module] = []
    for weight, bias in network.layers(np.asarray(theta)):
        linear = torch.nn.Linear(*weight.shape, dtype=torch.float64)
        linear.load_state_dict({"weight": torch.tensor(weight.T), "bias": torch.tensor(bias)})
        modules += [linear, activation()]
    modules[-1] = torch.nn.ZeroPad1d((1, 0)) if model.kind == "binary" else torch.nn.Identity()
    return torch.nn.Sequential(*modules).eval()
