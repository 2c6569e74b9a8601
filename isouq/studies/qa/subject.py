"""A study's settings, and a loaded model with the questions that it is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import Tensor

from isouq.gradients import Engine
from isouq.language.generation import stop_token_ids
from isouq.studies import require
from isouq.studies.qa import data, generation
from isouq.studies.qa.data import DataSet, Question
from isouq.studies.qa.rivals import Entailment
from isouq.studies.qa.sentences import SentenceEncoder

Record = dict[str, Any]  # what a stage keeps of a question
DTYPES = ("float32", "bfloat16")  # float16 has too small a range for squares of gradients
N_TRUE_SHOTS = 4  # solved examples in the prompt of P(True), true and false in turn


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a study asks and scores.

    Those of `identity` decide which numbers result, the others how much is computed and where it is kept. `nli` is the
    Hub id of a model that judges by entailment whether samples mean the same; without one their embeddings do. `chat`
    asks through the tokenizer's chat template, except for P(True). No samples, no rivals that need them. `judge` is
    such a model, too: its verdict on free answers stands beside the others. `device_map` is accelerate's: "auto" fills
    the GPUs, None is the CPU.

    Raises ValueError for a count, dtype or engine out of bounds, and for a single sample, which has no entropy.
    """

    seed: int = 0
    n_shots: int = 5
    max_new_tokens: int = 24
    engine: Engine = "auto"
    n_samples: int = 10
    nli: str | None = None
    judge: str | None = None
    chat: bool = False
    dtype: str = "float32"
    device_map: str | None = None
    n_questions: int = 120
    n_choice: int | None = None  # choices also read as one among the references, under p_c; None for all
    n_token_mean: int = 40  # questions also scored by `token_mean`, which costs a backward pass per token
    batch_size: int = 8
    store_dir: str = "build/store"
    records_dir: str | None = None  # committed records: read before a run, written as it goes

    def __post_init__(self) -> None:
        require.seed("seed", self.seed)
        require.one_of("engine", self.engine, get_args(Engine))
        require.one_of("dtype", self.dtype, DTYPES)
        least = {"n_shots": 0, "n_token_mean": 0, "max_new_tokens": 1, "n_questions": 1, "batch_size": 1}
        least |= {"n_choice": 0} if self.n_choice is not None else {}
        for name, bound in (least | ({"n_samples": 2} if self.n_samples else {})).items():
            require.count(name, getattr(self, name), bound)

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide numbers. A store is bound to these alone, so a larger run extends it."""
        names = ("seed", "n_shots", "max_new_tokens", "engine", "n_samples")
        default = {"judge": None, "chat": False, "dtype": "float32", "device_map": None}  # newer than the first stores
        newer = {name: getattr(self, name) for name, value in default.items() if getattr(self, name) != value}
        return {name: getattr(self, name) for name in names} | {"nli": self.nli or ""} | newer


@dataclass(frozen=True)
class Subject:
    """A loaded model with its questions and, in the same order, their prompts as token ids.

    `shots` are the solved examples of P(True) with their own prompts. `nli` says whether samples mean the same, `judge`
    which references a free answer entails, and `encoder` gives the embeddings of texts, (text, dimension), of unit
    length.
    """

    model: Any
    tokenizer: Any
    data_set: DataSet
    questions: Sequence[Question]
    prompts: Sequence[Sequence[int]]
    shots: Sequence[tuple[Question, Sequence[int]]] = ()
    choose: bool = False
    chat: bool = False
    nli: Entailment | None = None
    judge: Entailment | None = None
    encoder: Callable[[Sequence[str]], Tensor] | None = None

    @functools.cached_property
    def stops(self) -> Any:
        """The ids that end an answer."""
        return stop_token_ids(self.tokenizer, self.model)

    @functools.cached_property
    def encode(self) -> Callable[[Sequence[str]], Tensor]:
        """The `encoder`, or all-MiniLM-L6-v2."""
        return self.encoder or SentenceEncoder()

    def bare_prompt(self, question: Question) -> list[int]:
        """Return a question's prompt without prefix and examples."""
        text = replace(self.data_set, prefix="").prompt(question)
        return generation.encode_prompts(self.tokenizer, [text], chat=self.chat)[0]

    def reference_ids(self, question: Question) -> list[list[int]]:
        """Return the ids of a question's reference answers, true ones first, as they follow a prompt."""
        texts, before = [*question.answers, *question.false_answers], "" if self.chat else " "
        return [generation.encode_answer(self.tokenizer, text, before) for text in texts]


def prepare(
    model: Any,
    tokenizer: Any,
    data_set: DataSet,
    settings: Settings,
    *,
    choose: bool = False,
    others: DataSet | None = None,
    nli: Entailment | None = None,
    judge: Entailment | None = None,
    encoder: Callable[[Sequence[str]], Tensor] | None = None,
) -> Subject:
    """Draw the questions and write their prompts; a set with an official prefix is asked without examples.

    The solved examples of P(True) come from the set too, or from `others` where all of it is to be asked. Raises
    ValueError for `chat` with a tokenizer that has no chat template.
    """
    if settings.chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat: the model's tokenizer has no chat template; leave it False, or take an instruct model")
    n_shots, n_true = 0 if data_set.prefix else settings.n_shots, N_TRUE_SHOTS if settings.n_samples else 0
    n_held_out = n_shots + (n_true if others is None else 0)
    questions, held_out = data.sample(data_set, settings.n_questions, n_shots=n_held_out, seed=settings.seed)
    shots, true_shots = held_out[:n_shots], held_out[n_shots:]
    if others is not None and n_true:
        true_shots = data.sample(others, 1, n_shots=n_true, seed=settings.seed)[1]
    texts = [data_set.prompt(question, shots) for question in [*questions, *true_shots]]
    prompts = generation.encode_prompts(tokenizer, texts, chat=settings.chat)
    solved = list(zip(true_shots, prompts[len(questions) :], strict=True))
    asked = prompts[: len(questions)]
    return Subject(model, tokenizer, data_set, questions, asked, solved, choose, settings.chat, nli, judge, encoder)
