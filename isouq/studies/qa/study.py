"""One study: a model answers a data set's questions; every answer is judged and scored, and every record is kept.

The chapter and the pipeline's job call `run`, which computes only what the store does not hold yet.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from isouq import models
from isouq.studies import assets, identity
from isouq.studies.qa import data, rivals, stages
from isouq.studies.qa.data import Question
from isouq.studies.qa.sentences import ENCODER, no_loading_bar
from isouq.studies.qa.stages import complete
from isouq.studies.qa.subject import Settings, prepare
from isouq.studies.store import Store, StoreError, store_path

FILES = {"triviaqa": "data-00000-of-00001.arrow", "wikidata": "task.json", "truthfulqa": "questions.json"}
DATA_SETS = (*FILES, "truthfulqa_choose")  # of TruthfulQA the model writes its answer, or picks a reference answer
SAMPLED = ("sample", "meaning")  # stages that do not depend on the answer


def run(model: str, data_set: str, settings: Settings, *, progress: bool | None = None) -> pd.DataFrame:
    """Answer, judge and score what the store does not hold yet, and return one row per question.

    `model` is an asset's name, a Hub id or a folder; `data_set` one of DATA_SETS or a file (`data.read_file`). Columns:
    see `tabulate`. `progress`: True or False, None shows bars at a terminal only.

    The store serves only what agrees in the model's content (and commit, of a Hub id), the data's, settings, libraries
    and the version of the study's code. Committed records (`records_dir`) of other libraries or of a GPU are served
    where they have all that is asked for, and never mixed with new ones; `attrs["made"]` says what made a table.

    Raises ValueError on an unknown data set, on too few questions in it, and StoreError as `Store` does.
    """
    if data_set not in DATA_SETS and not data.is_file(data_set):
        raise ValueError(f"data_set must be a file or one of {', '.join(DATA_SETS)}, got {data_set!r}")
    source, choose = data_set.removesuffix("_choose"), data_set.endswith("_choose")
    questions = load_questions(source)
    named = {"nli": settings.nli, "judge": settings.judge}
    entailment: Any = {name: rivals.Entailment(of, name, settings.device_map) for name, of in named.items() if of}
    lm, tokenizer, fingerprint = _load_model(model, settings.dtype, settings.device_map)
    # All of TruthfulQA is asked, so the solved examples of P(True) are questions of TriviaQA there.
    others = load_questions("triviaqa") if source == "truthfulqa" and settings.n_samples else None
    subject = prepare(lm, tokenizer, questions, settings, choose=choose, others=others, **entailment)
    used = [source, *(["triviaqa"] if others else [])]
    wanted = {
        "model": model,
        "commit": getattr(lm.config, "_commit_hash", None),
        "weights": fingerprint,
        "data_set": data_set,
        "data": [_digest(name) for name in used],
        "encoder": assets.content(ENCODER),
        "choose": choose,
        "settings": settings.identity(),
        "code": stages.VERSION,
        "versions": identity.versions("tokenizers", "torch", "transformers"),
        **{f"{name}_content": one.content for name, one in entailment.items()},
    }
    folder, stem = Path(settings.store_dir), f"{model}--{data.key_part(data_set)}"
    path = store_path(folder, stem, wanted)
    for kept, made in stages.kept(path, wanted, settings.records_dir):
        with Store(store_path(folder, stem, made), made) as store, contextlib.suppress(stages.LackingError):
            store.restore(kept)
            complete(store, subject, settings, compute=False)
            return tabulate(store, subject.questions)
    with Store(path, wanted) as store:
        if source == "truthfulqa" and settings.n_samples:
            _take_samples(store, model, subject.questions, settings)
        complete(store, subject, settings, progress=progress)
        return tabulate(store, subject.questions)


def _take_samples(store: Store, model: str, questions: Sequence[Question], settings: Settings) -> None:
    """Take over samples of the same prompts from TruthfulQA's other mode, unless its store is in use or damaged."""
    other = "truthfulqa" if store.identity["choose"] else "truthfulqa_choose"
    identity_there = {**store.identity, "data_set": other, "choose": not store.identity["choose"]}
    path = store_path(Path(settings.store_dir), f"{model}--{other}", identity_there)
    if path.exists():
        with contextlib.suppress(StoreError), Store(path, identity_there) as there:
            asked = {question.item_id for question in questions} | there.get("shot").keys()
            for stage in ("shot", *SAMPLED):
                records = there.get(stage)
                for item_id in store.missing(stage, records.keys() & asked):
                    store.put(item_id, {stage: records[item_id]})


def load_questions(name: str) -> data.DataSet:
    """Return all questions of an asset (triviaqa, wikidata, truthfulqa) or of a file."""
    return data.read_file(name) if data.is_file(name) else data.load(name, assets.path(name, FILES[name]))


def _digest(name: str) -> str:
    """12 hex digits of an asset's bytes, or of what the questions of a file say."""
    if data.is_file(name):
        return identity.digest([asdict(question) for question in data.read_file(name).questions])
    return hashlib.sha256(assets.path(name, FILES[name]).read_bytes()).hexdigest()[:12]


def tabulate(store: Store, questions: Sequence[Question]) -> pd.DataFrame:
    """Return one row per question, in the order of the draw; those that failed are in `attrs["failed"]` by item_id.

    Columns: item_id, question, reference (an accepted answer), answer, right, wrong, right_by_… (other judges), empty,
    ended_by, n_tokens; log_prob (nats), likelihood (its negative), log_gradient (log G); for A = sequence, geometric,
    token_mean: probability_A, aleatoric_A, log_aleatoric_A, log_epistemic_A; layer:BLOCK.KIND, log U_E by
    `stages.by_layer`; the rivals and cheap scores of `_rival_columns`; in a choice those of `_choice_columns`;
    seconds_STAGE. An empty answer is wrong and has no scores (NaN); nor has token_mean where it was not asked for.

    Raises ValueError, with the first reason, where every question failed.
    """
    asked, failed = {question.item_id for question in questions}, {}
    for item_id, record in store.get("failed").items():  # unless a later run went past that stage
        if item_id in asked and store.missing(record["stage"], [item_id]):
            failed[item_id] = f"{record['stage']}: {record['reason']}"
    questions = [question for question in questions if question.item_id not in failed]
    if not questions:
        raise ValueError(f"all {len(failed)} questions failed; the first at {next(iter(failed.values()))}")
    names = ("answer", "verdict", "estimate", "token_mean", "cheap", "choice", "sample", "meaning", "p_true")
    records = {stage: store.get(stage) for stage in names}
    rows = []
    for question in questions:
        of = {stage: found.get(question.item_id, {}) for stage, found in records.items()}
        if not of["answer"]["text"]:  # which has no scores, though it may have samples from the other mode
            of |= {stage: {} for stage in SAMPLED}
        seconds = {f"seconds_{stage}": record.pop("seconds", np.nan) for stage, record in of.items()}
        answer, verdict = of["answer"], of["verdict"]
        layers = of["estimate"].get("layers", {})
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
                **_score_columns(of["estimate"] | of["token_mean"]),
                **_rival_columns(of),
                **_choice_columns(of["choice"]),
                **{f"layer:{group}": value for group, value in layers.items()},
                **seconds,
            }
        )
    table = pd.DataFrame(rows).copy()  # in one piece: a column by itself for each layer would be slow
    table.attrs |= {"failed": failed, "made": _made(store.identity)}
    return table


def _made(identity: Mapping[str, Any]) -> str:
    """Say what records were made with: "GPU, torch 2.11.0"."""
    device = "GPU" if identity.get("settings", {}).get("device_map") else "CPU"
    return f"{device}, torch {identity.get('versions', {}).get('torch', '?').partition('+')[0]}"


def _rival_columns(of: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the rivals of one answer, of its records by stage, high = wrong, and nothing where a stage was not run."""
    columns: dict[str, float] = {}
    if cheap := of["cheap"]:
        columns |= {"lowest_token": -cheap["lowest_log_prob"], "token_entropy": cheap["token_entropy"]}
        columns |= {"embedding_gradient": cheap["log_embedding_gradient"]}
    if sample := of["sample"]:
        weights = sample["log_prob"], sample["n_steps"]
        columns |= {"naive_entropy": rivals.naive_entropy(*weights), "distinct_samples": len(set(sample["text"]))}
        for by, groups in of["meaning"].items():
            suffix = "" if by == "embedding" else f"_{by}"
            columns[f"semantic_entropy{suffix}"] = rivals.semantic_entropy(*weights, groups)
            columns[f"semantic_entropy_discrete{suffix}"] = rivals.discrete_semantic_entropy(groups)
    if of["p_true"]:
        columns["p_true"] = rivals.p_true(of["p_true"]["log_probs"])
    return columns


def _choice_columns(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Return the estimates of the reference that is likeliest on the bare prompt, under p_c, and whether it is true."""
    if not choice:
        return {}
    best = int(np.argmax(choice["log_p"]))
    log_p = choice["log_p"][best]
    return {
        "right_as_choice": best < choice["n_true"],
        "log_p_choice": log_p,
        "log_epistemic_choice": choice["log_epistemic"][best],
        "log_aleatoric_choice": _log_aleatoric(log_p),
        "n_references": len(choice["log_p"]),
    }


def _score_columns(scored: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of one answer by column."""
    columns: dict[str, float] = {}
    log_aleatoric: dict[str, float] = {}
    if "sequence" in scored:
        log_prob, n_tokens = scored["sequence"]["log_prob"], scored["sequence"]["n_tokens"]
        log_gradient = scored["sequence"]["log_epistemic"] - 2 * log_prob
        columns |= {"log_prob": log_prob, "likelihood": -log_prob, "log_gradient": log_gradient}
        log_aleatoric |= {"sequence": _log_aleatoric(log_prob), "geometric": _log_aleatoric(log_prob / n_tokens)}
    if "token_mean" in scored:
        log_aleatoric["token_mean"] = float(np.log(max(scored["token_mean"]["aleatoric"], np.finfo(float).tiny)))
    for name in ("sequence", "geometric", "token_mean"):
        for quantity in ("probability", "aleatoric", "log_epistemic"):
            columns[f"{quantity}_{name}"] = scored.get(name, {}).get(quantity, np.nan)
        columns[f"log_aleatoric_{name}"] = log_aleatoric.get(name, np.nan)
    return columns


def _log_aleatoric(log_p: float) -> float:
    """log p(1−p) without underflow. A p so near 1 that float64 cannot tell is 1 − 2⁻⁵³, the nearest value below."""
    return log_p + float(np.log(max(-np.expm1(log_p), 2.0**-53)))


@functools.lru_cache(maxsize=1)  # a notebook asks the same model about several sets
def _load_model(name: str, dtype: str, device_map: str | None) -> tuple[Any, Any, str]:
    with no_loading_bar():
        model, tokenizer = assets.load_causal_lm(name, dtype=dtype, device_map=device_map)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"device_map: {name} does not fit into the GPUs, and layers left outside would take days")
    return model, tokenizer, models.weights(model, tokenizer)
