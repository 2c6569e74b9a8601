"""The inputs on which costs are measured: real texts with a language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from isouq.estimate import Estimate
from isouq.language import scoring
from isouq.studies.qa import data, study


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A model and texts of one length, ids (example, token), of which the last `n_answer` tokens are the answer."""

    model: Any
    ids: Tensor
    n_answer: int
    tokenizer: Any = None

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, n: int) -> Texts:
        """The first n examples."""
        return replace(self, ids=self.ids[:n])

    def objective(self, module: Callable[..., Any], ids: Tensor, **replaced: Tensor) -> Tensor:
        """S of each answer in nats, (example,), differentiable, from logits at the answer's own positions only.

        `replaced` are the module's arguments in place of the ids.
        """
        arguments = replaced or {"input_ids": ids[:, :-1]}
        logits = module(**arguments, use_cache=False, logits_to_keep=self.n_answer).logits
        return logits.log_softmax(-1).gather(2, ids[:, -self.n_answer :, None]).sum((1, 2))

    def scores(self, **options: Any) -> Estimate:
        """`isouq.score_tokens`, in one batch."""
        answer = torch.arange(self.ids.shape[1]) >= self.ids.shape[1] - self.n_answer
        return scoring.score_tokens(self.model, self.ids, answer.expand_as(self.ids), batch_size=len(self), **options)


def texts(model: Any, tokenizer: Any, *, n_examples: int, n_tokens: int, n_answer: int, seed: int = 0) -> Texts:
    """Solved questions of TriviaQA, one text per example, cut on the left to `n_tokens` (the first token stays).

    The last `n_answer` tokens of the text stand for the answer: what a token says does not change what it costs.
    """
    if not 0 < n_answer < n_tokens:
        raise ValueError(f"n_answer: {n_answer} given, from 1 to n_tokens − 1 = {n_tokens - 1} wanted")
    triviaqa = study.load_questions("triviaqa")
    n_lines = n_tokens // 8 + 2  # a question with its answer is longer than eight tokens
    questions, _ = data.sample(triviaqa, n_examples * n_lines, n_shots=0, seed=seed)
    rows = []
    for start in range(0, len(questions), n_lines):
        *solved, last = questions[start : start + n_lines]
        ids = tokenizer(f"{triviaqa.prompt(last, solved)} {last.answers[0]}")["input_ids"]
        rows.append([ids[0], *ids[len(ids) - n_tokens + 1 :]])
    return Texts(model=model, ids=torch.tensor(rows), n_answer=n_answer, tokenizer=tokenizer)
