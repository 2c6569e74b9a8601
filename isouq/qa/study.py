"""One study: a model answers a data set's questions, every answer is judged and scored, every record is kept.

`run` is what the chapter calls; ``python -m isouq.qa.study --profile … --model … --data-set … --done …``
is the same as a job of the pipeline. Whatever a store already holds is not computed again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from tqdm import tqdm

from isouq import assets, causal_lm, identity, profiles
from isouq.estimate import Aggregation, Estimate
from isouq.gradients import Engine
from isouq.qa import data, generation, judge
from isouq.qa.data import DataSet, Question
from isouq.qa.store import Store, code_digest, store_path
from isouq.sequences import pad

# The study's data sets with asset and file; in "truthfulqa_choose" the model picks a reference answer.
DATA_SETS = {
    "triviaqa": ("triviaqa", "data-00000-of-00001.arrow"),
    "wikidata": ("wikidata", "task.json"),
    "truthfulqa_choose": ("truthfulqa", "questions.json"),
}
CODE = ("estimate", "gradients", "causal_lm", "qa/data", "qa/generation", "qa/judge", "qa/study")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a study asks and scores. The last four only decide how much is computed, not what comes out."""

    seed: int = 0
    n_shots: int = 5
    max_new_tokens: int = 24
    engine: Engine = "auto"
    n_questions: int = 120
    n_token_mean: int = 40  # questions also scored by `token_mean`, which costs a backward pass per token
    batch_size: int = 8
    store_dir: str = "build/store"

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide numbers. A store is bound to these: a larger run extends it."""
        return {name: getattr(self, name) for name in ("seed", "n_shots", "max_new_tokens", "engine")}


@dataclass(frozen=True)
class Subject:
    """A loaded model with its questions and, in the same order, their prompts as token ids."""

    model: Any
    tokenizer: Any
    questions: Sequence[Question]
    prompts: Sequence[Sequence[int]]
    choose: bool = False


def run(model: str, data_set: str, settings: Settings, *, progress: bool | None = None) -> pd.DataFrame:
    """Answer, judge and score what the store does not hold yet, and return one row per question.

    `model` is an asset's name, a Hub id or a folder; `data_set` one of DATA_SETS. Columns: see `tabulate`.
    `progress`: True or False, None shows bars at a terminal only.

    Raises ValueError on an unknown data set, on too few questions in it, and StoreError as `Store` does.
    """
    if data_set not in DATA_SETS:
        raise ValueError(f"data_set must be one of {', '.join(DATA_SETS)}, got {data_set!r}")
    lm, tokenizer, fingerprint = _load_model(model)
    asset, file = DATA_SETS[data_set]
    content = data.load(asset, assets.path(asset, file))
    subject = prepare(lm, tokenizer, content, settings, choose=data_set.endswith("_choose"))
    wanted = {
        "model": model,
        "weights": fingerprint,
        "data_set": data_set,
        "settings": settings.identity(),
        "code": code_digest(Path(__file__).parents[1], CODE),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    path = store_path(Path(settings.store_dir), f"{model}--{data_set}", wanted)
    with Store(path, wanted) as store:
        complete(store, subject, settings, progress=progress)
        return tabulate(store, subject.questions)


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


def _answer_all(store: Store, subject: Subject, settings: Settings, progress: bool | None) -> None:
    stops = generation.stop_token_ids(subject.tokenizer, subject.model)

    def generate(rows: list[int]) -> list[dict[str, dict[str, Any]]]:
        prompts = [subject.prompts[row] for row in rows]
        answers = generation.generate(
            subject.model, subject.tokenizer, prompts, stops=stops, max_new_tokens=settings.max_new_tokens
        )
        return [_generated(subject.questions[row], answer) for row, answer in zip(rows, answers, strict=True)]

    def choose(rows: list[int]) -> list[dict[str, dict[str, Any]]]:
        texts = [[*subject.questions[row].answers, *subject.questions[row].false_answers] for row in rows]
        ids = [[generation.encode_answer(subject.tokenizer, text) for text in group] for group in texts]
        log_probs = generation.candidate_log_probs(subject.model, [subject.prompts[row] for row in rows], ids)
        return [
            _chosen(subject.questions[row], group, scores.tolist())
            for row, group, scores in zip(rows, ids, log_probs, strict=True)
        ]

    lengths = [len(prompt) for prompt in subject.prompts]
    batches = _Batches(store, subject, settings.batch_size, progress)
    batches.fill("answer", choose if subject.choose else generate, lengths)


def _score_all(store: Store, subject: Subject, settings: Settings, progress: bool | None) -> None:
    answers = {item_id: record["token_ids"] for item_id, record in store.get("answer").items() if record["text"]}
    ids = [answers.get(question.item_id, []) for question in subject.questions]
    lengths = [len(prompt) + len(answer) if answer else 0 for prompt, answer in zip(subject.prompts, ids, strict=True)]

    def score(rows: list[int], stage: str, aggregations: tuple[Aggregation, ...]) -> list[dict[str, dict[str, Any]]]:
        tokens = pad([subject.prompts[row] for row in rows], [ids[row] for row in rows])
        results = causal_lm.score_aggregations(
            subject.model, *tokens, aggregations=aggregations, engine=settings.engine, batch_size=len(rows)
        )
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

    def fill(self, stage: str, work: Callable[[list[int]], list[dict[str, Any]]], lengths: Sequence[int]) -> None:
        """Call `work` on the rows that lack a record of `stage`; a row of length 0 has nothing to compute."""
        item_ids = [question.item_id for question in self.subject.questions]
        missing = set(self.store.missing(stage, item_ids))
        rows = [row for row, item_id in enumerate(item_ids) if lengths[row] and item_id in missing]
        rows.sort(key=lambda row: -lengths[row])
        n_all = sum(map(bool, lengths))
        hide = None if self.progress is None else not self.progress
        with tqdm(total=n_all, initial=n_all - len(rows), desc=stage, unit="question", disable=hide) as bar:
            for batch in _chunks(rows, self.batch_size):
                start = time.perf_counter()
                records = work(batch)
                seconds = (time.perf_counter() - start) / len(batch)
                for row, record in zip(batch, records, strict=True):
                    record[stage]["seconds"] = seconds
                    self.store.put(item_ids[row], record)
                bar.update(len(batch))


def tabulate(store: Store, questions: Sequence[Question]) -> pd.DataFrame:
    """Return one row per question, in the order of the draw.

    Columns: item_id, question, reference (an accepted answer), answer, right, wrong, empty, ended_by,
    n_tokens; log_prob (nats), likelihood (its negative), log_gradient (log G); for A = sequence, geometric,
    token_mean: probability_A, aleatoric_A, log_aleatoric_A, log_epistemic_A; seconds_STAGE.
    An empty answer is wrong and has no scores (NaN); nor has token_mean where it was not asked for. In a
    choice also right_by_mean (the verdict, had the mean of log p per token chosen) and right_by_chance (the
    share of true candidates).
    """
    stages = {stage: store.get(stage) for stage in ("answer", "verdict", "estimate", "token_mean")}
    rows = []
    for question in questions:
        answer, verdict = stages["answer"][question.item_id], stages["verdict"][question.item_id]
        row: dict[str, Any] = {"item_id": question.item_id, "question": question.question}
        row |= {
            "reference": question.answers[0],
            "answer": answer["text"],
            "wrong": not verdict["right"],
            **verdict,
        }
        row |= {
            "empty": not answer["text"],
            "ended_by": answer["ended_by"],
            "n_tokens": len(answer["token_ids"]),
        }
        scored = {
            **stages["estimate"].get(question.item_id, {}),
            **stages["token_mean"].get(question.item_id, {}),
        }
        row |= _score_columns(scored)
        row |= {
            f"seconds_{s}": stages[s].get(question.item_id, {}).get("seconds", np.nan) for s in stages if s != "verdict"
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _score_columns(scored: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of one answer by column; log p(1−p) is taken from log p, so it does not underflow."""
    columns: dict[str, float] = {}
    if "sequence" in scored:
        log_prob = scored["sequence"]["log_prob"]
        log_gradient = scored["sequence"]["log_epistemic"] - 2 * log_prob
        columns |= {"log_prob": log_prob, "likelihood": -log_prob, "log_gradient": log_gradient}
    for name in ("sequence", "geometric", "token_mean"):
        found = scored.get(name, {})
        for quantity in ("probability", "aleatoric", "log_epistemic"):
            columns[f"{quantity}_{name}"] = found.get(quantity, np.nan)
        columns[f"log_aleatoric_{name}"] = _log_aleatoric(name, found) if found else np.nan
    return columns


def _log_aleatoric(name: str, found: Mapping[str, float]) -> float:
    if name == "token_mean":
        return float(np.log(max(found["aleatoric"], np.finfo(float).tiny)))
    log_p = found["log_prob"] / (found["n_tokens"] if name == "geometric" else 1)
    # p so near 1 that float64 cannot tell is set to 1 − 2⁻⁵³, the nearest value below.
    return log_p + float(np.log(max(-np.expm1(log_p), 2.0**-53)))


def _generated(question: Question, answer: generation.Generation) -> dict[str, dict[str, Any]]:
    right = not answer.empty and judge.exact_match(answer.text, question.answers)
    return {"answer": asdict(answer), "verdict": {"right": right}}


def _chosen(
    question: Question, candidates: Sequence[Sequence[int]], log_probs: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Return the records of a choice: the candidate of highest log p (a sum over tokens); true ones first."""
    n_true = len(question.answers)
    texts = [*question.answers, *question.false_answers]
    best = int(np.argmax(log_probs))
    best_mean = int(np.argmax([s / len(ids) for s, ids in zip(log_probs, candidates, strict=True)]))
    answer = {"token_ids": list(candidates[best]), "text": texts[best], "ended_by": "given"}
    answer["candidates"] = [[len(ids), s] for ids, s in zip(candidates, log_probs, strict=True)]
    verdict = {
        "right": best < n_true,
        "right_by_mean": best_mean < n_true,
        "right_by_chance": n_true / len(texts),
    }
    return {"answer": answer, "verdict": verdict}


def _record(found: Estimate, row: int) -> dict[str, Any]:
    names = ("log_prob", "n_tokens", "probability", "aleatoric", "log_epistemic")
    values = {name: getattr(found, name)[row].item() for name in names}
    return {**values, "engine": found.engine, "n_parameters": found.n_parameters}


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


@functools.lru_cache(maxsize=1)  # a notebook asks the same model about several sets
def _load_model(name: str) -> tuple[Any, Any, str]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # no bar of loaded weights in a page of the book
    try:
        model, tokenizer = assets.load_causal_lm(name)
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    return model, tokenizer, identity.weights(model, tokenizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one study of a profile as a job, and leave a file that says what was stored."""
    parser = argparse.ArgumentParser(prog="python -m isouq.qa.study", description=main.__doc__)
    parser.add_argument("--profile", required=True, help="a profile's name or its YAML file")
    parser.add_argument("--model", required=True, help="asset name, Hub id or folder")
    parser.add_argument("--data-set", required=True, choices=list(DATA_SETS))
    parser.add_argument("--done", required=True, type=Path, help="written at the end: counts as JSON")
    arguments = parser.parse_args(argv)
    chapter = profiles.load(arguments.profile).parameters("04_llm_qa")
    settings = Settings(**chapter.scoring())  # type: ignore[attr-defined]
    table = run(arguments.model, arguments.data_set, settings, progress=True)
    counts = {"questions": len(table), "right": int(table["right"].sum()), "empty": int(table["empty"].sum())}
    partial = arguments.done.with_name(f"{arguments.done.name}.{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps({"model": arguments.model, "data_set": arguments.data_set, **counts}) + "\n")
    partial.replace(arguments.done)


if __name__ == "__main__":
    main()
