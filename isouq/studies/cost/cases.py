"""The inputs on which costs are measured: real texts with a language model, or points with a small classifier."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from isouq import classifier
from isouq.estimate import Estimate
from isouq.language import scoring
from isouq.studies.qa import data, study


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """A model and its inputs, each tensor with the examples on its first axis."""

    model: Any
    inputs: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.inputs[0])

    def first(self, n: int) -> Case:
        """The first n examples."""
        return replace(self, inputs=tuple(x[:n] for x in self.inputs))

    @abstractmethod
    def objective(self, module: Callable[..., Any], *inputs: Tensor) -> Tensor:
        """S, the log-probability of each example's answer in nats, (example,), differentiable."""

    @abstractmethod
    def scores(self, **options: Any) -> Estimate:
        """isouq's estimates for the examples, in one batch."""


@dataclass(frozen=True, kw_only=True)
class Texts(Case):
    """Texts of one length, ids (example, token), of which the last `n_answer` tokens are the answer."""

    n_answer: int
    tokenizer: Any = None

    @property
    def ids(self) -> Tensor:
        """The ids, (example, token)."""
        return self.inputs[0]

    def objective(self, module: Callable[..., Any], *inputs: Tensor, **replaced: Tensor) -> Tensor:
        """S of each answer, with logits at its own positions only; `replaced` are arguments in place of the ids."""
        arguments = replaced or {"input_ids": inputs[0][:, :-1]}
        logits = module(**arguments, use_cache=False, logits_to_keep=self.n_answer).logits
        return logits.log_softmax(-1).gather(2, inputs[0][:, -self.n_answer :, None]).sum((1, 2))

    def scores(self, **options: Any) -> Estimate:
        """`isouq.score_tokens`."""
        answer = torch.arange(self.ids.shape[1]) >= self.ids.shape[1] - self.n_answer
        return scoring.score_tokens(self.model, self.ids, answer.expand_as(self.ids), batch_size=len(self), **options)


@dataclass(frozen=True, kw_only=True)
class Points(Case):
    """Inputs of a classifier, (example, feature), and the classes asked about, (example,)."""

    def objective(self, module: Callable[..., Any], *inputs: Tensor) -> Tensor:
        """Log p of the class."""
        return module(inputs[0]).log_softmax(-1).gather(1, inputs[1][:, None]).squeeze(1)

    def scores(self, **options: Any) -> Estimate:
        """`isouq.score_classes`."""
        return classifier.score_classes(self.model, *self.inputs, **options)


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
    return Texts(model=model, inputs=(torch.tensor(rows),), n_answer=n_answer, tokenizer=tokenizer)


def points(*, n_examples: int, seed: int = 0, sizes: Sequence[int] = (256, 1024, 1024, 10)) -> Points:
    """Random inputs to a random classifier with hidden layers, on which every peer runs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [m for pair in itertools.pairwise(sizes) for m in (nn.Linear(*pair), nn.ReLU())]
        network = nn.Sequential(*layers[:-1]).eval()
        inputs = torch.randn(n_examples, sizes[0])
        return Points(model=network, inputs=(inputs, network(inputs).argmax(1)))


def random_llama(width: int, n_layers: int, *, seed: int = 0) -> Any:
    """A Llama of random weights, for time against size only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: dict[str, Any] = {"vocab_size": 8192, "tie_word_embeddings": True, "num_hidden_layers": n_layers}
    config |= {"hidden_size": width, "intermediate_size": 8 * width // 3}
    config |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**config)).eval()
