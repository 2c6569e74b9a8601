"""Covariances of the parameters, and the uncertainty gᵀΣg that each of them gives (paper, delta method).

Every curvature F is an average over n examples, and the covariance is its damped inverse,

    Σ(λ) = (λI + F)⁻¹.

With a prior of precision α and n examples, n⁻¹ Σ(α/n) is the Laplace posterior; the factor n⁻¹ is left open, as σ² is.
Three matrices that are often mixed up keep their own names (Kunstner et al. 2019, arXiv 1905.12558):

    empirical_fisher   mean_i ∇log p(yᵢ|xᵢ) ∇log p(yᵢ|xᵢ)ᵀ          yᵢ the label that was observed
    fisher             mean_i E_y[∇log p(y|xᵢ) ∇log p(y|xᵢ)ᵀ]       y the model's own label, y ~ p(·|xᵢ)
    ggn                mean_i Jᵢᵀ Λᵢ Jᵢ                              Λᵢ the loss's Hessian in the logits

with Jᵢ = ∂logits/∂θ. For a softmax the last two are equal, so the GGN has no function here. The first is neither of
them, not even at the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from isouq.studies import require

Array = NDArray[np.float64]
ROUNDING = 1e-12  # of the largest eigenvalue: below it an eigenvalue computed in float64 is not told from zero


class SingularCovarianceError(ValueError):
    """λI + F has no inverse, or none that is a covariance; the message says which damping λ gives one."""


@dataclass(frozen=True, eq=False)
class Products:
    """Gradients too large to hold, known by their inner products: ‖g‖² (query,) and g·xᵢ (query, row).

    The rows xᵢ are those that the covariance was built from, in the same order.
    """

    squares: Float[np.ndarray, " query"]
    with_rows: Float[np.ndarray, "query row"]

    def __post_init__(self) -> None:
        require.same_rows(squares=require.numbers("squares", self.squares), with_rows=self.with_rows)
        require.numbers("with_rows", self.with_rows, 2)
        if (self.squares < 0).any():
            raise ValueError("squares: negative ones given, squared norms wanted")


@dataclass(frozen=True, eq=False, kw_only=True)
class Diagonal:
    """The diagonal of F, (param,): Σ = diag(1/(λ + Fₚₚ))."""

    kind: str
    diagonal: Float[np.ndarray, " param"]

    def quadratic_form(self, g: ArrayLike | Products, *, damping: float = 0.0) -> Array:
        """Σₚ gₚ²/(λ + Fₚₚ)."""
        precision = _damped(self.kind, self.diagonal, damping)
        return np.square(_gradients(g, len(precision))) @ (1 / precision)


@dataclass(frozen=True, eq=False, kw_only=True)
class Dense:
    """F by its eigenvalues (ascending) and eigenvectors (columns), for small networks."""

    kind: str
    eigenvalues: Float[np.ndarray, " param"]
    eigenvectors: Float[np.ndarray, "param param"]

    def quadratic_form(self, g: ArrayLike | Products, *, damping: float = 0.0) -> Array:
        """Σₖ (vₖ·g)² / (λ + eₖ)."""
        coordinates = np.square(_gradients(g, len(self.eigenvalues)) @ self.eigenvectors)
        return coordinates @ (1 / _damped(self.kind, self.eigenvalues, damping))

    def share_below(self, g: ArrayLike | Products, threshold: float) -> Array:
        """The share of ‖g‖² in directions whose eigenvalue is below `threshold`: (query,) between 0 and 1."""
        g = _gradients(g, len(self.eigenvalues))
        below = self.eigenvectors[:, self.eigenvalues < require.number("threshold", threshold)]
        return np.square(g @ below).sum(1) / _nonzero(np.square(g).sum(1))


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank:
    """F = XᵀX/n from fewer rows than parameters, inverted in the space of the rows (Woodbury).

    gᵀ(λI + F)⁻¹g = (‖g‖² − (Xg)ᵀ(nλI + XXᵀ)⁻¹(Xg)) / λ needs only inner products: F is never formed, and
    neither X nor g has to fit in memory. `eigenvalues` and `eigenvectors` are those of XXᵀ/n: the former are F's,
    zeros apart.
    """

    kind: str
    n_examples: int
    eigenvalues: Float[np.ndarray, " row"]
    eigenvectors: Float[np.ndarray, "row row"]
    rows: Float[np.ndarray, "row param"] | None = None

    def quadratic_form(self, g: ArrayLike | Products, *, damping: float = 0.0) -> Array:
        """The form above. Raises SingularCovarianceError at damping 0, and where rounding leaves no positive number."""
        if not _nonnegative(damping):
            why = f"{len(self.eigenvalues)} rows cannot make a matrix over all parameters invertible"
            raise SingularCovarianceError(f"{self.kind}: {why}; give a damping above 0")
        g = self._products(g)
        inside = np.square(g.with_rows @ self.eigenvectors) / self.n_examples
        form = (g.squares - inside @ (1 / (damping + self.eigenvalues))) / damping
        if not (form > 0)[g.squares > 0].all():
            why = f"gᵀΣg is lost in the rounding of the inner products at damping {damping:.1e}; give a larger one"
            raise SingularCovarianceError(f"{self.kind}: {why} (largest eigenvalue {self.eigenvalues.max():.1e})")
        return form

    def share_below(self, g: ArrayLike | Products, threshold: float) -> Array:
        """The share of ‖g‖² in directions whose eigenvalue is below `threshold`, most of them exactly 0."""
        g, above = self._products(g), self.eigenvalues >= require.number("threshold", threshold, 0.0)
        inside = np.square(g.with_rows @ self.eigenvectors[:, above]) / (self.n_examples * self.eigenvalues[above])
        return (1 - inside.sum(1) / _nonzero(g.squares)).clip(min=0)

    def _products(self, g: ArrayLike | Products) -> Products:
        if not isinstance(g, Products):
            if self.rows is None:
                raise TypeError("g: gradients given to a covariance that was built from products; give Products")
            g = _gradients(g, self.rows.shape[1])
            g = Products(np.square(g).sum(1), g @ self.rows.T)
        if g.with_rows.shape[1] != len(self.eigenvalues):
            raise ValueError(f"products: with {g.with_rows.shape[1]} rows given, {len(self.eigenvalues)} wanted")
        return g


Covariance = Diagonal | Dense | LowRank
"""Each has `quadratic_form(g, damping=λ)`: gᵀΣ(λ)g (query,) for gradients g (query, param).

It raises SingularCovarianceError where Σ(λ) does not exist, and ValueError for wrong arguments.
"""


def from_rows(rows: ArrayLike, kind: str, *, n_examples: int | None = None) -> Dense | LowRank:
    """F = XᵀX/n from its rows X (row, param), dense or by Woodbury, whichever is the smaller system.

    n is the number of rows unless `n_examples` says otherwise (a Fisher has a row per example and class).
    """
    rows = _gradients(rows, name="rows")
    n = len(rows) if n_examples is None else require.count("n_examples", n_examples)
    if len(rows) < rows.shape[1]:
        values, vectors = _eigen(rows @ rows.T / n, kind)
        return LowRank(kind=kind, n_examples=n, eigenvalues=values, eigenvectors=vectors, rows=rows)
    values, vectors = _eigen(rows.T @ rows / n, kind)
    return Dense(kind=kind, eigenvalues=_without_rounding(values), eigenvectors=vectors)


def from_products(gram: ArrayLike, kind: str) -> LowRank:
    """The same from the rows' inner products XXᵀ alone (`isouq.inner_products`), for a model of any size.

    Raises ValueError for no row and for a matrix that is not symmetric and positive semi-definite up to float32.
    """
    gram = require.symmetric("gram", gram, 1e-4)
    n = len(gram)
    values, vectors = _eigen(gram / n, kind)
    if values[0] < -1e-4 * values[-1]:
        raise ValueError(f"gram: its eigenvalue {values[0] * n:.1e} is negative, inner products wanted")
    return LowRank(kind=kind, n_examples=n, eigenvalues=values.clip(min=0), eigenvectors=vectors)


def empirical_fisher(
    jacobian: ArrayLike, logits: ArrayLike, labels: ArrayLike, *, diagonal: bool = False
) -> Covariance:
    """mean_i ∇log p(yᵢ|xᵢ) ∇log p(yᵢ|xᵢ)ᵀ with the labels y given, whether observed or not.

    `jacobian` (example, class, param) is ∂logits/∂θ, `logits` (example, class); a single logit is that of class 1
    of two. Raises ValueError for a label outside the classes.
    """
    rows = scores(jacobian, logits, labels)
    if diagonal:
        return Diagonal(kind="empirical_fisher_diagonal", diagonal=np.square(rows).sum(0) / len(rows))
    return from_rows(rows, "empirical_fisher")


def fisher(jacobian: ArrayLike, logits: ArrayLike) -> Dense | LowRank:
    """mean_i Σ_c p(c|xᵢ) ∇log p(c|xᵢ) ∇log p(c|xᵢ)ᵀ: the exact sum over the model's own labels."""
    return from_rows(fisher_rows(jacobian, logits), "fisher", n_examples=len(np.asarray(logits)))


def fisher_rows(jacobian: ArrayLike, logits: ArrayLike) -> Float[np.ndarray, "row param"]:
    """√p(c|xᵢ) ∇log p(c|xᵢ) for every example and class: XᵀX/n is the Fisher."""
    jacobian, logits = _two_sided(jacobian, logits)
    n, n_classes, n_parameters = jacobian.shape
    every = [scores(jacobian, logits, np.full(n, c)) for c in range(n_classes)]
    return (np.stack(every, 1) * np.sqrt(softmax(logits, axis=1))[:, :, None]).reshape(-1, n_parameters)


def hessian(matrix: ArrayLike) -> Dense:
    """A curvature given as a matrix, such as the mean Hessian of −log p(yᵢ|xᵢ); Σ(λ) is Laplace's covariance times n.

    Where the matrix is indefinite, only a damping above its most negative eigenvalue gives a covariance.
    """
    matrix = require.symmetric("matrix", matrix)
    values, vectors = _eigen((matrix + matrix.T) / 2, "hessian")
    return Dense(kind="hessian", eigenvalues=_without_rounding(values), eigenvectors=vectors)


def scores(jacobian: ArrayLike, logits: ArrayLike, labels: ArrayLike) -> Float[np.ndarray, "example param"]:
    """∇θ log p(yᵢ|xᵢ) = Jᵢᵀ(e_y − p) per example."""
    jacobian, logits = _two_sided(jacobian, logits)
    labels = require.integers("labels", labels, length=len(logits), below=logits.shape[1])
    return np.einsum("ecp,ec->ep", jacobian, np.eye(logits.shape[1])[labels] - softmax(logits, axis=1))


def _two_sided(jacobian: ArrayLike, logits: ArrayLike) -> tuple[Array, Array]:
    """Check both arrays and write a single logit z as the logits (0, z) of two classes."""
    jacobian, logits = require.numbers("jacobian", jacobian, 3), require.numbers("logits", logits, 2)
    if jacobian.shape[:2] != logits.shape:
        given = f"shapes {jacobian.shape} and {logits.shape} given"
        raise ValueError(f"jacobian and logits: {given}, (example, class, param) and (example, class) wanted")
    if logits.shape[1] == 1:
        return np.concatenate([0 * jacobian, jacobian], 1), np.concatenate([0 * logits, logits], 1)
    return jacobian, logits


def _eigen(matrix: Array, kind: str) -> tuple[Array, Array]:
    if not np.isfinite(matrix).all():
        raise ValueError(f"{kind}: NaN or infinite entries given, finite ones wanted")
    return np.linalg.eigh(matrix)


def _without_rounding(values: Array) -> Array:
    """Set eigenvalues that rounding alone can explain to zero."""
    return np.where(np.abs(values) < ROUNDING * np.abs(values).max(), 0.0, values)


def _damped(kind: str, curvature: Array, damping: float) -> Array:
    """Return λ + F's eigenvalues (or diagonal). Raises SingularCovarianceError, naming λ, unless all are positive."""
    precision = curvature + _nonnegative(damping)
    if not (precision > ROUNDING * np.abs(curvature).max()).all():
        least = float(curvature.min())
        reason = "is singular" if least >= 0 else f"has the negative eigenvalue {least:.1e}"
        needed = f"give a damping above {max(0.0, -least):.1e}, got {damping:.1e}"
        raise SingularCovarianceError(f"{kind}: {reason}; {needed}")
    return precision


def _nonnegative(damping: float) -> float:
    return require.number("damping", damping, 0.0, or_equal=True)


def _nonzero(squares: Array) -> Array:
    if not squares.all():
        raise ValueError(f"g: {int((squares == 0).sum())} of {len(squares)} gradients are zero and have no share")
    return squares


def _gradients(g: ArrayLike | Products, n_parameters: int | None = None, name: str = "g") -> Array:
    if isinstance(g, Products):
        raise TypeError("g: inner products given, but this covariance needs the gradients themselves (query, param)")
    return require.numbers(name, g, 2, width=n_parameters)
