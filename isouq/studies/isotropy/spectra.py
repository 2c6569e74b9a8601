"""Eigenvalues: in how many directions the data move a network's posterior from its prior, and where g lies.

Everything about a network is in units of its prior, z = θ/s with s the prior's standard deviations. The prior's
precision is then 1 in every direction, and at a curvature of 1 the data say as much as the prior does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh

from isouq.studies import require
from isouq.studies.isotropy import covariance
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
    require.one_of("problem", problem.model.kind, ("binary", "multiclass"))
    require.number("target_loss", target_loss), require.number("step_size", step_size, 0.0)
    energy, scales = point.objective(problem), problem.model.scales()
    z = torch.tensor(np.random.default_rng([problem.seed, 7]).normal(size=len(scales)))
    optimiser = torch.optim.Adam([z], lr=step_size)
    for _ in range(MAX_STEPS):
        value, gradient = energy(z.numpy())  # the loss is the energy without the prior's ½‖z‖²
        loss = (value - 0.5 * float(z @ z)) / len(problem.inputs)
        if loss <= target_loss:
            return z.numpy() * scales
        z.grad = (torch.tensor(gradient) - z) / len(problem.inputs)
        optimiser.step()
    raise ValueError(f"{problem.name}: loss {loss:.3f} after {MAX_STEPS} steps, {target_loss} wanted")


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
    J, logits = point.jacobian(problem, theta, problem.inputs)
    ggn = covariance.from_rows(covariance.fisher_rows(J * scales, logits), n_examples=n)  # for a softmax Fisher = GGN
    values = ggn.eigenvalues * n
    damping = 1 / n  # the prior's precision over n
    dense = len(theta) <= largest_dense
    hessian = np.linalg.eigvalsh(hessian_in_prior_units(problem, theta)) if dense else None
    return Spectrum(
        width=problem.model.network.width,
        seed=problem.seed,
        n_parameters=len(theta),
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
    scales = problem.model.scales()
    return point.curvature(problem, theta, np.diag(scales)) * scales


def count_outliers(problem: Problem, theta: Array, *, start: int = 16) -> int:
    """Count the Hessian's eigenvalues above 1 in size by Lanczos, for networks whose Hessian does not fit."""
    theta, scales, k = problem.model.parameters(theta), problem.model.scales(), require.count("start", start)
    n = len(theta)

    def product(z: Array) -> Array:
        return point.curvature(problem, theta, (scales * z.ravel())[None])[0] * scales

    while k < n - 1:
        operator = LinearOperator((n, n), matvec=product, dtype=float)
        values = eigsh(operator, k=k, which="LM", return_eigenvectors=False, tol=1e-3, v0=np.ones(n))
        if np.abs(values).min() <= 1:
            return int((np.abs(values) > 1).sum())
        k *= 2
    raise ValueError(f"{problem.name}: more than half of {n} eigenvalues exceed 1 in size")
