"""Inner products ⟨∇S_i, ∇S_j⟩ between examples, over all parameters, without one gradient the size of the model.

The examples' factors are gathered for as many parameters at a time as the memory allows; each parameter then adds its
block of X·Yᵀ, either from explicit per-example gradients, a slice of rows at a time, or from token×token products,
whichever costs fewer multiplications. One sweep over the batches is needed per group of parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from isouq.gradients.autograd import gradient
from isouq.gradients.common import Objective, differentiable, select_parameters
from isouq.gradients.factors import Dense, Factor, Outer, Rows, wide
from isouq.gradients.ghost import Plan, Use, check_isolation
from isouq.gradients.graph import NotCovered

Key = tuple[str, int | None]  # a parameter, and the slice of it where it is a stack of experts


@dataclass(frozen=True)
class Piece:
    """The factor of one batch for one use of a parameter; `start` is the batch's first row among all examples."""

    start: int
    factor: Factor

    @property
    def stop(self) -> int:
        """One past the batch's last row."""
        return self.start + len(next(v for v in vars(self.factor).values() if isinstance(v, Tensor)))

    @property
    def n_bytes(self) -> int:
        """What keeping it costs."""
        return sum(v.nbytes for v in vars(self.factor).values() if isinstance(v, Tensor))


def inner_products(
    model: nn.Module,
    batches: Sequence[tuple[Objective, int]],
    *,
    engine: str = "auto",
    parameters: Sequence[str] | None = None,
    memory: float = 4e9,
    progress: bool = False,
) -> Tensor:
    """X·Xᵀ, X the gradients of every example's objective (column 0), (example, example) float64.

    `batches` are (objective, n_examples); `memory` bounds in bytes what is kept between the forward passes.
    Raises NotCovered as `ghost.squared_norms`; with engine "auto" the reference then does the work.
    """
    chosen = select_parameters(model, parameters)
    if engine != "autograd":
        try:
            return _by_factors(model, batches, chosen, memory, progress)
        except NotCovered:
            if engine == "ghost":
                raise
    return _by_gradients(model, batches, chosen, memory, progress)


def _by_factors(
    model: nn.Module,
    batches: Sequence[tuple[Objective, int]],
    chosen: dict[str, nn.Parameter],
    memory: float,
    progress: bool,
) -> Tensor:
    n = sum(size for _, size in batches)
    products = torch.zeros(n, n, dtype=torch.float64)
    per_example = _factor_bytes(model, batches[0], chosen)
    groups = _groups({name: per_example.get(name, 0) * n for name in chosen}, memory)
    for group in tqdm(groups, desc="groups of parameters", disable=not progress):
        for pieces in _gather(model, batches, {name: chosen[name] for name in group}).values():
            _add(products, pieces)
    return products


def _groups(sizes: dict[str, float], memory: float) -> list[list[str]]:
    """Consecutive parameters together, as many as fit, the last layers first: their backward pass stops early."""
    groups: list[list[str]] = []
    room = 0.0
    for name in reversed(sizes):
        if not groups or sizes[name] > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= sizes[name]
    return groups


def _factor_bytes(model: nn.Module, batch: tuple[Objective, int], chosen: dict[str, nn.Parameter]) -> dict[str, float]:
    objective, n = batch
    sizes: dict[str, float] = defaultdict(float)

    def visit(use: Use, factors: list[Factor]) -> None:
        sizes[use.context.parameter] += sum(Piece(0, factor).n_bytes for factor in factors) / n

    with differentiable(model, chosen) as tracked:
        plan = Plan(objective(slice(0, n)), tracked, n)
        check_isolation(model, plan, objective)
        plan.backward(plan.values[:, 0].sum(), visit, retain=False)
    return sizes


def _gather(
    model: nn.Module, batches: Iterable[tuple[Objective, int]], chosen: dict[str, nn.Parameter]
) -> dict[Key, list[Piece]]:
    """One sweep: every batch's factors of the chosen parameters."""
    kept: dict[Key, list[Piece]] = defaultdict(list)
    start = 0
    for objective, n in batches:

        def visit(use: Use, factors: list[Factor], start: int = start) -> None:
            for factor in factors:
                key = use.context.parameter, getattr(factor, "slot", None)
                kept[key].append(Piece(start, _detached(factor)))

        with differentiable(model, chosen) as tracked:
            values = objective(slice(0, n))
            if values.requires_grad:
                Plan(values, tracked, n).backward(values[:, 0].sum(), visit, retain=False)
        start += n
    return kept


def _detached(factor: Factor) -> Factor:
    """The same numbers, kept on the CPU apart from autograd's graph and its storage."""
    if isinstance(factor, Outer):
        return Outer(factor.left.detach().cpu(), factor.right.detach().cpu())
    if isinstance(factor, Rows):
        return Rows(factor.index.cpu(), factor.rows.detach().cpu())
    assert isinstance(factor, Dense)
    return Dense(factor.grad.detach().cpu())


def _add(products: Tensor, pieces: list[Piece]) -> None:
    """Add one parameter's ⟨g_i, g_j⟩, where g_i is the sum of the pieces that hold example i."""
    outer = [p for p in pieces if isinstance(p.factor, Outer)]
    rows = [p for p in pieces if isinstance(p.factor, Rows)]
    dense = [p for p in pieces if isinstance(p.factor, Dense)]
    if dense and not (outer or rows):
        _add_explicit(products, dense, lambda factor, part: factor.grad.flatten(1), 1)  # type: ignore[union-attr]
    elif outer and not (rows or dense) and not _by_tokens(outer):
        a = outer[0].factor.left.shape[2]  # type: ignore[union-attr]
        b = outer[0].factor.right.shape[2]  # type: ignore[union-attr]
        _add_explicit(products, outer, _slice_of_outer, max(1, a * b * len(products) * 4 // 500_000_000), a)
    elif not dense:
        _add_by_tokens(products, outer, rows)
    else:
        raise NotCovered("a parameter", "is used both as a matrix and by broadcasting, which has no inner product here")


def _by_tokens(outer: list[Piece]) -> bool:
    left, right = outer[0].factor.left, outer[0].factor.right  # type: ignore[union-attr]
    n_tokens, a, b = left.shape[1], left.shape[2], right.shape[2]
    return n_tokens * n_tokens * (a + b) < a * b


def _slice_of_outer(factor: Factor, part: slice) -> Tensor:
    assert isinstance(factor, Outer)
    return (wide(factor.left[:, :, part]).transpose(1, 2) @ wide(factor.right)).flatten(1)


def _add_explicit(
    products: Tensor, pieces: list[Piece], row: Callable[[Factor, slice], Tensor], n_parts: int, a: int = 1
) -> None:
    step = -(-a // n_parts)
    for low in range(0, a, step):
        matrix: Tensor | None = None
        for piece in pieces:
            block = row(piece.factor, slice(low, low + step))
            if matrix is None:
                matrix = block.new_zeros(len(products), block.shape[1], dtype=wide(block).dtype)
            matrix[piece.start : piece.stop] += block
        assert matrix is not None
        products += (matrix @ matrix.T).double()


def _add_by_tokens(products: Tensor, outer: list[Piece], rows: list[Piece]) -> None:
    """Token×token products between every two batches; for a tied weight also head with embedding."""
    for i, p in enumerate(outer):
        for q in outer[: i + 1]:
            _put(products, p, q, _outer_outer(p.factor, q.factor))  # type: ignore[arg-type]
        for q in rows:
            _put(products, p, q, _outer_rows(p.factor, q.factor))  # type: ignore[arg-type]
    for i, p in enumerate(rows):
        for q in rows[: i + 1]:
            _put(products, p, q, _rows_rows(p.factor, q.factor))  # type: ignore[arg-type]


def _put(products: Tensor, p: Piece, q: Piece, block: Tensor) -> None:
    """Add block (p's examples, q's examples) and its mirror image, once where p is q."""
    products[p.start : p.stop, q.start : q.stop] += block
    if p is not q:
        products[q.start : q.stop, p.start : p.stop] += block.T


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    """x_i,s · y_j,t as (i, s, j, t)."""
    product = wide(x).flatten(0, 1) @ wide(y).flatten(0, 1).T
    return product.view(*x.shape[:2], *y.shape[:2])


def _outer_outer(f: Outer, g: Outer) -> Tensor:
    return (_pairs(f.left, g.left) * _pairs(f.right, g.right)).sum((1, 3), dtype=torch.float64)


def _rows_rows(f: Rows, g: Rows) -> Tensor:
    same = f.index[:, :, None, None] == g.index
    return (_pairs(f.rows, g.rows) * same).sum((1, 3), dtype=torch.float64)


def _outer_rows(f: Outer, g: Rows) -> Tensor:
    picked = wide(f.left)[:, :, g.index.flatten()].unflatten(2, g.index.shape)
    return (picked * _pairs(f.right, g.rows)).sum((1, 3), dtype=torch.float64)


def _by_gradients(
    model: nn.Module,
    batches: Sequence[tuple[Objective, int]],
    chosen: dict[str, nn.Parameter],
    memory: float,
    progress: bool,
) -> Tensor:
    """The reference: one backward pass per example and group of parameters."""
    n = sum(size for _, size in batches)
    products = torch.zeros(n, n, dtype=torch.float64)
    groups = _groups({name: 4.0 * n * p.numel() for name, p in chosen.items()}, memory)
    for group in tqdm(groups, desc="groups of parameters", disable=not progress):
        part = {name: chosen[name] for name in group}
        rows: list[Tensor] = []
        for objective, size in batches:
            for i in range(size):
                with differentiable(model, part) as tracked:
                    rows.append(gradient(objective(slice(i, i + 1))[0, 0], tracked))
        matrix = torch.stack(rows)
        products += (matrix @ matrix.T).double()
    return products
