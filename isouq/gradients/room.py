"""What fits the memory: which parameters' factors are kept at a time, and the parts that a large one is cut into.

The head of a vocabulary of 262,144 words has a factor of 1 MB for every answer token. ⟨g_i, g_j⟩ is a sum over the
weight's rows, so a part of the rows at a time does it: the columns `low:high` of an Outer's left side, and of an
embedding's Rows the tokens with an id in that range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isouq.gradients.factors import Dense, Factor, Outer, Rows

MOST_PARTS = 64  # each costs a sweep over all batches


def check_memory(memory: float | None) -> None:
    """Raise ValueError for what is no number of bytes."""
    if memory is not None and not memory > 0:
        raise ValueError(f"memory: {memory} given, a number of bytes above 0 wanted")


@dataclass(frozen=True)
class Part:
    """The `number`-th of `count` equal parts of a parameter, cut along the longer of its last two axes."""

    number: int
    count: int

    def of(self, factor: Factor, shape: torch.Size) -> Factor:
        """What a factor of a parameter of this `shape` has in this part."""
        by_row = len(shape) < 2 or shape[-2] >= shape[-1]
        if self.count == 1:
            return factor
        if isinstance(factor, Rows) and by_row:
            low, high = self._bounds(shape[0])
            outside = (factor.index < low) | (factor.index >= high)
            return Rows((factor.index - low).masked_fill(outside, 0), factor.rows.masked_fill(outside.unsqueeze(2), 0))
        side = {Outer: "left" if by_row else "right", Rows: "rows", Dense: "grad"}[type(factor)]
        low, high = self._bounds(getattr(factor, side).shape[-1])
        return replace(factor, **{side: getattr(factor, side)[..., low:high]})

    def _bounds(self, size: int) -> tuple[int, int]:
        return self.number * size // self.count, (self.number + 1) * size // self.count


def n_bytes(factor: Factor) -> int:
    """What keeping a factor costs; an activation that several weights share is counted with each."""
    return sum(x.nbytes for x in vars(factor).values() if isinstance(x, Tensor))


def room(memory: float, taken: float, least: float, what: str) -> float:
    """Bytes of `memory` left beside those `taken` all along. Raises ValueError unless these are the `least` wanted."""
    if memory - taken < least:
        raise ValueError(
            f"memory: {memory:.3g} bytes given, but {what} needs {least:.3g} beside the {taken:.3g} of a pass and of "
            f"the products; give at least {1.01 * (taken + least):.3g}, or fewer examples"
        )
    return memory - taken


def groups(sizes: dict[str, tuple[float, float]], memory: float, taken: float) -> list[list[str]]:
    """Consecutive parameters together, as many as fit, the last layers first: their backward pass stops early.

    `sizes` are bytes, and how many of them no cut makes smaller. A parameter that does not fit by itself stands in as
    many groups of its own as it has parts. Raises ValueError where that does not help.
    """
    least = {name: fixed + (size - fixed) / MOST_PARTS for name, (size, fixed) in sizes.items()}
    largest = max(least, key=lambda name: least[name])
    free = room(memory, taken, least[largest], largest)
    found: list[list[str]] = []
    left = -1.0
    for name in reversed(sizes):
        size, fixed = sizes[name]
        if size > free:
            found += [[name]] * math.ceil((size - fixed) / (free - fixed))
            left = -1.0
            continue
        if size > left:
            found.append([])
            left = free
        found[-1].append(name)
        left -= size
    return found
