"""How an estimate of the variance gᵀΣg differs from a reference, once the unknown scale is taken out.

The *field* is log(estimate/reference) at every point minus its mean: zero everywhere when the two agree up to a factor.
Its standard deviation, the *spread*, is the size of the distortion. Its *structure* is the part that nearness to the
proxy data explains, the data from which a covariance was estimated. Unstructured error averages out over questions;
structure does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from isouq.studies import require

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """How much of a field nearness explains: R² of the fit, its mean under permutation, and the permutation's p-value.

    `beyond_chance` = (R² − mean)/(1 − mean): 0 where nearness explains what it would explain by chance, 1 where all.
    `variance`: of the field, in its units squared; of what `given` features leave over, where there were any.
    """

    explained: float
    by_chance: float
    p_value: float
    variance: float

    @property
    def beyond_chance(self) -> float:
        """R² with what chance gives taken out."""
        return (self.explained - self.by_chance) / (1 - self.by_chance)


def distortion(estimate: ArrayLike, reference: ArrayLike) -> Float[np.ndarray, " point"]:
    """Return the field log(estimate/reference) minus its mean, in nats; its standard deviation is the spread.

    The mean is the logarithm of the best common factor, in the sense of least squares of logs.

    Raises ValueError where a variance is not a positive number: zero has no ratio, NaN no meaning.
    """
    require.same_rows(estimate=estimate, reference=reference)
    ratio = log_variance("estimate", estimate) - log_variance("reference", reference)
    return ratio - ratio.mean()


def log_variance(name: str, variance: ArrayLike) -> Float[np.ndarray, " point"]:
    """Return the logarithm of a variance (point,); raises ValueError, with its name, where it is not positive."""
    variance = require.numbers(name, variance, least=2)
    if not (variance > 0).all():
        what = "negative" if (variance < 0).any() else "zero"
        raise ValueError(f"{name}: a variance is {what} at {int((variance <= 0).sum())} of {len(variance)} points")
    return np.log(variance)


def nearness(points: ArrayLike, proxies: ArrayLike) -> Float[np.ndarray, "point 2"]:
    """Return how near each point lies to the proxies: its distance to the nearest one, and a mean over all of them.

    The mean is of exp(−d²/2h²), between 0 and 1, with h the proxies' median distance from each other.
    """
    proxies = require.numbers("proxies", proxies, 2, least=2)
    points = require.numbers("points", points, 2, width=proxies.shape[1])
    between = cdist(proxies, proxies)[np.triu_indices(len(proxies), 1)]
    width = np.median(between)
    if not 0 < width < np.inf:
        raise ValueError("proxies: more than half of them coincide or lie out of reach, so nearness has no scale")
    distances = cdist(points, proxies)
    return np.stack([distances.min(1), np.exp(-0.5 * np.square(distances / width)).mean(1)], 1)


def structures(
    fields: Sequence[ArrayLike], features: ArrayLike, permutations: NDArray[np.int_], *, given: ArrayLike | None = None
) -> list[Structure]:
    """Return R² of each field's linear fit on `features`, and R² after each permutation of the field's points.

    With other features `given`, R² is partial: the share that `features` explain of what those leave over. Then the
    residuals are permuted, and fitted on `given` again (Freedman and Lane 1983).
    p = (1 + #{R²_permuted ≥ R²}) / (1 + #permutations). The permutations must preserve what the null hypothesis
    preserves: those of a map, whose neighbours are alike, are `grid_shifts`.
    The opposite edges of most maps are not, so that p of a map is too small: compare two fields of one map instead.
    A field (point,) that is zero up to rounding, or that `given` explains, has no structure: R² = 0, p = 1.
    """
    for field in fields:
        require.same_rows(field=require.numbers("field", field), features=features)
    columns = features = require.numbers("features", features, 2)
    permutations = require.numbers("permutations", permutations, 2, width=len(features)).astype(int)
    if (np.sort(permutations) != np.arange(len(features))).any():
        raise ValueError(f"permutations: rows given that are no order of the {len(features)} points, orders wanted")
    if given is not None:
        require.same_rows(features=features, given=given)
        columns = np.hstack([require.numbers("given", given, 2), features])
    basis = columns - columns.mean(0)
    if (columns == columns[0]).all(0).any() or np.linalg.matrix_rank(basis / basis.std(0)) < basis.shape[1]:
        raise ValueError("features: a constant one given, or one that follows from the others; others wanted")
    known, basis = np.split(np.linalg.qr(basis)[0], [basis.shape[1] - features.shape[1]], axis=1)
    return [_structure(field, known, basis, permutations) for field in fields]


def _structure(field: ArrayLike, known: Array, basis: Array, permutations: NDArray[np.int_]) -> Structure:
    """Fit a field on orthonormal columns, `basis` beside those `known`."""
    values = require.numbers("field", field, least=known.shape[1] + basis.shape[1] + 2)
    rest = values - values.mean()
    rest = rest - known @ (known.T @ rest)
    if rest.std() < 1e-9:
        return Structure(explained=0.0, by_chance=0.0, p_value=1.0, variance=0.0)
    variance, rest = float(rest.var()), rest / np.linalg.norm(rest)
    moved = rest.take(permutations)
    explained = float(np.square(rest @ basis).sum())
    null = np.square(moved @ basis).sum(1) / (1 - np.square(moved @ known).sum(1))
    p_value = (1 + int((null >= explained).sum())) / (1 + len(null))
    return Structure(explained=explained, by_chance=float(null.mean()), p_value=p_value, variance=variance)


def grid_shifts(shape: tuple[int, ...]) -> Int[np.ndarray, "permutation point"]:
    """Return every shift of a grid around its edges, with every mirror and, on a square, turn; neighbours stay so.

    All of them, 3,200 for 20 × 20 points, so that a p-value depends on no seed.
    """
    shape = tuple(require.count("shape", size) for size in shape)
    indices, axes = np.arange(int(np.prod(shape))).reshape(shape), range(len(shape))
    orders = list(itertools.permutations(axes)) if len(set(shape)) == 1 else [tuple(axes)]
    mirrors = [mirror for n in range(len(shape) + 1) for mirror in itertools.combinations(axes, n)]
    images = [np.flip(indices.transpose(order), mirror) for order in orders for mirror in mirrors]
    shifts = itertools.product(*(range(size) for size in shape))
    return np.array([np.roll(image, shift, axes).ravel() for shift in shifts for image in images])
