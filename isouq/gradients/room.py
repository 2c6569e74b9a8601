"""What fits the memory: which parameters' factors are kept at a time, and the parts that a large one is cut into.

The head of a vocabulary of 262,144 words has a factor of 1 MB for every answer token. ⟨g_i, g_j⟩ is a sum over the
weight's rows, so a part of the rows at a time does it: the columns `low:high` of an Outer's left side, and of an
embedding's Rows the tokens with an id in that range.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from isouq.gradients.factors import Dense, Factor, Outer, Rows

Sizes = dict[str, tuple[float, float]]  # bytes by parameter, and how many of them no cut makes smaller
MOST_PARTS = 64  # each costs a sweep over all batches


def cut(factor: Factor, shape: torch.Size, number: int, count: int) -> Factor:
    """The `number`-th of `count` equal parts of a factor of a parameter of this `shape`, cut along its longer axis."""
    if count == 1:
        return factor
    by_row = len(shape) < 2 or shape[-2] >= shape[-1]
    side = {Outer: "left" if by_row else "right", Rows: "rows", Dense: "grad"}[type(factor)]
    x = getattr(factor, side)
    size = shape[0] if by_row and isinstance(factor, Rows) else x.shape[-1]
    low, high = (k * size // count for k in (number, number + 1))
    if isinstance(factor, Rows) and by_row:
        outside = (factor.index < low) | (factor.index >= high)
        return Rows((factor.index - low).masked_fill(outside, 0), x.masked_fill(outside.unsqueeze(2), 0))
    return replace(factor, **{side: x[..., low:high]})


def n_bytes(factor: Factor) -> int:
    """What a factor takes until it is multiplied; an activation that several weights share is counted with each."""
    size = sum(x.nbytes for x in vars(factor).values() if isinstance(x, Tensor))
    return 2 * size if isinstance(factor, Dense) else size  # all of one are put together once more


def room(memory: float, taken: float, least: float, what: str) -> float:
    """Bytes of `memory` left beside those `taken` all along. Raises ValueError unless these are the `least` wanted.

    A third more than `taken` and `least` is enough, where passes and buffers grow with the memory up to its quarter.
    """
    if not memory > 0:
        raise ValueError(f"memory: {memory} given, a number of bytes above 0 wanted")
    if memory - taken <= least:
        need = f"{what} takes {least:.3g} and all else {taken:.3g}; give {1.34 * (taken + least):.3g} or more"
        raise ValueError(f"memory: {memory:.3g} bytes given, but {need}, or fewer or shorter examples")
    return memory - taken


def groups(sizes: Sizes, memory: float, taken: float) -> list[list[str]]:
    """Consecutive parameters together, as many as fit, the last layers first: their backward pass stops early.

    A parameter that does not fit by itself stands in as many groups of its own as it has parts. Raises ValueError where
    that does not help.
    """
    free = room(memory, taken, *max((fixed + (size - fixed) / MOST_PARTS, n) for n, (size, fixed) in sizes.items()))
    found: list[list[str]] = []
    left = -1.0
    for name in reversed(sizes):
        size, fixed = sizes[name]
        if size > left:  # as it does after one that was cut, for which nothing is left
            found += [[name] for _ in range(1, math.ceil((size - fixed) / (free - fixed)))] + [[]]
            left = free
        found[-1].append(name)
        left -= size
    return found
