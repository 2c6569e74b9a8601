"""Inner products ⟨∇S_i, ∇S_j⟩ between examples, over all parameters, without one gradient the size of the model.

The examples' factors are kept for as many parameters at a time as the memory allows (a group). Each parameter then adds
its part of X·Yᵀ, from explicit per-example gradients, a slice of rows at a time, or from token×token products,
whichever costs fewer multiplications. Each group needs one sweep over the batches. A parameter whose factors do not fit
(the head of a vocabulary of 262,144 words has one of 1 MB for every answer token) is taken in parts: ⟨g_i, g_j⟩ is a
sum over the weight's rows.

Cost of n rows and m others of T tokens in a model of P parameters, in multiplications: 2(n+m)TP for every sweep (half
of it a backward pass that ends at the group's first layer), (n+m)TP for the explicit gradients, n(n+m)P for their
products. Products among the others are not taken.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from isouq.gradients import isolation
from isouq.gradients.autograd import Examples, Objective, gradient
from isouq.gradients.factors import Dense, Factor, Outer, Part
from isouq.gradients.model import differentiable, select_parameters
from isouq.gradients.plan import Visit, planned
from isouq.gradients.rules import Use
from isouq.gradients.torch_contract import NotCovered

Key = tuple[str, int | None]  # a parameter, and the slice of it where it is a stack of experts
Sizes = dict[str, tuple[float, float]]  # bytes by parameter, and how many of them no cut makes smaller
BUFFER_BYTES = 4e8  # of explicit gradients at a time: large enough for the matrix products, small in memory
MOST_PARTS = 64  # of a parameter; each costs a sweep over all batches


@dataclass(frozen=True)
class Gram:
    """Inner products of gradients, float64: `rows` (row, row), `between` (row, other), `squares` (other,) = ‖∇S‖²."""

    rows: Tensor
    between: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Work:
    """A call of `inner_products`: batches of rows and of others, and the memory for it in bytes."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    rows: list[Examples]
    others: list[Examples]
    memory: float
    in_pass: float
    progress: bool
    checkpoint: Any

    def singly(self) -> Work:
        """The same in batches of one example."""
        rows, others = ([one for batch in part for one in batch.singly()] for part in (self.rows, self.others))
        return replace(self, rows=rows, others=others)

    def visit(self, examples: Examples, parameters: dict[str, nn.Parameter], visit: Visit) -> None:
        """One batch's pass; that its examples do not mix is checked as for the norms."""
        with planned(self.model, examples, parameters) as plan:
            known, seed = isolation.is_known(self.model, plan, apart=True), plan.values[:, 0].sum()
            plan.backward(seed, visit, retain=not known)
            if not known:
                isolation.compare(plan, examples, plan.squares(seed, retain=True))


class Piece(NamedTuple):
    """The factor of one batch for one use of a parameter, and the batch's place among all examples."""

    rows: slice
    factor: Any  # Outer, Rows, or Dense


class Sums:
    """The products, added up parameter by parameter. The rows are first, then the others."""

    def __init__(self, work: Work) -> None:
        n_rows, n_others = (sum(batch.n for batch in part) for part in (work.rows, work.others))
        self.n_rows, self.n_examples = n_rows, n_rows + n_others
        self.numbers = torch.zeros(n_rows * self.n_examples + n_others, dtype=torch.float64)
        block, self.squares = self.numbers.split([n_rows * self.n_examples, n_others])
        self.block = block.view(n_rows, self.n_examples)
        self.n_bytes = min(float(BUFFER_BYTES), work.memory / 8)  # of explicit gradients that are formed at a time
        self.buffer = torch.empty(0)

    def gram(self) -> Gram:
        """The sums so far."""
        return Gram(self.block[:, : self.n_rows], self.block[:, self.n_rows :], self.squares)

    def add_gradients(self, matrix: Tensor) -> None:
        """Add the products of explicit gradients (example, number); no float32 sum is over more than 65,536 numbers."""
        n, most = self.n_rows, 1 << 16
        even = matrix.shape[1] // most * most
        for part in (matrix[:, :even].reshape(len(matrix), even // most, most), matrix[:, None, even:]):
            pieces = part.transpose(0, 1)  # (piece, example, number)
            self.block += (pieces[:, :n] @ pieces.mT).double().sum(0).cpu()
            norms = torch.linalg.vector_norm(part[n:], dim=2, dtype=torch.promote_types(part.dtype, torch.float32))
            self.squares += norms.double().square().sum(1).cpu()

    def add_pair(self, p: Piece, q: Piece) -> None:
        """Add the products of all examples of p with all of q, and of q with p, by token×token products.

        If both pieces are of the others, only the products of an example with itself are wanted.
        """
        n = self.n_rows
        if p.rows.start < n or q.rows.start < n:
            block = p.factor.across(q.factor).cpu()
            if p.rows.start < n:
                self.block[p.rows, q.rows] += block
            if q.rows.start < n and p is not q:
                self.block[q.rows, p.rows] += block.T
        elif p.rows == q.rows:
            self.squares[p.rows.start - n : p.rows.stop - n] += p.factor.inner(q.factor).cpu() * (1 if p is q else 2)

    def add_explicit(self, pieces: list[Piece]) -> None:
        """Add explicit gradients: as many of the weight's rows at a time as the buffer holds for all examples."""
        n_rows, width = pieces[0].factor.size
        device, dtype = (left := pieces[0].factor.left).device, torch.promote_types(left.dtype, torch.float32)
        row_size = self.n_examples * width
        step = min(n_rows, max(1, int(self.n_bytes / (row_size * dtype.itemsize))))
        if (self.buffer.dtype, self.buffer.device) != (dtype, device) or self.buffer.numel() < step * row_size:
            self.buffer = torch.empty(step * row_size, dtype=dtype, device=device)  # one serves a whole group
        starts, n_held = {piece.rows.start for piece in pieces}, sum(len(piece.factor) for piece in pieces)
        once = len(starts) == len(pieces) and n_held == self.n_examples  # every example has one piece
        for low in range(0, n_rows, step):
            rows = slice(low, min(low + step, n_rows))
            matrix = self.buffer[: (rows.stop - low) * row_size].view(self.n_examples, -1, width)
            if not once:
                matrix.zero_()
            for piece in pieces:
                piece.factor.write(matrix[piece.rows], rows, add=not once)
            self.add_gradients(matrix.flatten(1))


def inner_products(
    model: nn.Module,
    batches: Sequence[tuple[Objective, int]],
    others: Sequence[tuple[Objective, int]] = (),
    *,
    engine: str = "auto",
    memory: float = 4e9,
    in_pass: float = 0.0,
    progress: bool = False,
    checkpoint: Any = None,
) -> Gram:
    """Inner products ⟨x_i, x_j⟩ of the gradients x of every example's objective (column 0).

    `batches` (the rows) and `others` are (objective, n_examples); what an objective does around the model must keep
    examples apart. `memory` bounds the bytes above the model's weights at the peak: what is kept between forward
    passes, and a pass (`in_pass` bytes, the caller's estimate) or what is multiplied. With a `checkpoint`, a store of
    this run's own such as `isouq.studies.store.Store`, a run that was killed resumes after the last group of parameters
    that it finished.

    Raises ValueError, before the work starts, if `memory` is too small, with the bytes that are needed; NotCovered as
    `squared_norms` for engine "ghost".
    """
    if not any(size for _, size in batches):
        raise ValueError("batches: no example given, at least one wanted")
    rows, columns = ([Examples(*batch) for batch in part] for part in (batches, others))
    work = Work(model, select_parameters(model), rows, columns, memory, in_pass, progress, checkpoint)
    alone = work.singly()
    for attempt in (work, alone) if engine != "autograd" else ():
        try:
            return _by_factors(attempt)
        except NotCovered:
            if engine == "ghost" and attempt is alone:
                raise
    return _by_gradients(alone)


class Group(NamedTuple):
    """Parameters whose factors, or the same part of them, are kept at the same time."""

    names: list[str]
    part: Part


def _by_factors(work: Work) -> Gram:
    sums = Sums(work)
    # A pass and the products never overlap, but a pass leaves holes in the heap that the products do not fill.
    taken = work.in_pass + max(work.in_pass, sums.n_bytes) + sums.block.nbytes
    plan = groups(_factor_bytes(work), work.memory, taken)
    n_done = _resume(work.checkpoint, plan, sums)
    n_names = [len(group.names) for group in plan]
    with tqdm(total=sum(n_names), initial=sum(n_names[:n_done]), desc="parameters", disable=not work.progress) as bar:
        for number, group in enumerate(plan[n_done:], n_done + 1):
            kept = _gather(work, group)
            while kept:  # a name for what is popped would keep it alive during the next passes
                _add(sums, *kept.popitem())
            sums.buffer = torch.empty(0)
            bar.update(len(group.names))
            if work.checkpoint is not None:
                record = {"progress": {"groups": str(plan), "done": number}, "sums": sums.numbers.numpy().tobytes()}
                work.checkpoint.put("sums", record, replace=True)
    return sums.gram()


def _factor_bytes(work: Work) -> Sizes:
    """The bytes of every example's factors, by parameter, and how many of them remain in however small a part.

    They are extrapolated from the first batch of rows and the first of the others.
    """
    sizes = dict.fromkeys(work.parameters, (0.0, 0.0))
    for batches in (work.rows, work.others):

        def visit(use: Use, factors: list[Factor], n: int = sum(examples.n for examples in batches)) -> None:
            shape = work.parameters[use.parameter].shape
            for factor in factors:
                all_bytes, fixed = sizes[use.parameter]
                smallest, share = factor.cut(Part(0, 1 << 62), shape), n / len(factor)
                sizes[use.parameter] = all_bytes + share * factor.n_bytes, fixed + share * smallest.n_bytes

        for examples in batches[:1]:
            work.visit(examples, work.parameters, visit)
    return sizes


def groups(sizes: Sizes, memory: float, taken: float) -> list[Group]:
    """Groups of as many consecutive parameters as fit, the last layers first, since their backward pass stops early.

    A parameter that does not fit is cut into parts, each a group of its own. Raises ValueError if that does not help.
    """
    free = room(memory, taken, *max((fixed + (size - fixed) / MOST_PARTS, n) for n, (size, fixed) in sizes.items()))
    together: list[Group] = []
    left = -1.0
    for name in reversed(sizes):
        size, fixed = sizes[name]
        if size <= left:
            together[-1].names.append(name)
            left -= size
        else:
            count = math.ceil((size - fixed) / (free - fixed)) if size > free else 1
            together += [Group([name], Part(number, count)) for number in range(count)]
            left = free - size
    return together


def room(memory: float, taken: float, least: float, what: str) -> float:
    """The bytes of `memory` left beside those `taken` all along. Raises ValueError unless there are more than `least`.

    The error asks for a third more than `taken` and `least`, since passes and buffers may take a quarter of the memory.
    """
    if not isinstance(memory, Real) or not memory > 0:
        raise ValueError(f"memory: {memory} given, a number of bytes above 0 wanted")
    if memory - taken <= least:
        need = f"{what} takes {least:.3g} and all else {taken:.3g}; give {1.34 * (taken + least):.3g} or more"
        raise ValueError(f"memory: {memory:.3g} bytes given, but {need}, or fewer or shorter examples")
    return memory - taken


def _resume(checkpoint: Any, plan: list[Group], sums: Sums) -> int:
    """The number of groups that an earlier run has finished; loads their products into `sums`."""
    progress = {} if checkpoint is None else checkpoint.get("progress").get("sums", {})
    if progress.get("groups") != str(plan):
        return 0
    sums.numbers.copy_(torch.tensor(np.frombuffer(checkpoint.get("sums")["sums"])))
    return progress["done"]


def _gather(work: Work, group: Group) -> dict[Key, list[Piece]]:
    """One sweep over the batches: the factors of the group's parameters, or the group's part of them."""
    chosen = {name: work.parameters[name] for name in group.names}
    kept: dict[Key, list[Piece]] = defaultdict(list)
    end = 0
    for examples in (*work.rows, *work.others):
        end += examples.n

        def visit(use: Use, factors: list[Factor], rows: slice = slice(end - examples.n, end)) -> None:
            weight = chosen[use.parameter]
            home = torch.device("cpu") if weight.is_meta else weight.device
            for factor in factors:
                part = factor.cut(group.part, weight.shape)
                # A copy where the weight is, without the graph and the rest of the storage that it is a view of.
                piece = Piece(rows, part.mapped(lambda x: x.detach().to(home, copy=True)))
                kept[use.parameter, getattr(factor, "slot", None)].append(piece)

        work.visit(examples, chosen, visit)
    for name in {name for name, slot in kept if slot is not None}:
        if (name, None) in kept:
            raise NotCovered(name, "is used both whole and by slices, which has no inner product here")
    return kept


def _add(sums: Sums, key: Key, pieces: list[Piece]) -> None:
    """Add one parameter's ⟨g_i, g_j⟩, where g_i is the sum of the pieces that hold example i. Raises NotCovered."""
    forms = {type(piece.factor) for piece in pieces}
    if forms > {Dense}:
        raise NotCovered(key[0], "is used both as a matrix and by broadcasting, which has no inner product here")
    if forms == {Dense}:
        pieces, forms = [Piece(rows, _as_column(factor.grad)) for rows, factor in pieces], {Outer}
    if forms == {Outer} and not _by_tokens(pieces):
        sums.add_explicit(pieces)
    else:
        for i, p in enumerate(pieces):
            for q in pieces[: i + 1]:
                sums.add_pair(p, q)


def _as_column(grad: Tensor) -> Outer:
    """A gradient of any shape as a matrix of one column."""
    column = grad.reshape(len(grad), 1, -1)
    return Outer(column, column.new_ones(len(grad), 1, 1))


def _by_tokens(outer: list[Piece]) -> bool:
    """Whether token×token products cost fewer multiplications than explicit gradients."""
    (a, b), n_tokens = outer[0].factor.size, outer[0].factor.left.shape[1]
    return n_tokens * n_tokens * (a + b) < a * b


def _by_gradients(work: Work) -> Gram:
    """One backward pass per example, repeated for every slice of the gradients that fits the memory."""
    sums, parameters = Sums(work), work.parameters.values()
    n_numbers, one = sum(p.numel() for p in parameters), 3 * sum(p.nbytes for p in work.model.parameters())
    size = 2.0 * sums.n_examples * max(4, *(p.element_size() for p in parameters))  # of one number in two copies
    left = room(work.memory, work.in_pass + one + sums.block.nbytes, size, "a number of every gradient")
    width = int(min(n_numbers, left / size))
    for low in tqdm(range(0, n_numbers, width), desc="slices of gradients", disable=not work.progress):
        rows: list[Tensor] = []
        for example in (*work.rows, *work.others):
            with differentiable(work.model, work.parameters) as tracked:
                rows.append(gradient(example.values()[0, 0], tracked)[low : low + width].clone())
        sums.add_gradients(torch.stack(rows))
    return sums.gram()
