"""One study: a model answers a data set's questions; every answer is judged and scored, and every record is kept.

The chapter and the pipeline's job call `run`, which computes only what the store does not hold yet.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import transformers

from isouq import models
from isouq.studies import assets, identity
from isouq.studies.qa import data, stages
from isouq.studies.qa.data import Question
from isouq.studies.qa.stages import Settings, complete, prepare
from isouq.studies.store import Store, store_path

FILES = {"triviaqa": "data-00000-of-00001.arrow", "wikidata": "task.json", "truthfulqa": "questions.json"}
DATA_SETS = ("triviaqa", "wikidata", "truthfulqa_choose")  # in the last, the model picks a reference answer


def run(model: str, data_set: str, settings: Settings, *, progress: bool | None = None) -> pd.DataFrame:
    """Answer, judge and score what the store does not hold yet, and return one row per question.

    `model` is an asset's name, a Hub id or a folder; `data_set` one of DATA_SETS. Columns: see `tabulate`.
    `progress`: True or False, None shows bars at a terminal only.

    The store serves only what agrees in the model's content (and commit, of a Hub id), the data's, settings, code and
    libraries. Raises ValueError on an unknown data set, on too few questions in it, and StoreError as `Store` does.
    """
    if data_set not in DATA_SETS:
        raise ValueError(f"data_set must be one of {', '.join(DATA_SETS)}, got {data_set!r}")
    lm, tokenizer, fingerprint = _load_model(model)
    asset, choose = data_set.removesuffix("_choose"), data_set.endswith("_choose")
    subject = prepare(lm, tokenizer, load_questions(asset), settings, choose=choose)
    wanted = {
        "model": model,
        "commit": getattr(lm.config, "_commit_hash", None),
        "weights": fingerprint,
        "data_set": data_set,
        "data": hashlib.sha256(assets.path(asset, FILES[asset]).read_bytes()).hexdigest()[:12],
        "choose": choose,
        "settings": settings.identity(),
        "code": identity.code(stages.__name__),
        "versions": identity.versions("tokenizers", "torch", "transformers"),
    }
    path = store_path(Path(settings.store_dir), f"{model}--{data_set}", wanted)
    with Store(path, wanted) as store:
        complete(store, subject, settings, progress=progress)
        return tabulate(store, subject.questions)


def load_questions(asset: str) -> data.DataSet:
    """Return all questions of an asset: triviaqa, wikidata or truthfulqa."""
    return data.load(asset, assets.path(asset, FILES[asset]))


def tabulate(store: Store, questions: Sequence[Question]) -> pd.DataFrame:
    """Return one row per question, in the order of the draw.

    Columns: item_id, question, reference (an accepted answer), answer, right, wrong, empty, ended_by,
    n_tokens; log_prob (nats), likelihood (its negative), log_gradient (log G); for A = sequence, geometric,
    token_mean: probability_A, aleatoric_A, log_aleatoric_A, log_epistemic_A; seconds_STAGE.
    An empty answer is wrong and has no scores (NaN); nor has token_mean where it was not asked for. In a
    choice also right_by_mean (the verdict, had the mean of log p per token chosen) and right_by_chance (the
    share of true candidates).
    """
    records = {stage: store.get(stage) for stage in ("answer", "verdict", "estimate", "token_mean")}
    rows = []
    for question in questions:
        answer, verdict = records["answer"][question.item_id], records["verdict"][question.item_id]
        scores = {s: records[s].get(question.item_id, {}) for s in ("estimate", "token_mean")}
        seconds = {"answer": answer, **scores}
        rows.append(
            {
                "item_id": question.item_id,
                "question": question.question,
                "reference": question.answers[0],
                "answer": answer["text"],
                "wrong": not verdict["right"],
                **verdict,
                "empty": not answer["text"],
                "ended_by": answer["ended_by"],
                "n_tokens": len(answer["token_ids"]),
                **_score_columns(scores["estimate"] | scores["token_mean"]),
                **{f"seconds_{stage}": record.get("seconds", np.nan) for stage, record in seconds.items()},
            }
        )
    return pd.DataFrame(rows)


def _score_columns(scored: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of one answer by column; log p(1−p) is taken from log p, so it does not underflow."""
    columns: dict[str, float] = {}
    if "sequence" in scored:
        log_prob = scored["sequence"]["log_prob"]
        log_gradient = scored["sequence"]["log_epistemic"] - 2 * log_prob
        columns |= {"log_prob": log_prob, "likelihood": -log_prob, "log_gradient": log_gradient}
    for name in ("sequence", "geometric", "token_mean"):
        scores = scored.get(name, {})
        for quantity in ("probability", "aleatoric", "log_epistemic"):
            columns[f"{quantity}_{name}"] = scores.get(quantity, np.nan)
        columns[f"log_aleatoric_{name}"] = _log_aleatoric(name, scores) if scores else np.nan
    return columns


def _log_aleatoric(name: str, scores: Mapping[str, float]) -> float:
    if name == "token_mean":
        return float(np.log(max(scores["aleatoric"], np.finfo(float).tiny)))
    log_p = scores["log_prob"] / (scores["n_tokens"] if name == "geometric" else 1)
    # p so near 1 that float64 cannot tell is set to 1 − 2⁻⁵³, the nearest value below.
    return log_p + float(np.log(max(-np.expm1(log_p), 2.0**-53)))


@functools.lru_cache(maxsize=1)  # a notebook asks the same model about several sets
def _load_model(name: str) -> tuple[Any, Any, str]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # no bar of loaded weights in a page of the book
    try:
        model, tokenizer = assets.load_causal_lm(name)
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    return model, tokenizer, models.weights(model, tokenizer)
