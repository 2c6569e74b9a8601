"""Eigenvalues: in how many directions the data move a network's posterior from its prior, and where g lies.

Everything about a network is in units of its prior, z = θ/s with s the prior's standard deviations. The prior's
precision is then 1 in every direction, and at a curvature of 1 the data say as much as the prior does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import integrate
from scipy.sparse.linalg import eigsh
from torch import nn

from isouq.studies import require
from isouq.studies.isotropy import covariance
from isouq.studies.isotropy.networks import jacobian, outputs
from isouq.studies.synthetic import point, problems
from isouq.studies.synthetic.problems import Problem

Array = NDArray[np.float64]
TARGET_LOSS = 0.2  # nats an example: well below the ln 2 or ln 3 of a guess
MAX_STEPS = 5000


def train(problem: Problem, *, target_loss: float = TARGET_LOSS, step_size: float = 0.03) -> Array:
    """Return θ (param,) after Adam on all data from a draw of the prior, stopped where the mean loss is on target.

    This is not the MAP: under a Gaussian prior a wide network's mode puts every hidden unit at zero, which no training
    does. Raises ValueError when the target is not reached.
    """
    require.number("target_loss", target_loss), require.number("step_size", step_size, 0.0)
    scales = torch.tensor(problem.model.scales())
    start = np.random.default_rng([problem.seed, 7]).normal(size=len(scales))
    z = torch.tensor(start, requires_grad=True)
    total_loss, optimiser = _total_loss(problem), torch.optim.Adam([z], lr=step_size)
    for _ in range(MAX_STEPS):
        loss = total_loss(z) / len(problem.inputs)
        if float(loss.detach()) <= target_loss:
            return (z * scales).detach().numpy()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    raise ValueError(f"{problem.name}: loss {float(loss.detach()):.3f} after {MAX_STEPS} steps, {target_loss} wanted")


class _InPriorUnits(nn.Module):
    """The problem's network as a function of z = θ/s, one flat parameter."""

    def __init__(self, problem: Problem, z: ArrayLike) -> None:
        super().__init__()
        require.one_of("problem", problem.model.kind, ("binary", "multiclass"))
        self.network = problem.model.network
        self.scales = torch.tensor(problem.model.scales())
        self.z = nn.Parameter(torch.as_tensor(z))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The logits (example, class)."""
        return outputs(self.network, self.z * self.scales, inputs)


def _in_torch(problem: Problem, z: ArrayLike) -> tuple[_InPriorUnits, nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Return the network at z, its summed negative log-likelihood in nats, and the data (inputs, targets)."""
    inputs, targets = torch.tensor(problem.inputs), torch.tensor(problem.targets)
    if problem.model.kind == "binary":
        loss: nn.Module = nn.BCEWithLogitsLoss(reduction="sum")
        return _InPriorUnits(problem, z), loss, (inputs, targets.double()[:, None])
    return _InPriorUnits(problem, z), nn.CrossEntropyLoss(reduction="sum"), (inputs, targets)


def _total_loss(problem: Problem) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the loss of `_in_torch` as a function of z."""
    model, loss, (inputs, targets) = _in_torch(problem, np.zeros(len(problem.model.scales())))
    return lambda z: loss(torch.func.functional_call(model, {"z": z}, (inputs,)), targets)


@dataclass(frozen=True, eq=False, kw_only=True)
class Spectrum:
    """Curvature of one trained network in units of its prior.

    ggn: the GGN's eigenvalues other than 0. hessian: all eigenvalues of the Hessian, or None where it is too large.
    n_outliers: how many of the Hessian's eigenvalues exceed 1 in size. retained (point,): gᵀΣg/gᵀΣ₀g, the share of
    the prior variance that the data leave under Laplace with the GGN. bulk (point,): the share of ‖g‖² in directions
    where the GGN is below 1. near (point,): whether data lie there.
    """

    width: int
    seed: int
    n_parameters: int
    ggn: Array
    hessian: NDArray[Any] | None
    n_outliers: int
    retained: Array
    bulk: Array
    near: NDArray[np.bool_]


def spectrum(problem: Problem, *, largest_dense: int = 5000) -> Spectrum:
    """Train and compute GGN and shares exactly; the Hessian's eigenvalues only up to `largest_dense` parameters."""
    require.count("largest_dense", largest_dense, 0)
    theta, scales, n = train(problem), problem.model.scales(), len(problem.inputs)
    g = point.gradients(problem, theta, point.predicted_classes(problem, theta)) * scales
    jac, logits = jacobian(problem, theta, problem.inputs)
    ggn = covariance.from_rows(covariance.fisher_rows(jac * scales, logits), "ggn", n_examples=n)  # Fisher = GGN here
    values = ggn.eigenvalues * n
    damping = 1 / n  # the prior's precision over n
    dense = problem.model.network.n_parameters <= largest_dense
    hessian = np.linalg.eigvalsh(hessian_in_prior_units(problem, theta)) if dense else None
    return Spectrum(
        width=problem.model.network.width,
        seed=problem.seed,
        n_parameters=problem.model.network.n_parameters,
        ggn=values[values > 1e-9 * values.max()],
        hessian=hessian,
        n_outliers=int((np.abs(hessian) > 1).sum()) if hessian is not None else count_outliers(problem, theta),
        retained=damping * ggn.quadratic_form(g, damping=damping) / np.square(g).sum(1),
        bulk=ggn.share_below(g, damping),
        near=problem.near_data(),
    )


def widths(problem_name: str, seeds: Sequence[int], sizes: Sequence[int], **options: int) -> list[Spectrum]:
    """Return the `spectrum` of every width and data seed."""
    spectra = []
    for width in sizes:
        model = problems.SPECS[problem_name].model
        model = replace(model, network=replace(model.network, width=width))
        spectra += [spectrum(problems.make(problem_name, seed=seed, model=model), **options) for seed in seeds]
    return spectra


def hessian_in_prior_units(problem: Problem, theta: Array) -> Array:
    """Return the Hessian of the summed negative log-likelihood in z (param, param)."""
    gradient, theta = torch.func.grad(_total_loss(problem)), problem.model.parameters(theta)
    rows = torch.func.jacrev(gradient, chunk_size=64)  # all rows at once would take gigabytes
    return rows(torch.tensor(theta / problem.model.scales())).numpy()


def _operator(problem: Problem, theta: Array) -> Any:
    from curvlinops import HessianLinearOperator  # of the extra `peers`; only large networks need it

    z = problem.model.parameters(theta) / problem.model.scales()
    model, loss, batch = _in_torch(problem, z)
    return HessianLinearOperator(model, loss, [model.z], [batch])


def count_outliers(problem: Problem, theta: Array, *, start: int = 16) -> int:
    """Count the Hessian's eigenvalues above 1 in size by Lanczos, for networks whose Hessian does not fit."""
    operator, k = _operator(problem, theta).to_scipy(), require.count("start", start)
    while k < operator.shape[0] - 1:
        values = eigsh(operator, k=k, which="LM", return_eigenvectors=False, tol=1e-3, v0=np.ones(operator.shape[0]))
        if np.abs(values).min() <= 1:
            return int((np.abs(values) > 1).sum())
        k *= 2
    raise ValueError(f"{problem.name}: more than half of {operator.shape[0]} eigenvalues exceed 1 in size")


def lanczos_density(problem: Problem, theta: Array, *, n_steps: int = 64, n_repeats: int = 4) -> tuple[Array, Array]:
    """Return (grid, density): the Hessian's spectral density by stochastic Lanczos quadrature (Papyan 2020)."""
    from curvlinops import lanczos_approximate_spectrum

    require.count("n_steps", n_steps), require.count("n_repeats", n_repeats)
    operator = _operator(problem, theta)
    options = {"k": 1, "return_eigenvectors": False, "tol": 1e-3, "v0": np.ones(operator.shape[0])}
    ends = tuple(float(eigsh(operator.to_scipy(), which=which, **options)[0]) for which in ("SA", "LA"))
    with torch.random.fork_rng():
        torch.manual_seed(problem.seed)
        grid, density = lanczos_approximate_spectrum(operator, n_steps, num_repeats=n_repeats, boundaries=ends)
    return np.asarray(grid), np.asarray(density)


def effective_rank(eigenvalues: ArrayLike) -> float:
    """Return (Σe)²/Σe², the participation ratio: k where k eigenvalues are equal and the rest zero."""
    values = require.numbers("eigenvalues", eigenvalues)
    if not ((values >= 0).all() and values.any()):
        raise ValueError(f"eigenvalues: {values.min():g} to {values.max():g} given, at least 0 and not all 0 wanted")
    return require.number("eigenvalues: their rank", values.sum() ** 2 / np.square(values).sum())


@dataclass(frozen=True, kw_only=True)
class MarchenkoPastur:
    """The law that eigenvalues of an n×n Gram of random rows in d dimensions follow, fitted to the bulk.

    scale: their mean; ratio = n/d; n_outliers: eigenvalues above the law's edge, scale(1 + √ratio)²; distance: the
    largest difference of the bulk's distribution function from the law's (Kolmogorov), 0 for a perfect fit.
    """

    scale: float
    ratio: float
    n_outliers: int
    distance: float

    @property
    def edges(self) -> tuple[float, float]:
        """Where the law begins and ends."""
        return self.scale * (1 - self.ratio**0.5) ** 2, self.scale * (1 + self.ratio**0.5) ** 2

    def density(self, x: Array) -> Array:
        """The law's density at x > 0."""
        low, high = self.edges
        inside = np.sqrt(np.clip((high - x) * (x - low), 0, None))
        return inside / (2 * np.pi * self.scale * self.ratio * x)


def marchenko_pastur(eigenvalues: ArrayLike) -> MarchenkoPastur:
    """Fit by moments (mean = scale, variance = ratio·scale²), setting aside what lies above the edge.

    For n ≤ d. Raises ValueError for fewer than 10 eigenvalues, or for a spread that no n ≤ d explains.
    """
    effective_rank(eigenvalues)
    bulk = values = np.sort(require.numbers("eigenvalues", eigenvalues))
    for _ in range(len(values)):
        if len(bulk) < 10:
            raise ValueError(f"eigenvalues: {len(bulk)} of {len(values)} left below the edge, at least 10 wanted")
        scale, ratio = bulk.mean(), bulk.var() / bulk.mean() ** 2
        keep = bulk[bulk <= scale * (1 + ratio**0.5) ** 2 * 1.05]  # the edge itself fluctuates
        if len(keep) == len(bulk):
            break
        bulk = keep
    if ratio > 1:
        raise ValueError(f"eigenvalues: a variance of {ratio:.2f} times the squared mean, at most 1 wanted")
    fit = MarchenkoPastur(scale=float(scale), ratio=float(ratio), n_outliers=len(values) - len(bulk), distance=0.0)
    grid = np.linspace(*fit.edges, 2000)[1:-1]
    law = integrate.cumulative_trapezoid(fit.density(grid), grid, initial=0)
    expected = np.interp(bulk, grid, law / law[-1])
    steps = np.arange(len(bulk) + 1) / len(bulk)
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    return replace(fit, distance=float(distance))
