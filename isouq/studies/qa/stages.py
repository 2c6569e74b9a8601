"""The stages of a study: question, answer and verdict, estimate, token_mean; each record is stored once it is done.

What decides a stored record is in this module and those that it imports; `isouq.studies.identity.code` starts here. How
a model and a data set are found (`isouq.studies.qa.study`, `isouq.studies.assets`) is not in them: their content is
compared instead.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from isouq.estimate import Aggregation, Estimate
from isouq.gradients import Engine
from isouq.language import scoring
from isouq.language.examples import from_pairs
from isouq.language.generation import Generation, stop_token_ids
from isouq.studies.qa import candidates, data, generation, judge
from isouq.studies.qa.data import DataSet, Question
from isouq.studies.store import Store

Records = dict[str, dict[str, Any]]  # one question's records by stage


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a study asks and scores. The last four decide how much is computed and not which numbers result."""

    seed: int = 0
    n_shots: int = 5
    max_new_tokens: int = 24
    engine: Engine = "auto"
    n_questions: int = 120
    n_token_mean: int = 40  # questions also scored by `token_mean`, which costs a backward pass per token
    batch_size: int = 8
    store_dir: str = "build/store"

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide numbers. A store is bound to these alone, so a larger run extends it."""
        return {name: getattr(self, name) for name in ("seed", "n_shots", "max_new_tokens", "engine")}


@dataclass(frozen=True)
class Subject:
    """A loaded model with its questions and, in the same order, their prompts as token ids."""

    model: Any
    tokenizer: Any
    questions: Sequence[Question]
    prompts: Sequence[Sequence[int]]
    choose: bool = False

    @functools.cached_property
    def stops(self) -> Any:
        """The ids that end an answer."""
        return stop_token_ids(self.tokenizer, self.model)


def prepare(model: Any, tokenizer: Any, data_set: DataSet, settings: Settings, *, choose: bool = False) -> Subject:
    """Draw the questions and write their prompts; a set with an official prefix is asked without examples."""
    n_shots = 0 if data_set.prefix else settings.n_shots
    questions, shots = data.sample(data_set, settings.n_questions, n_shots=n_shots, seed=settings.seed)
    prompts = generation.encode_prompts(tokenizer, [data_set.prompt(question, shots) for question in questions])
    return Subject(model, tokenizer, questions, prompts, choose)


def complete(store: Store, subject: Subject, settings: Settings, *, progress: bool | None = None) -> None:
    """Compute every record that the store lacks: question, answer and verdict, estimate, token_mean."""
    for question in subject.questions:
        if store.missing("question", [question.item_id]):
            store.put(question.item_id, {"question": asdict(question)})
    _answer_all(store, subject, settings, progress)
    _score_all(store, subject, settings, progress)


def answer(subject: Subject, rows: Sequence[int], max_new_tokens: int) -> list[Records]:
    """Answer some questions and judge the answers: records `answer` and `verdict`, in the order of `rows`.

    The answer is the model's greedy completion or, in a choice, the reference answer of the highest log p.
    """
    questions, prompts = [subject.questions[row] for row in rows], [subject.prompts[row] for row in rows]
    if subject.choose:
        texts = [[*question.answers, *question.false_answers] for question in questions]
        ids = [[generation.encode_answer(subject.tokenizer, text) for text in group] for group in texts]
        log_probs = candidates.candidate_log_probs(subject.model, prompts, ids)
        return [_chosen(*row) for row in zip(questions, ids, (scores.tolist() for scores in log_probs), strict=True)]
    answers = generation.generate(
        subject.model, subject.tokenizer, prompts, stops=subject.stops, max_new_tokens=max_new_tokens
    )
    return [_generated(*row) for row in zip(questions, answers, strict=True)]


def _answer_all(store: Store, subject: Subject, settings: Settings, progress: bool | None) -> None:
    lengths = [len(prompt) for prompt in subject.prompts]
    batches = _Batches(store, subject, settings.batch_size, progress)
    batches.fill("answer", lambda rows: answer(subject, rows, settings.max_new_tokens), lengths)


def _score_all(store: Store, subject: Subject, settings: Settings, progress: bool | None) -> None:
    answers = {item_id: record["token_ids"] for item_id, record in store.get("answer").items() if record["text"]}
    ids = [answers.get(question.item_id, []) for question in subject.questions]
    lengths = [len(prompt) + len(answer) if answer else 0 for prompt, answer in zip(subject.prompts, ids, strict=True)]

    def score(rows: list[int], stage: str, aggregations: tuple[Aggregation, ...]) -> list[Records]:
        how = scoring.Scoring(aggregations=aggregations, engine=settings.engine, batch_size=len(rows))
        results = scoring.score(subject.model, from_pairs((subject.prompts[row], ids[row]) for row in rows), how)
        return [{stage: {name: _record(found, i) for name, found in results.items()}} for i in range(len(rows))]

    batches = _Batches(store, subject, settings.batch_size, progress)
    batches.fill("estimate", lambda rows: score(rows, "estimate", ("sequence", "geometric")), lengths)
    # Its cost is the longest answer of a batch, so here answers of like length go together.
    lengths = [len(answer) if row < settings.n_token_mean else 0 for row, answer in enumerate(ids)]
    batches.fill("token_mean", lambda rows: score(rows, "token_mean", ("token_mean",)), lengths)


@dataclass(frozen=True)
class _Batches:
    """Fills a stage of the store: batches of similar length, longest first, one transaction a question."""

    store: Store
    subject: Subject
    batch_size: int
    progress: bool | None

    def fill(self, stage: str, work: Callable[[list[int]], list[Records]], lengths: Sequence[int]) -> None:
        """Call `work` on the rows that lack a record of `stage`; rows of length 0 are left out."""
        item_ids = [question.item_id for question in self.subject.questions]
        missing = set(self.store.missing(stage, item_ids))
        rows = [row for row, item_id in enumerate(item_ids) if lengths[row] and item_id in missing]
        rows.sort(key=lambda row: -lengths[row])
        n_all = sum(map(bool, lengths))
        hide = None if self.progress is None else not self.progress
        with tqdm(total=n_all, initial=n_all - len(rows), desc=stage, unit="question", disable=hide) as bar:
            for batch in (rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)):
                start = time.perf_counter()
                records = work(batch)
                seconds = (time.perf_counter() - start) / len(batch)
                for row, record in zip(batch, records, strict=True):
                    record[stage]["seconds"] = seconds
                    self.store.put(item_ids[row], record)
                bar.update(len(batch))


def _generated(question: Question, answer: Generation) -> Records:
    right = answer.text != "" and judge.exact_match(answer.text, question.answers)
    return {"answer": asdict(answer), "verdict": {"right": right}}


def _chosen(question: Question, candidates: Sequence[Sequence[int]], log_probs: Sequence[float]) -> Records:
    """Return the records of a choice among candidates, true ones first, by log p (a sum over tokens)."""
    n_true = len(question.answers)
    texts = [*question.answers, *question.false_answers]
    best = int(np.argmax(log_probs))
    best_mean = int(np.argmax([s / len(ids) for s, ids in zip(log_probs, candidates, strict=True)]))
    answer = {"token_ids": list(candidates[best]), "text": texts[best], "ended_by": "given"}
    answer["candidates"] = [[len(ids), s] for ids, s in zip(candidates, log_probs, strict=True)]
    verdict = {"right": best < n_true, "right_by_mean": best_mean < n_true, "right_by_chance": n_true / len(texts)}
    return {"answer": answer, "verdict": verdict}


def _record(estimate: Estimate, row: int) -> dict[str, Any]:
    names = ("log_prob", "n_tokens", "probability", "aleatoric", "log_epistemic")
    values = {name: getattr(estimate, name)[row].item() for name in names}
    return {**values, "engine": estimate.engine, "n_parameters": estimate.n_parameters}
