"""Token sequences for a causal model: what is refused, how padding is removed, which sequences share a batch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


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


def checked(
    model: nn.Module, input_ids: Tensor, answer_mask: Tensor, attention_mask: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """(ids, answer) of each example without its padding, after every check that needs no forward pass."""
    _check_model(model)
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
    if answer_mask.shape != input_ids.shape:
        raise ValueError(
            f"answer_mask: {_kind(answer_mask)} given, the shape of input_ids {tuple(input_ids.shape)} wanted"
        )
    present = torch.ones_like(answer_mask) if attention_mask is None else attention_mask.bool()
    if present.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: {_kind(present)} given, the shape of input_ids {tuple(input_ids.shape)} wanted"
        )
    return [
        _check_example(model, i, *example)
        for i, example in enumerate(zip(input_ids, answer_mask, present, strict=True))
    ]


def _kind(value: Tensor) -> str:
    return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} given, a torch.nn.Module wanted")
    drops = [
        n for n, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0
    ]
    config = getattr(model, "config", None)
    if model.training and config is not None:
        settings = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        drops += [k for k, v in settings.items() if "drop" in k and isinstance(v, float) and v > 0]
    if drops:
        raise ValueError(
            f"model: in training mode with dropout ({drops[0]}), which makes scores random; call model.eval()"
        )


def _check_example(model: nn.Module, i: int, ids: Tensor, answer: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """One example without padding and without what follows its answer, or an error that names it."""
    places = present.nonzero().flatten()
    if not len(places) or len(places) != places[-1] - places[0] + 1:
        raise ValueError(
            f"attention_mask: example {i} has {'no token' if not len(places) else 'a hole'}, one run wanted"
        )
    if (answer & ~present).any():
        raise ValueError(f"answer_mask: example {i} marks padding as its answer; attention_mask must be 1 there")
    ids, answer = ids[present].long(), answer[present]
    marked = answer.nonzero().flatten()
    if not len(marked):
        raise ValueError(f"answer_mask: example {i} has no answer token, at least one wanted")
    if marked[0] == 0:
        raise ValueError(
            f"answer_mask: example {i} marks its first token, which nothing predicts; put a prompt before it"
        )
    ids, answer = ids[: marked[-1] + 1], answer[: marked[-1] + 1]
    _check_ids(model, i, ids)
    return ids, answer


def limits(model: nn.Module) -> tuple[int | None, int | None]:
    """The size of the model's vocabulary and of its context in tokens, where its config tells."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)


def _check_ids(model: nn.Module, i: int, ids: Tensor) -> None:
    vocabulary, context = limits(model)
    if vocabulary is not None and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(f"input_ids: example {i} has id {wrong}, ids from 0 to {vocabulary - 1} wanted")
    if context is not None and len(ids) - 1 > context:
        raise ValueError(
            f"input_ids: example {i} has {len(ids)} tokens, at most the model's context of {context} wanted"
        )


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
