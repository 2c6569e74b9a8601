"""Covariances of the parameters, and the uncertainty gᵀΣg that each of them gives (paper, delta method).

Every curvature F is an average over n examples, and the covariance is its damped inverse,

    Σ(λ) = (λI + F)⁻¹.

With a prior of precision α and n examples, n⁻¹ Σ(α/n) is the Laplace posterior; the factor n⁻¹ is left open, as σ² is.
Three matrices that are often mixed up keep their own names (Kunstner et al. 2019, arXiv 1905.12558):

    empirical Fisher   mean_i ∇log p(yᵢ|xᵢ) ∇log p(yᵢ|xᵢ)ᵀ          yᵢ the label that was observed
    Fisher             mean_i E_y[∇log p(y|xᵢ) ∇log p(y|xᵢ)ᵀ]       y the model's own label, y ~ p(·|xᵢ)
    GGN                mean_i Jᵢᵀ Λᵢ Jᵢ                              Λᵢ the loss's Hessian in the logits

with Jᵢ = ∂logits/∂θ. `scores` are the rows of the first, `fisher_rows` those of the second. For a softmax the last two
are equal, so the GGN has no function here. The first is neither of them, not even at the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from isouq.studies import require

Array = NDArray[np.float64]


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
class Covariance:
    """Σ(λ) of F = XᵀX/n, inverted in the space of F's rows X (row, param): F is never formed.

    By Woodbury's identity gᵀ(λI + F)⁻¹g = (‖g‖² − (Xg)ᵀ(nλI + XXᵀ)⁻¹(Xg)) / λ needs only inner products, so neither X
    nor g has to fit in memory. `eigenvalues` and `eigenvectors` are those of XXᵀ/n: the former are F's, zeros apart.
    """

    n_examples: int
    eigenvalues: Float[np.ndarray, " row"]
    eigenvectors: Float[np.ndarray, "row row"]
    rows: Float[np.ndarray, "row param"] | None = None

    def quadratic_form(self, g: ArrayLike | Products, *, damping: float) -> Array:
        """gᵀΣ(λ)g (query,) for gradients g (query, param) at a damping λ above 0.

        Raises ValueError where rounding leaves no positive number.
        """
        damping, g = require.number("damping", damping, 0.0), self._products(g)
        inside = np.square(g.with_rows @ self.eigenvectors) / self.n_examples
        form = (g.squares - inside @ (1 / (damping + self.eigenvalues))) / damping
        if not (form > 0)[g.squares > 0].all():
            why = f"gᵀΣg is lost in the rounding of the inner products at damping {damping:.1e}; give a larger one"
            raise ValueError(f"damping: {why} (largest eigenvalue {self.eigenvalues.max():.1e})")
        return form

    def share_below(self, g: ArrayLike | Products, threshold: float) -> Array:
        """The share of ‖g‖² in directions whose eigenvalue is below `threshold`: (query,) between 0 and 1."""
        g, above = self._products(g), self.eigenvalues >= require.number("threshold", threshold, 0.0)
        if not g.squares.all():
            n_zero = int((g.squares == 0).sum())
            raise ValueError(f"g: {n_zero} of {len(g.squares)} gradients are zero and have no share")
        inside = np.square(g.with_rows @ self.eigenvectors[:, above]) / (self.n_examples * self.eigenvalues[above])
        return (1 - inside.sum(1) / g.squares).clip(min=0)

    def _products(self, g: ArrayLike | Products) -> Products:
        if not isinstance(g, Products):
            if self.rows is None:
                raise TypeError("g: gradients given to a covariance that was built from products; give Products")
            g = require.numbers("g", g, 2, width=self.rows.shape[1])
            g = Products(np.square(g).sum(1), g @ self.rows.T)
        if g.with_rows.shape[1] != len(self.eigenvalues):
            raise ValueError(f"products: with {g.with_rows.shape[1]} rows given, {len(self.eigenvalues)} wanted")
        return g


def from_rows(rows: ArrayLike, *, n_examples: int | None = None) -> Covariance:
    """Σ of F = XᵀX/n from its rows X (row, param).

    n is the number of rows unless `n_examples` says otherwise (a Fisher has a row per example and class).
    """
    rows = require.numbers("rows", rows, 2)
    n = len(rows) if n_examples is None else require.count("n_examples", n_examples)
    values, vectors = np.linalg.eigh(rows @ rows.T / n)
    return Covariance(n_examples=n, eigenvalues=values, eigenvectors=vectors, rows=rows)


def from_products(gram: ArrayLike) -> Covariance:
    """The same from the rows' inner products XXᵀ alone (`isouq.inner_products`), for a model of any size.

    Raises ValueError for no row and for a matrix that is not symmetric and positive semi-definite up to float32.
    """
    gram = require.symmetric("gram", gram, 1e-4)
    n = len(gram)
    values, vectors = np.linalg.eigh(gram / n)
    if values[0] < -1e-4 * values[-1]:
        raise ValueError(f"gram: its eigenvalue {values[0] * n:.1e} is negative, inner products wanted")
    return Covariance(n_examples=n, eigenvalues=values.clip(min=0), eigenvectors=vectors)


def fisher_rows(jacobian: ArrayLike, logits: ArrayLike) -> Float[np.ndarray, "row param"]:
    """√p(c|xᵢ) ∇log p(c|xᵢ) for every example and class: XᵀX/n is the Fisher."""
    jacobian, logits = _two_sided(jacobian, logits)
    n, n_classes, n_parameters = jacobian.shape
    every = [scores(jacobian, logits, np.full(n, c)) for c in range(n_classes)]
    return (np.stack(every, 1) * np.sqrt(softmax(logits, axis=1))[:, :, None]).reshape(-1, n_parameters)


def scores(jacobian: ArrayLike, logits: ArrayLike, labels: ArrayLike) -> Float[np.ndarray, "example param"]:
    """∇θ log p(yᵢ|xᵢ) = Jᵢᵀ(e_y − p) per example: the rows of an empirical Fisher if the labels were observed.

    `jacobian` (example, class, param) is ∂logits/∂θ, `logits` (example, class); a single logit is that of class 1
    of two. Raises ValueError for a label outside the classes.
    """
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
