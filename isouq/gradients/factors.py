"""Per-example gradients in the form in which a backward pass delivers them, without building them.

A *factor* is the gradient of one use of one parameter, for every example of a batch at once. Three forms are
enough for the networks of the field, and each knows its squared norm and its inner products:

    Outer   Σ_t left_t ⊗ right_t     a matrix multiplication (Linear, Conv1D, convolution, the LM head)
    Rows    row[index_t] += rows_t   an embedding look-up
    Dense   the gradient itself      a bias, a gain

‖Σ_t l_t ⊗ r_t‖² = Σ_{t,s} (l_t·l_s)(r_t·r_s): two token×token products in place of a gradient the size of the
weight ("ghost norms": Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class NoRule(Exception):
    """Two forms of gradient meet, or one meets an operation, for which there is no rule; says which."""


@dataclass(frozen=True)
class Outer:
    """Σ_t left_t ⊗ right_t per example: left (example, token, a), right (example, token, b), gradient (a, b).

    `right_gram`, when given, returns right·rightᵀ (example, token, token), which several weights may share.
    `slot` names the slice of a stacked parameter that the gradient belongs to (an expert), None for the whole.
    """

    left: Tensor
    right: Tensor
    left_gram: Callable[[], Tensor] | None = None
    right_gram: Callable[[], Tensor] | None = None
    slot: int | None = None

    def transposed(self) -> Outer:
        """The same gradient of the transposed parameter."""
        return replace(self, left=self.right, right=self.left, left_gram=self.right_gram, right_gram=self.left_gram)

    def dense(self) -> Tensor:
        """The gradient itself, (example, a, b)."""
        return wide(self.left).transpose(1, 2) @ wide(self.right)


@dataclass(frozen=True)
class Rows:
    """An embedding's gradient: index (example, token) int64, rows (example, token, b); gradient (vocab, b)."""

    index: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Dense:
    """The gradient per example, (example, *param)."""

    grad: Tensor


@dataclass(frozen=True)
class Picked:
    """What an Outer leaves for an embedding of the same weight: values (example, s, t) = left_s[index_t], right."""

    values: Tensor
    right: Tensor


Factor = Outer | Rows | Dense | Picked


def wide(x: Tensor) -> Tensor:
    """At least float32: products of half-precision factors are taken and added in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def total(x: Tensor) -> Tensor:
    """Sum over all but the example axis, in float64."""
    return x.flatten(1).sum(1, dtype=torch.float64) if x.dim() > 1 else x.double()


def gram(x: Tensor) -> Tensor:
    """x·xᵀ per example: (example, token, b) → (example, token, token)."""
    x = wide(x)
    return x @ x.transpose(1, 2)


def cheaper_as_gram(factor: Outer) -> bool:
    """Whether two token×token products cost fewer multiplications than the explicit gradient.

    A side whose product is shared counts as free. The explicit gradient is also written and read once, which the
    factor stands for.
    """
    n_tokens, a, b = factor.left.shape[1], factor.left.shape[2], factor.right.shape[2]
    products = n_tokens * n_tokens * (a * (factor.left_gram is None) + b * (factor.right_gram is None))
    return products <= 1.25 * n_tokens * a * b


def squared_norm(factor: Factor) -> Tensor:
    """‖gradient‖² per example: (example,) float64."""
    if isinstance(factor, Dense):
        return total(wide(factor.grad).square())
    if isinstance(factor, Rows):
        same = factor.index.unsqueeze(2) == factor.index.unsqueeze(1)
        return total(gram(factor.rows) * same)
    assert isinstance(factor, Outer)
    if factor.left.shape[1] == 1:
        return total(wide(factor.left).square()) * total(wide(factor.right).square())
    if cheaper_as_gram(factor):
        left = factor.left_gram() if factor.left_gram else gram(factor.left)
        return total(left * (factor.right_gram() if factor.right_gram else gram(factor.right)))
    pairs = zip(wide(factor.left), wide(factor.right), strict=True)
    return torch.stack([_explicit(left, right) for left, right in pairs])


def _explicit(left: Tensor, right: Tensor) -> Tensor:
    product = left.transpose(0, 1) @ right
    return torch.linalg.vector_norm(product, dtype=torch.float64).square()


def inner(f: Factor, g: Factor) -> Tensor:
    """⟨f, g⟩ per example, two uses of one parameter: (example,) float64."""
    if isinstance(f, Dense) and isinstance(g, Dense):
        return total(wide(f.grad) * wide(g.grad))
    if isinstance(f, Outer) and isinstance(g, Outer):
        if f.slot != g.slot:
            return f.left.new_zeros(len(f.left), dtype=torch.float64)
        left = wide(f.left) @ wide(g.left).transpose(1, 2)
        return total(left * (wide(f.right) @ wide(g.right).transpose(1, 2)))
    if isinstance(f, Rows) and isinstance(g, Rows):
        same = f.index.unsqueeze(2) == g.index.unsqueeze(1)
        return total(wide(f.rows) @ wide(g.rows).transpose(1, 2) * same)
    if isinstance(f, Rows) and isinstance(g, Outer | Picked):
        return inner(g, f)
    if isinstance(f, Outer | Picked) and isinstance(g, Rows):
        values = f.values if isinstance(f, Picked) else pick(f, g.index)
        return total(values * (wide(f.right) @ wide(g.rows).transpose(1, 2)))
    if isinstance(f, Dense) or isinstance(g, Dense):
        return inner(_densified(f), _densified(g))
    raise NoRule(f"has a {type(f).__name__} and a {type(g).__name__} gradient, whose product has no rule")


def _densified(f: Factor) -> Dense:
    if isinstance(f, Outer) and f.slot is None:
        return Dense(f.dense())
    if isinstance(f, Dense):
        return f
    raise NoRule(f"has a dense gradient besides that of another form ({type(f).__name__})")


def pick(f: Outer, index: Tensor) -> Tensor:
    """left_s[index_t] as (example, s, t): all that an embedding of the same weight needs of a head's left side."""
    return wide(f.left).gather(2, index.unsqueeze(1).expand(-1, f.left.shape[1], -1))
