"""The per-sample logs of EleutherAI's lm-evaluation-harness → a table of prompts, the model's answers, and metrics.

`lm_eval --log_samples` writes `samples_TASK_DATE.jsonl`, a line for each question and filter. What is read of a line:
doc_id, target, filter, `arguments` (the requests, each a prompt with a continuation or with the settings of a
generation), `resps` (what the model gave to each request), and the metrics, which stand under their own names. Every
value but a metric may be written as a text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from isouq.use import tables

OTHER = set("task prompt answer doc_id doc target arguments resps filtered_resps filter metrics".split())  # no metrics
Sample = dict[str, Any]


class Log(tables.Source):
    """A source of one row per question: task, doc_id, target, prompt, answer, and every metric that is a number.

    The answer of a generation is the response as it was before any filter; that of a multiple choice is the likeliest
    continuation, which is what the metric acc judges. Metrics of several filters have the filter in their names, as in
    lm_eval's own results: "exact_match,strict-match".

    Raises ValueError for another format than "lm-eval", for lines that are no such log, and for requests that have no
    answer of the model's: loglikelihood of a single text, rolling loglikelihood, images, messages to an API.
    """

    def __init__(self, kind: str, paths: Sequence[str]) -> None:
        if kind != "lm-eval" or not paths:
            raise ValueError(f"--from: {' '.join((kind, *paths))} given, lm-eval and its samples_*.jsonl wanted")
        self.paths = [Path(path) for path in paths]
        self.table = _read(self.paths)

    def frames(self) -> list[pd.DataFrame]:  # type: ignore[override]
        """The table in frames of at most ROWS rows."""
        rows = range(0, max(len(self.table), 1), tables.ROWS)
        return [self.table[start : start + tables.ROWS].reset_index(drop=True) for start in rows]


def _read(paths: list[Path]) -> pd.DataFrame:
    rows: dict[tuple[str, Any], Sample] = {}
    seen: dict[tuple[Any, ...], str] = {}
    filters: dict[str, set[str]] = {}
    metrics: list[tuple[tuple[str, Any], str, str, Any]] = []
    for path in paths:
        task = re.sub(r"^samples_|_\d{4}-\d\d-\d\dT[\d.-]+$", "", path.stem)
        for number, sample in tables.json_lines(path, json.loads):
            where = f"{path}: line {number}"
            try:
                key, kept = (task, sample["doc_id"]), str(sample.get("filter", "none"))
                new = {"task": task, "doc_id": key[1], "target": str(sample.get("target"))}
                row = rows.get(key) or new | _asked(sample)
            except (LookupError, TypeError, AttributeError) as error:
                what = f"no sample of lm_eval --log_samples ({type(error).__name__}: {error})"
                raise ValueError(f"{where}: {what}; a line with doc_id, arguments and resps wanted") from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if (*key, kept) in seen:
                there = f"question {key[1]} of {task} is there already, in {seen[*key, kept]}"
                raise ValueError(f"{where}: {there}; give the files of one run")
            rows[key], seen[*key, kept] = row, where
            filters.setdefault(task, set()).add(kept)
            numbers = {name: x for name, x in sample.items() if isinstance(x, int | float) and name not in OTHER}
            metrics += [(key, name, kept, x) for name, x in numbers.items() if math.isfinite(x)]
    for key, name, kept, value in metrics:
        rows[key][name if len(filters[key[0]]) == 1 else f"{name},{kept}"] = value
    names = dict.fromkeys(name for row in rows.values() for name in row)
    if not rows:
        raise ValueError(f"{paths[0]}: no sample in it, the file that lm_eval --log_samples writes wanted")
    return pd.DataFrame({name: [row.get(name) for row in rows.values()] for name in names}, dtype=object)


def _asked(sample: Sample) -> dict[str, str]:
    """The prompt of a sample and the model's answer. Raises ValueError for requests that have none."""
    requests, responses = [_listed(request) for request in _listed(sample["arguments"])], sample["resps"]
    first = requests[0]
    if not isinstance(first[0], str):
        raise ValueError("the prompt is a list of messages to an API; log a run of --model hf, which writes the text")
    if len(first) != 2:
        kind = "loglikelihood_rolling, a text without an answer" if len(first) == 1 else "with images or sounds"
        raise ValueError(f"requests {kind}; tasks of generate_until or multiple_choice wanted")
    if not isinstance(first[1], str) and not isinstance(responses[0][0], str):
        raise ValueError(f"the model's answer is {responses[0][0]!r:.40}; a text wanted")
    if not isinstance(first[1], str):
        return {"prompt": first[0], "answer": responses[0][0]}
    if "acc_mutual_info" in sample:  # the second half are the continuations without the prompt
        requests = requests[: len(requests) // 2]
    if len(requests) == 1:
        raise ValueError("loglikelihood of a single text, no answer of the model's; generate_until or choices wanted")
    log_probs = [float(response[0][0]) for response in responses[: len(requests)]]
    if len(log_probs) < len(requests) or any(map(math.isnan, log_probs)):
        raise ValueError(f"{len(requests)} choices and log-probabilities {log_probs}; one for each wanted")
    prompt, answer = requests[log_probs.index(max(log_probs))]
    return {"prompt": prompt, "answer": answer}


def _listed(content: Any) -> list[Any]:
    """A list as such, or one that was written as {"gen_args_0": …, "gen_args_1": …}."""
    return list(content.values()) if isinstance(content, dict) else list(content)
