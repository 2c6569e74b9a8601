"""Per-example gradients in the form in which a backward pass delivers them, without building them.

A *factor* is the gradient of one use of one parameter, for every example of a batch at once. It has one of three forms:

    Outer   Σ_t left_t ⊗ right_t      a matrix multiplication (Linear, Conv1D, convolution, the LM head)
    Rows    row[index_t] += right_t   an embedding look-up
    Dense   the gradient itself       a bias, a gain

‖Σ_t l_t ⊗ r_t‖² = Σ_{t,s} (l_t·l_s)(r_t·r_s): two token×token products in place of a gradient the size of the
weight ("ghost norms": Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


class NoRule(Exception):
    """There is no rule for this use of a parameter. The message says why; the caller adds the parameter's name."""


@dataclass(frozen=True)
class Part:
    """The `number`-th of `count` equal parts of a parameter, which is cut along the longer of its last two axes."""

    number: int
    count: int

    def of(self, size: int) -> slice:
        """The part's place on an axis of this size."""
        return slice(self.number * size // self.count, (self.number + 1) * size // self.count)


def _has_more_rows(shape: torch.Size) -> bool:
    return len(shape) < 2 or shape[-2] >= shape[-1]


@dataclass(frozen=True, eq=False)
class Factor:
    """The gradient of one use of one parameter, for every example of a batch; the forms are the classes below."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; examples are the first axis of each."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def __len__(self) -> int:
        """How many examples there are."""
        return len(next(iter(self.tensors().values())))

    @property
    def n_bytes(self) -> int:
        """The size of the tensors; an activation shared by several weights is counted for each."""
        return sum(x.nbytes for x in self.tensors().values())

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The factor with `function` applied to each of its tensors."""
        return replace(self, **{name: function(x) for name, x in self.tensors().items()})

    def squared_norm(self) -> Tensor:
        """‖gradient‖² of each example: (example,) float64."""
        return self.inner(self)

    def inner(self, other: Factor) -> Tensor:
        """⟨self, other⟩ of each example, for two uses of one parameter: (example,) float64. Raises NoRule."""
        raise NotImplementedError

    def cut(self, part: Part, shape: torch.Size) -> Factor:
        """The part of the gradient of a parameter of this `shape`."""
        raise NotImplementedError

    def dense(self, purpose: str) -> Dense:
        """The gradient written out. Raises NoRule, with `purpose` in its text, for a form that has no such rule."""
        raise NoRule(f"{purpose} a gradient of the form {type(self).__name__}, which has no rule")

    def transposed(self) -> Factor:
        """The gradient of the parameter whose transpose was used."""
        return Dense(self.dense("is transposed before a use with").grad.transpose(-1, -2))

    def of_slice(self, slot: int) -> Factor:
        """The gradient of the stacked parameter of which slice `slot` was used."""
        raise NoRule(f"is sliced before a use with a gradient of the form {type(self).__name__}, which has no rule")


@dataclass(frozen=True, eq=False)
class Dense(Factor):
    """The gradient per example, (example, *param)."""

    grad: Tensor

    def inner(self, other: Factor) -> Tensor:
        """⟨self, other⟩ of each example."""
        return total(wide(self.grad) * wide(other.dense("has a dense gradient besides").grad))

    def cut(self, part: Part, shape: torch.Size) -> Dense:
        """That part of the last axis."""
        return Dense(self.grad[..., part.of(self.grad.shape[-1])])

    def dense(self, purpose: str) -> Dense:
        """Itself."""
        return self


class Tokens(Factor):
    """A sum over tokens, Σ_t left_t ⊗ right_t; each subclass stores the left side in its own way."""

    right: Tensor

    def left_products(self, other: Tokens) -> Tensor:
        """left_s·left'_t of each example: (example, s, t)."""
        raise NotImplementedError

    def products(self, other: Tokens) -> Tensor:
        """(left_s·left'_t)(right_s·right'_t), which add up to the inner product of each example: (example, s, t)."""
        return self.left_products(other) * (wide(self.right) @ wide(other.right).transpose(1, 2))

    def inner(self, other: Factor) -> Tensor:
        """⟨self, other⟩ of each example."""
        return total(self.products(other)) if isinstance(other, Tokens) else other.inner(self)

    def across(self, other: Tokens) -> Tensor:
        """⟨example i of self, example j of other⟩ for all pairs: (i, j) float64."""
        one, two = (factor.mapped(lambda x: x.flatten(0, 1)[None]) for factor in (self, other))
        products = one.products(two).view(*self.right.shape[:2], *other.right.shape[:2])
        return products.sum((1, 3), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Outer(Tokens):
    """left (example, token, a), right (example, token, b), gradient (a, b).

    `slot` is the slice of a stacked parameter that the gradient belongs to (an expert), None for the whole.
    """

    left: Tensor
    right: Tensor
    slot: int | None = None

    def left_products(self, other: Tokens) -> Tensor:
        """Zero for different slices of one parameter."""
        if isinstance(other, Rows):  # left_s[index_t]
            return wide(self.left).gather(2, other.index.unsqueeze(1).expand(-1, self.left.shape[1], -1))
        assert isinstance(other, Outer)
        products = wide(self.left) @ wide(other.left).transpose(1, 2)
        return products if self.slot == other.slot else torch.zeros_like(products)

    def squared_norm(self) -> Tensor:
        """‖gradient‖² from token×token products or from the explicit gradient, whichever is cheaper."""
        if self.left.shape[1] == 1:
            return total(wide(self.left).square()) * total(wide(self.right).square())
        n_tokens, (a, b) = self.left.shape[1], self.size
        if n_tokens * (a + b) <= 1.25 * a * b:  # multiplications; 1.25 is for writing and reading the explicit gradient
            return self.inner(self)
        pairs = zip(wide(self.left), wide(self.right), strict=True)  # one example's gradient at a time
        norms = [torch.linalg.vector_norm(left.T @ right, dtype=torch.float64) for left, right in pairs]
        return torch.stack(norms).square()

    def cut(self, part: Part, shape: torch.Size) -> Outer:
        """That part of the left side's features or of the right side's."""
        side = "left" if _has_more_rows(shape) else "right"
        x = getattr(self, side)
        return replace(self, **{side: x[..., part.of(x.shape[-1])]})

    @property
    def size(self) -> tuple[int, int]:
        """The gradient's rows and columns, a and b."""
        return self.left.shape[2], self.right.shape[2]

    def write(self, out: Tensor, rows: slice, *, add: bool) -> None:
        """Write these rows of the gradient to `out` (example, row, b), or add them."""
        out.baddbmm_(wide(self.left[:, :, rows]).transpose(1, 2), wide(self.right), beta=int(add))

    def dense(self, purpose: str) -> Dense:
        """(example, a, b), unless it belongs to a slice of the parameter."""
        if self.slot is not None:
            return super().dense(purpose)
        return Dense(wide(self.left).transpose(1, 2) @ wide(self.right))

    def transposed(self) -> Outer:
        """The sides swapped."""
        return replace(self, left=self.right, right=self.left)

    def of_slice(self, slot: int) -> Outer:
        """The same sides, marked as the slice's."""
        return replace(self, slot=slot) if self.slot is None else super().of_slice(slot)  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Rows(Tokens):
    """An embedding's gradient: index (example, token) int64, right (example, token, b); gradient (vocab, b)."""

    index: Tensor
    right: Tensor

    def left_products(self, other: Tokens) -> Tensor:
        """1 where two tokens look up the same row, 0 elsewhere, if the other is an embedding too."""
        if isinstance(other, Rows):
            return self.index.unsqueeze(2) == other.index.unsqueeze(1)
        return other.left_products(self).transpose(1, 2)

    def without(self, padding: int) -> Rows:
        """Without the row of the padding id, which gets no gradient; torch says -1 where there is none."""
        if padding < 0:
            return self
        return Rows(self.index, self.right.masked_fill((self.index == padding).unsqueeze(-1), 0))

    def cut(self, part: Part, shape: torch.Size) -> Rows:
        """The tokens whose id is in the part, counted from its start; or that part of the rows' features."""
        if not _has_more_rows(shape):
            return Rows(self.index, self.right[..., part.of(self.right.shape[-1])])
        rows = part.of(shape[0])
        outside = (self.index < rows.start) | (self.index >= rows.stop)
        right = self.right.masked_fill(outside.unsqueeze(2), 0)
        return Rows((self.index - rows.start).masked_fill(outside, 0), right)


def wide(x: Tensor) -> Tensor:
    """At least float32: products of half-precision factors are taken and added in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def total(x: Tensor) -> Tensor:
    """Sum over all but the example axis, in float64."""
    return x.flatten(1).sum(1, dtype=torch.float64) if x.dim() > 1 else x.double()
