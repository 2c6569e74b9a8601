"""Token sequences with an answer: `Example`, from which scores are computed, and the batches that a model is given."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from isouq.gradients.model import ExampleError

BatchSize = int | Literal["auto"]
# What a library may raise for one row. The row reports it, and the others are scored.
ROW_ERRORS = (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AssertionError, MemoryError)


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence without padding, cut after the last token of its answer.

    ids (token,) int64; answer (token,) bool, True where ids[t] is an answer's token. An answer may have gaps.
    """

    ids: Int[Tensor, " token"]
    answer: Bool[Tensor, " token"]

    def __len__(self) -> int:
        """The number of tokens, prompt and answer."""
        return len(self.ids)

    @property
    def n_answer(self) -> int:
        """The number of answer tokens."""
        return int(self.answer.sum())


def from_pairs(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Example]:
    """One example for each pair (prompt ids, answer ids), neither of them empty."""
    examples = []
    for i, (prompt, answer) in enumerate(pairs):
        if not len(prompt) or not len(answer):
            raise ExampleError("pairs: {} has no prompt or no answer token, at least one of each wanted", i)
        ids = torch.tensor([*prompt, *answer], dtype=torch.int64)
        examples.append(Example(ids, torch.arange(len(ids)) >= len(prompt)))
    return examples


def from_rectangle(input_ids: Tensor, answer_mask: Tensor, attention_mask: Tensor | None = None) -> list[Example]:
    """One example for each row of tensors (example, token), the form of ids in the public functions.

    Raises TypeError or ValueError, naming the argument, what was given and what is wanted.
    """
    given = {"input_ids": input_ids, "answer_mask": answer_mask, "attention_mask": attention_mask}
    for name, value in given.items():
        if not isinstance(value, Tensor) and not (name == "attention_mask" and value is None):
            raise TypeError(f"{name}: {type(value).__name__} given, a torch.Tensor wanted")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids: {_kind(input_ids)} given, (example, token) int64 wanted")
    if answer_mask.dtype is not torch.bool:
        raise TypeError(f"answer_mask: {answer_mask.dtype} given, torch.bool wanted")
    for name, value in given.items():
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(f"{name}: {_kind(value)} given, the shape of input_ids {tuple(input_ids.shape)} wanted")
    present = torch.ones_like(answer_mask) if attention_mask is None else attention_mask.bool()
    return [_from_row(i, *row) for i, row in enumerate(zip(input_ids, answer_mask, present, strict=True))]


def _kind(value: Tensor) -> str:
    return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"


def _from_row(i: int, ids: Tensor, answer: Tensor, present: Tensor) -> Example:
    places, marked = present.nonzero().flatten(), answer.nonzero().flatten()
    if not len(places) or len(places) != places[-1] - places[0] + 1:
        raise ExampleError(f"attention_mask: {{}} has {'a hole' if len(places) else 'no token'}, one run wanted", i)
    if (answer & ~present).any():
        raise ExampleError("answer_mask: {} marks padding as its answer; attention_mask must be 1 there", i)
    if not len(marked):
        raise ExampleError("answer_mask: {} has no answer token, at least one wanted", i)
    if marked[0] == places[0]:
        raise ExampleError("answer_mask: {} marks its first token, which nothing predicts; put a prompt before it", i)
    kept = slice(int(places[0]), int(marked[-1]) + 1)
    return Example(ids[kept].long(), answer[kept])


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right, which a causal model does not see.

    ids (example, token) int64; answer (example, token) True where ids[t] is an answer's token; rows: the examples'
    places in the caller's order.
    """

    ids: Int[Tensor, "example token"]
    answer: Bool[Tensor, "example token"]
    rows: list[int]

    @classmethod
    def of(cls, examples: Sequence[Example], rows: Sequence[int]) -> Batch:
        """The batch of the examples in these `rows`."""
        ids, answer = ([getattr(examples[row], name) for row in rows] for name in ("ids", "answer"))
        return cls(pad_sequence(ids, batch_first=True), pad_sequence(answer, batch_first=True), list(rows))

    def part(self, rows: slice) -> Batch:
        """Part of the examples, without the padding that only the others needed."""
        answer = self.answer[rows]
        width = int(answer.any(0).nonzero().max()) + 1
        return replace(self, ids=self.ids[rows, :width], answer=answer[:, :width], rows=self.rows[rows])

    def padded(self, n_tokens: int) -> Batch:
        """The same examples with more padding after the last token."""
        ids, answer = (nn.functional.pad(x, (0, n_tokens)) for x in (self.ids, self.answer))
        return replace(self, ids=ids, answer=answer)


TOKENS_PER_BATCH = 2048  # the target of "auto": large enough for the matrix products, small in memory


def batches(
    examples: Sequence[Example],
    batch_size: BatchSize,
    *,
    cost: Callable[[Sequence[Example]], float] | None = None,
    room: float = math.inf,
    by_answer: bool = False,
) -> Iterator[Batch]:
    """Batches of `batch_size` examples of similar length, the longest first.

    "auto" takes as many as have TOKENS_PER_BATCH tokens, padding included, and whose `cost` is within `room`, but at
    least one. `by_answer` sorts by the answer's length first, since `token_mean` makes a pass for each token of the
    longest answer.
    """
    if batch_size != "auto" and (not isinstance(batch_size, Integral) or batch_size < 1):
        raise ValueError(f"batch_size: {batch_size!r} given, a positive integer or 'auto' wanted")
    sizes = [(example.n_answer * by_answer, len(example)) for example in examples]
    rows = sorted(range(len(examples)), key=lambda i: sizes[i], reverse=True)
    while rows:
        n = max(1, TOKENS_PER_BATCH // max(sizes[row][1] for row in rows)) if batch_size == "auto" else batch_size
        if cost is not None:
            n = max(1, bisect_right(range(1, n + 1), room, key=lambda k: cost([examples[row] for row in rows[:k]])))
        yield Batch.of(examples, rows[:n])
        rows = rows[n:]


def each(work: Callable[[list[Any]], list[Any]], items: dict[int, Any], errors: dict[int, Any]) -> dict[int, Any]:
    """`work` of all items, together or, if that fails, one by one; rows that fail alone go to `errors`."""
    if not items:
        return {}
    try:
        return dict(zip(items, work(list(items.values())), strict=True))
    except ROW_ERRORS as error:
        if len(items) > 1:
            return {k: v for row, item in items.items() for k, v in each(work, {row: item}, errors).items()}
        kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
        text = error.about("the row") if isinstance(error, ExampleError) else str(error)
        errors[next(iter(items))] = kind + " ".join(text.split())
        return {}
