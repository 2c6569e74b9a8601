"""Inner products ⟨∇S_i, ∇S_j⟩ between examples, over all parameters, without one gradient the size of the model.

The examples' factors are gathered for as many parameters at a time as the memory allows, those of a large embedding or
head for some of its rows at a time (`room`); each parameter then adds its block of X·Yᵀ, either from explicit
per-example gradients, a slice of rows at a time, or from token×token products, whichever costs fewer multiplications.
One sweep over the batches is needed per group of parameters.

Cost of n rows and m others of T tokens in a model of P parameters, in multiplications: 2(n+m)TP for every sweep (half
of it a backward pass that ends at the group's first layer), (n+m)TP for the explicit gradients, n(n+m)P for their
products. Products among the others are not taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from isouq.gradients import isolation
from isouq.gradients.autograd import gradient
from isouq.gradients.common import Objective, Tracked, check_differentiable, differentiable, select_parameters
from isouq.gradients.factors import Dense, Factor, NoRule, Outer, Rows, inner, wide
from isouq.gradients.ghost import Plan, Use, Visit, one, refusing_recomputation
from isouq.gradients.graph import NotCovered
from isouq.gradients.room import Sizes, cut, groups, n_bytes, room


@runtime_checkable
class Checkpoint(Protocol):
    """Where sums are kept while they grow, such as `isouq.studies.store.Store`: one record of an item in each stage."""

    def get(self, stage: str) -> dict[str, Any]:
        """The records of a stage by item."""

    def put(self, item_id: str, records: dict[str, Any], *, replace: bool) -> None:
        """Write one item's records, {stage: plain JSON or bytes}, all of them or none."""


Key = tuple[str, int | None]  # a parameter, and the slice of it where it is a stack of experts
Batches = Sequence[tuple[Objective, int]]
BUFFER_BYTES = 4e8  # of explicit gradients at a time: large enough for the matrix products, small in memory


@dataclass(frozen=True)
class Gram:
    """Inner products of gradients, float64: `rows` (row, row), `between` (row, other), `squares` (other,) = ‖∇S‖²."""

    rows: Tensor
    between: Tensor
    squares: Tensor


@dataclass
class Sums:
    """The products while they are added up, parameter by parameter: rows come first, then the others."""

    n_rows: int
    n_others: int
    memory: float
    in_pass: float
    _buffer: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.block = torch.zeros(self.n_rows, len(self), dtype=torch.float64)
        self.squares = torch.zeros(self.n_others, dtype=torch.float64)
        self.buffer_bytes = min(float(BUFFER_BYTES), self.memory / 8)

    def __len__(self) -> int:
        """All examples."""
        return self.n_rows + self.n_others

    def gram(self) -> Gram:
        """What has been added up."""
        n = self.n_rows
        return Gram(self.block[:, :n], self.block[:, n:], self.squares)

    def add_gradients(self, matrix: Tensor) -> None:
        """Add the products of explicit gradients (example, number); float32 sums over no more than 65,536 numbers."""
        n = self.n_rows
        for part in matrix.split(1 << 16, dim=1):
            self.block += (part[:n] @ part.T).double()
            if self.n_others:
                norms = torch.linalg.vector_norm(part[n:], dim=1, dtype=torch.promote_types(part.dtype, torch.float32))
                self.squares += norms.double().square()

    def add_pair(self, p: Piece, q: Piece, product: Callable[[], Tensor]) -> None:
        """Add a block (p's examples, q's examples) and its mirror image, once where p is q.

        Of two pieces of other examples only the products of an example with itself are wanted.
        """
        n = self.n_rows
        if p.start < n or q.start < n:
            block = product()
            if p.start < n:
                self.block[p.start : p.stop, q.start : q.stop] += block
            if q.start < n and p is not q:
                self.block[q.start : q.stop, p.start : p.stop] += block.T
        elif p.start == q.start:
            self.squares[p.start - n : p.stop - n] += inner(p.factor, q.factor) * (1 if p is q else 2)

    def buffer(self, width: int, like: Tensor) -> Tensor:
        """(example, width) to be written over: one allocation serves a group of parameters."""
        size = len(self) * width
        if self._buffer is None or self._buffer.numel() < size or self._buffer.dtype != like.dtype:
            self._buffer = torch.empty(size, dtype=like.dtype)
        return self._buffer[:size].view(len(self), width)


@dataclass(frozen=True)
class Piece:
    """The factor of one batch for one use of a parameter; `start` is the batch's first row among all examples."""

    start: int
    factor: Factor

    @property
    def stop(self) -> int:
        """One past the batch's last row."""
        return self.start + len(next(v for v in vars(self.factor).values() if isinstance(v, Tensor)))


def inner_products(
    model: nn.Module,
    batches: Batches,
    others: Batches = (),
    *,
    engine: str = "auto",
    parameters: Sequence[str] | None = None,
    memory: float = 4e9,
    in_pass: float = 0.0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Gram:
    """⟨x_i, x_j⟩ of the gradients x of every example's objective (column 0): rows with rows, and with the others.

    `batches` and `others` are (objective, n_examples), each objective such that what it does around the model treats
    examples apart. `memory` bounds the bytes above the model's weights at the peak: what is kept between forward
    passes, and a pass (`in_pass` bytes, by the caller's estimate) or what is multiplied. Raises ValueError, before the
    work starts, where that cannot be, with the bytes that are needed.
    With a `checkpoint`, this run's store, a run that was killed goes on after its last whole group of parameters.
    Raises NotCovered as `ghost.squared_norms`; with engine "auto" the reference then does the work.
    """
    chosen = select_parameters(model, parameters)
    n_rows, n_others = (sum(size for _, size in part) for part in (batches, others))
    if n_rows == 0:
        raise ValueError("batches: no example given, at least one wanted")
    work = [*batches, *others]
    for attempt in (work, _singly(work)) if engine != "autograd" else ():
        try:
            return _by_factors(model, attempt, chosen, Sums(n_rows, n_others, memory, in_pass), progress, checkpoint)
        except isolation.Meeting:
            continue
        except NotCovered:
            if engine == "ghost":
                raise
            break
    return _by_gradients(model, work, chosen, Sums(n_rows, n_others, memory, in_pass), progress)


def _singly(batches: Batches) -> Batches:
    return [(one(objective, i), 1) for objective, n in batches for i in range(n)]


def _by_factors(
    model: nn.Module,
    batches: Batches,
    chosen: dict[str, nn.Parameter],
    sums: Sums,
    progress: bool,
    checkpoint: Checkpoint | None,
) -> Gram:
    # No pass while products are taken; but a pass leaves holes in the heap that what is kept does not fill.
    taken = sums.in_pass + max(sums.in_pass, sums.buffer_bytes) + sums.block.nbytes
    parts = groups(_factor_bytes(model, batches, sums, chosen), sums.memory, taken)
    done = _resume(checkpoint, parts, sums)
    bar = tqdm(total=sum(map(len, parts)), desc="parameters", disable=not progress, initial=sum(map(len, parts[:done])))
    with bar:
        for number, group in enumerate(parts[done:], done + 1):
            which = number - 1 - parts.index(group), parts.count(group)  # which part, of how many
            kept = _gather(model, batches, {name: chosen[name] for name in group}, which)
            while kept:
                key = next(iter(kept))
                try:
                    _add(sums, kept.pop(key))  # no name for it here, which would keep it during the next group's passes
                except NoRule as error:
                    raise NotCovered(key[0], str(error)) from error
            sums._buffer = None
            bar.update(len(group))
            _keep(checkpoint, parts, number, sums)
    return sums.gram()


def _resume(checkpoint: Checkpoint | None, groups: list[list[str]], sums: Sums) -> int:
    """How many groups an earlier run has done; their products are put into `sums`."""
    progress = {} if checkpoint is None else checkpoint.get("progress").get("sums", {})
    if checkpoint is None or progress.get("groups") != groups:
        return 0
    for name in ("block", "squares"):
        flat = np.frombuffer(checkpoint.get(name)["sums"])
        setattr(sums, name, torch.tensor(flat).view_as(getattr(sums, name)))
    return progress["done"]


def _keep(checkpoint: Checkpoint | None, groups: list[list[str]], done: int, sums: Sums) -> None:
    if checkpoint is not None:
        arrays = {name: getattr(sums, name).numpy().tobytes() for name in ("block", "squares")}
        checkpoint.put("sums", {"progress": {"groups": groups, "done": done}, **arrays}, replace=True)


def _factor_bytes(model: nn.Module, batches: Batches, sums: Sums, chosen: dict[str, nn.Parameter]) -> Sizes:
    """What keeping every example's factors of each parameter costs, and what of it no cut makes smaller.

    One batch of rows and one of the others tell.
    """
    sizes = dict.fromkeys(chosen, (0.0, 0.0))
    starts = {0: sums.n_rows, sums.n_rows: sums.n_others}  # where rows and others begin → how many they are
    place = 0
    for objective, n in batches:

        def visit(use: Use, factors: list[Factor], share: float = starts.get(place, 0) / n) -> None:
            name = use.context.parameter
            for factor in factors:
                fixed = n_bytes(cut(factor, chosen[name].shape, 0, 1 << 62))
                sizes[name] = sizes[name][0] + share * n_bytes(factor), sizes[name][1] + share * fixed

        if place in starts:
            with differentiable(model, chosen) as tracked:
                _visit_factors(model, objective, n, tracked, visit)
        place += n
    return sizes


def _visit_factors(model: nn.Module, objective: Objective, n: int, tracked: Tracked, visit: Visit) -> None:
    """One batch's pass, checked as the norms are."""
    with refusing_recomputation():
        values = objective(slice(0, n))
        check_differentiable(values)
        plan = Plan(values, tracked, n)
        doubt = isolation.examine(model, plan, objective, apart=True)
        plan.backward(values[:, 0].sum(), visit, retain=doubt.any)
        if doubt.any:
            isolation.check(plan, objective, plan.squares(values[:, 0].sum(), retain=True), doubt)


def _gather(
    model: nn.Module, batches: Iterable[tuple[Objective, int]], chosen: dict[str, nn.Parameter], which: tuple[int, int]
) -> dict[Key, list[Piece]]:
    """One sweep: every batch's factors of the chosen parameters, or of a part of them."""
    kept: dict[Key, list[Piece]] = defaultdict(list)
    start = 0
    for objective, n in batches:

        def visit(use: Use, factors: list[Factor], start: int = start) -> None:
            for factor in factors:
                name = use.context.parameter
                piece = Piece(start, _detached(cut(factor, chosen[name].shape, *which)))
                kept[name, getattr(factor, "slot", None)].append(piece)

        with differentiable(model, chosen) as tracked:
            _visit_factors(model, objective, n, tracked, visit)
        start += n
    for name in {name for name, slot in kept if slot is not None}:
        if (name, None) in kept:
            raise NotCovered(name, "is used both whole and by slices, which has no inner product here")
    return kept


def _detached(factor: Factor) -> Factor:
    """The same numbers, kept on the CPU apart from autograd's graph and from what else their storage holds."""

    own: dict[str, Any] = {name: x.detach().cpu() for name, x in vars(factor).items() if isinstance(x, Tensor)}
    return type(factor)(**{k: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x for k, x in own.items()})


def _add(sums: Sums, pieces: list[Piece]) -> None:
    """Add one parameter's ⟨g_i, g_j⟩, where g_i is the sum of the pieces that hold example i."""
    kinds = {type(p.factor) for p in pieces}
    if kinds == {Dense}:
        _add_dense(sums, pieces)
    elif kinds == {Outer} and not _by_tokens(pieces):
        _add_outer(sums, pieces)
    elif Dense not in kinds:
        for i, p in enumerate(pieces):
            for q in pieces[: i + 1]:
                sums.add_pair(p, q, lambda p=p, q=q: _across(p.factor, q.factor))  # type: ignore[misc]
    else:
        raise NoRule("is used both as a matrix and by broadcasting, which has no inner product here")


def _by_tokens(outer: list[Piece]) -> bool:
    left, right = outer[0].factor.left, outer[0].factor.right  # type: ignore[union-attr]
    n_tokens, a, b = left.shape[1], left.shape[2], right.shape[2]
    return n_tokens * n_tokens * (a + b) < a * b


def _add_dense(sums: Sums, pieces: list[Piece]) -> None:
    like = wide(pieces[0].factor.grad)  # type: ignore[union-attr]
    matrix = sums.buffer(like[0].numel(), like).zero_()
    for piece in pieces:
        grad = piece.factor.grad  # type: ignore[union-attr]
        matrix[piece.start : piece.stop] += grad.reshape(len(grad), -1)
    sums.add_gradients(matrix)


def _add_outer(sums: Sums, pieces: list[Piece]) -> None:
    """Explicit gradients, a slice of the weight's rows at a time, each written into its place and multiplied."""
    factors = [p.factor for p in pieces if isinstance(p.factor, Outer)]
    a, b = factors[0].left.shape[2], factors[0].right.shape[2]
    like = wide(factors[0].left[:0])
    step = max(1, min(a, int(sums.buffer_bytes / (len(sums) * b * like.element_size()))))
    for low in range(0, a, step):
        high = min(low + step, a)
        matrix = sums.buffer((high - low) * b, like).view(len(sums), high - low, b)
        end = 0  # pieces of one use come in order; where an example has none or several, add to zeros
        for piece, factor in zip(pieces, factors, strict=True):
            if piece.start > end:
                matrix[end : piece.start] = 0
            left, right = wide(factor.left[:, :, low:high]).transpose(1, 2), wide(factor.right)
            if piece.start >= end:
                torch.bmm(left, right, out=matrix[piece.start : piece.stop])
                end = piece.stop
            else:
                matrix[piece.start : piece.stop].baddbmm_(left, right)
        matrix[end:] = 0
        sums.add_gradients(matrix.flatten(1))


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    """x_i,s · y_j,t as (i, s, j, t)."""
    product = wide(x).flatten(0, 1) @ wide(y).flatten(0, 1).T
    return product.view(*x.shape[:2], *y.shape[:2])


def _across(f: Factor, g: Factor) -> Tensor:
    """⟨f_i, g_j⟩ of every example of f with every one of g, by token×token products: (i, j) float64.

    For a tied weight also head with embedding.
    """
    if isinstance(f, Rows) and isinstance(g, Outer):
        return _across(g, f).T
    if isinstance(f, Outer) and isinstance(g, Outer):
        product = _pairs(f.left, g.left) * _pairs(f.right, g.right)
    elif isinstance(f, Outer):
        assert isinstance(g, Rows)
        picked = wide(f.left)[:, :, g.index.flatten()].unflatten(2, g.index.shape)
        product = picked * _pairs(f.right, g.rows)
    else:
        assert isinstance(f, Rows)
        assert isinstance(g, Rows)
        product = _pairs(f.rows, g.rows) * (f.index[:, :, None, None] == g.index)
    return product.sum((1, 3), dtype=torch.float64)


def _by_gradients(
    model: nn.Module,
    batches: Batches,
    chosen: dict[str, nn.Parameter],
    sums: Sums,
    progress: bool,
) -> Gram:
    """The reference: a backward pass per example, anew for every slice of the gradients that fits the memory."""
    total, one = sum(p.numel() for p in chosen.values()), 3 * sum(p.nbytes for p in model.parameters())
    size = 2.0 * len(sums) * max(4, *(p.element_size() for p in chosen.values()))  # of one number, and once more
    left = room(sums.memory, sums.in_pass + one + sums.block.nbytes, size, "a number of every gradient")
    width = min(total, int(left / size))
    for low in tqdm(range(0, total, width), desc="slices of gradients", disable=not progress):
        rows: list[Tensor] = []
        for objective, n in batches:
            for i in range(n):
                with differentiable(model, chosen) as tracked:
                    rows.append(gradient(objective(slice(i, i + 1))[0, 0], tracked)[low : low + width].clone())
        sums.add_gradients(torch.stack(rows))
    return sums.gram()
