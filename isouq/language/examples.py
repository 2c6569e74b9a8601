"""Token sequences for a causal model: what is refused, how padding is removed, which sequences share a batch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from isouq.gradients.checks import ExampleError


@dataclass(frozen=True)
class Batch:
    """Sequences cut after the last answer token and padded on the right, where a causal model cannot see.

    ids (example, token) int64; answer (example, token) True where ids[t] is an answer's token; rows: the examples'
    places in the caller's order.
    """

    ids: Int[Tensor, "example token"]
    answer: Bool[Tensor, "example token"]
    rows: list[int]

    def part(self, rows: slice) -> Batch:
        """Some of the examples, without the padding that only the others needed."""
        answer = self.answer[rows]
        width = int(answer.any(0).nonzero().max()) + 1
        return Batch(self.ids[rows, :width], answer[:, :width], self.rows[rows])

    def padded(self, n_tokens: int) -> Batch:
        """The same with more tokens after the last."""
        ids, answer = (nn.functional.pad(x, (0, n_tokens)) for x in (self.ids, self.answer))
        return Batch(ids, answer, self.rows)


def pad(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return input_ids, answer_mask and attention_mask, each (example, token), padded on the right."""
    n_tokens = max((len(p) + len(a) for p, a in zip(prompts, answers, strict=True)), default=0)
    input_ids = torch.zeros(len(prompts), n_tokens, dtype=torch.long)
    answer_mask = torch.zeros(len(prompts), n_tokens, dtype=torch.bool)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor([*prompt, *answer])
        answer_mask[row, len(prompt) : end] = True
        attention_mask[row, :end] = 1
    return input_ids, answer_mask, attention_mask


def checked(
    model: nn.Module, input_ids: Tensor, answer_mask: Tensor, attention_mask: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """(ids, answer) of each example without its padding, after every check of the ids that needs no forward pass."""
    given = {"input_ids": input_ids, "answer_mask": answer_mask, "attention_mask": attention_mask}
    for name, value in given.items():
        if not isinstance(value, Tensor) and not (name == "attention_mask" and value is None):
            raise TypeError(f"{name}: {type(value).__name__} given, a torch.Tensor wanted")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids: {_kind(input_ids)} given, (example, token) int64 wanted")
    if not len(input_ids):
        raise ValueError("input_ids: no example given, at least one wanted")
    if answer_mask.dtype is not torch.bool:
        raise TypeError(f"answer_mask: {answer_mask.dtype} given, torch.bool wanted")
    for name, value in given.items():
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(f"{name}: {_kind(value)} given, the shape of input_ids {tuple(input_ids.shape)} wanted")
    present = torch.ones_like(answer_mask) if attention_mask is None else attention_mask.bool()
    return [
        _check_example(model, i, *example)
        for i, example in enumerate(zip(input_ids, answer_mask, present, strict=True))
    ]


def _kind(value: Tensor) -> str:
    return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"


def _check_example(model: nn.Module, i: int, ids: Tensor, answer: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """One example without padding and without what follows its answer, or an error that names it."""
    places = present.nonzero().flatten()
    if not len(places) or len(places) != places[-1] - places[0] + 1:
        raise ExampleError(f"attention_mask: {{}} has {'a hole' if len(places) else 'no token'}, one run wanted", i)
    if (answer & ~present).any():
        raise ExampleError("answer_mask: {} marks padding as its answer; attention_mask must be 1 there", i)
    ids, answer = ids[present].long(), answer[present]
    marked = answer.nonzero().flatten()
    if not len(marked):
        raise ExampleError("answer_mask: {} has no answer token, at least one wanted", i)
    if marked[0] == 0:
        raise ExampleError("answer_mask: {} marks its first token, which nothing predicts; put a prompt before it", i)
    ids, answer = ids[: marked[-1] + 1], answer[: marked[-1] + 1]
    _check_ids(model, i, ids)
    return ids, answer


def limits(model: nn.Module) -> tuple[int | None, int | None]:
    """The size of the model's vocabulary and of its context in tokens, where its config tells (−1: no limit)."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings"))
    vocabulary, context = (size if isinstance(size, int) and size > 0 else None for size in sizes)
    return vocabulary, context


def _check_ids(model: nn.Module, i: int, ids: Tensor) -> None:
    vocabulary, context = limits(model)
    if vocabulary is not None and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ExampleError(f"input_ids: {{}} has id {wrong}, ids from 0 to {vocabulary - 1} wanted", i)
    if context is not None and len(ids) - 1 > context:
        raise ExampleError(f"input_ids: {{}} has {len(ids)} tokens, at most the model's context of {context} wanted", i)


TOKENS_PER_BATCH = 2048  # what "choose for me" aims at: large enough for the matrix products, small in memory


def batches(
    sequences: list[tuple[Tensor, Tensor]],
    batch_size: int | Literal["auto"],
    *,
    cost: Callable[[list[tuple[Tensor, Tensor]]], float] | None = None,
    room: float = math.inf,
    by_answer: bool = False,
) -> Iterator[Batch]:
    """Similar lengths together, the longest first, `batch_size` a batch.

    "auto": as many as have TOKENS_PER_BATCH tokens, padding included, and `cost` no more than `room`; one at least.
    `by_answer` puts answers of similar length together first: `token_mean` makes a pass for each token of the longest.
    """
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size: {batch_size!r} given, a positive integer or 'auto' wanted")
    sizes = [(int(answer.sum()) * by_answer, len(ids)) for ids, answer in sequences]
    rows = sorted(range(len(sequences)), key=lambda i: sizes[i], reverse=True)
    while rows:
        n = max(1, TOKENS_PER_BATCH // max(sizes[row][1] for row in rows)) if batch_size == "auto" else batch_size
        if cost is not None:
            n = max(1, bisect_right(range(1, n + 1), room, key=lambda k: cost([sequences[row] for row in rows[:k]])))
        chosen, rows = rows[:n], rows[n:]
        longest = max(sizes[row][1] for row in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        answer = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for place, row in enumerate(chosen):
            tokens, marks = sequences[row]
            ids[place, : len(tokens)], answer[place, : len(tokens)] = tokens, marks
        yield Batch(ids, answer, chosen)
