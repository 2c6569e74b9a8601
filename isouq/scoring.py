"""A file of questions → a file of scores: what `isouq score` does, resumable and row by row honest.

Finished rows are appended to `OUTPUT.partial`, a JSON line each, so that a killed run goes on where it stopped; the
output itself appears whole or not at all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from isouq import assets, causal_lm
from isouq.estimate import AGGREGATIONS, Aggregation
from isouq.gradients import Engine
from isouq.qa import generation

SCORES = ("n_tokens", "log_prob", "probability", "aleatoric", "epistemic", "log_epistemic")
Record = dict[str, Any]
Pair = tuple[list[int], list[int], str]  # ids of prompt and answer, the answer's text
READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}
WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".jsonl": lambda table, path: _write_lines(table, path),
    ".parquet": lambda table, path: table.to_parquet(path, index=False),
}


def _write_lines(table: pd.DataFrame, path: Path) -> None:
    """A JSON object a line; pandas' own writer would round small probabilities away."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    path.write_text("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to score; an interrupted run is gone on with only under the same options."""

    model: str
    aggregation: Aggregation = "sequence"
    engine: Engine = "auto"
    batch_size: int = 8
    max_new_tokens: int = 32


def read_questions(path: Path) -> pd.DataFrame:
    """The table of columns prompt and, optionally, answer. Raises ValueError for another format or a missing column."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"--input: {path.name} given, a file ending in {', '.join(READERS)} wanted")
    if not path.is_file():
        raise ValueError(f"--input: there is no file {path}")
    table = reader(path)
    if "prompt" not in table:
        raise ValueError(f"--input: columns {', '.join(map(str, table.columns))} given, one named prompt wanted")
    return table


def score_file(source: Path, target: Path, options: Options) -> dict[int, str]:
    """Score every row of `source` into `target`; return the rows that failed, with the reason (also column `error`)."""
    if target.suffix.lower() not in WRITERS:
        raise ValueError(f"--output: {target.name} given, a file ending in {', '.join(WRITERS)} wanted")
    if options.aggregation not in AGGREGATIONS:
        raise ValueError(f"--aggregation: {options.aggregation!r} given, one of {', '.join(AGGREGATIONS)} wanted")
    table = read_questions(source)
    partial = target.with_name(target.name + ".partial")
    done = _resume(partial, _fingerprint(table, options))
    todo = [i for i in range(len(table)) if i not in done]
    if todo:
        with partial.open("a", encoding="utf-8") as out:
            for row in tqdm(_score_rows(table, todo, options), total=len(todo), unit="row", desc="scoring"):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                done[row["row"]] = row
    _write(table, done, target)
    partial.unlink(missing_ok=True)
    return {i: row["error"] for i, row in sorted(done.items()) if row["error"]}


def _fingerprint(table: pd.DataFrame, options: Options) -> str:
    content = table.to_json(orient="split") + json.dumps(asdict(options), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _resume(partial: Path, fingerprint: str) -> dict[int, Record]:
    """The rows that an interrupted run left, if it had this input and these options; a torn last line is dropped."""
    lines = partial.read_text(encoding="utf-8").split("\n")[:-1] if partial.exists() else []
    if lines and json.loads(lines[0]) != {"fingerprint": fingerprint}:
        raise ValueError(f"{partial} is from another input or other options; delete it to start afresh")
    temporary = partial.with_name(partial.name + ".new")
    lines = lines or [json.dumps({"fingerprint": fingerprint})]
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, partial)
    rows = [json.loads(line) for line in lines[1:]]
    return {row["row"]: row for row in rows}


def _write(table: pd.DataFrame, done: dict[int, Record], target: Path) -> None:
    scores = pd.DataFrame([done[i] for i in range(len(table))], columns=["row", "answer", *SCORES, "error"])
    scores["n_tokens"] = scores["n_tokens"].astype("Int64")
    kept = table.drop(columns=[c for c in scores.columns if c in table]).reset_index(drop=True)
    result = pd.concat([kept, scores.drop(columns="row")], axis=1)
    temporary = target.with_name(f".{target.stem}.new{target.suffix}")
    WRITERS[target.suffix.lower()](result, temporary)
    os.replace(temporary, target)


def _score_rows(table: pd.DataFrame, todo: list[int], options: Options) -> Iterator[Record]:
    """Every row of `todo` as a record; a row that cannot be scored has an `error` in place of scores."""
    model, tokenizer = assets.load_causal_lm(options.model)
    stops = functools.cache(lambda: generation.stop_token_ids(tokenizer, model))
    for start in range(0, len(todo), options.batch_size):
        pairs: dict[int, Pair] = {}
        missing: dict[int, list[int]] = {}
        for row in todo[start : start + options.batch_size]:
            prompt, answer = (_text(table, name, row) for name in ("prompt", "answer"))
            try:
                if not prompt:
                    raise ValueError("prompt: empty, a text wanted")
                if answer:
                    pairs[row] = *causal_lm.encode(tokenizer, row, prompt, answer), answer
                else:
                    missing[row] = generation.encode_prompts(tokenizer, [prompt])[0]
            except (ValueError, TypeError) as error:
                yield _record(row, error=str(error))
        if missing:
            ids = list(missing.values())
            made = generation.generate(model, tokenizer, ids, stops=stops(), max_new_tokens=options.max_new_tokens)
            pairs |= {
                row: (missing[row], list(new.token_ids), new.text) for row, new in zip(missing, made, strict=True)
            }
        yield from _score_pairs(model, pairs, options)


def _text(table: pd.DataFrame, column: str, row: int) -> str:
    value = table[column].iloc[row] if column in table else ""
    return value if isinstance(value, str) else ""


def _score_pairs(model: Any, pairs: dict[int, Pair], options: Options) -> Iterator[Record]:
    """Score rows together; where the batch is refused, one by one, so that only the bad row is lost."""
    if not pairs:
        return
    try:
        scores = causal_lm.score_ids(
            model,
            [(prompt, answer) for prompt, answer, _ in pairs.values()],
            aggregation=options.aggregation,
            engine=options.engine,
            batch_size=options.batch_size,
        )
    except ValueError as error:
        if len(pairs) == 1:
            yield _record(next(iter(pairs)), answer=next(iter(pairs.values()))[2], error=str(error))
            return
        for row, pair in pairs.items():
            yield from _score_pairs(model, {row: pair}, options)
        return
    for place, (row, (_, _, text)) in enumerate(pairs.items()):
        values = {name: getattr(scores, name)[place].item() for name in SCORES}
        yield _record(row, answer=text, **values)


def _record(row: int, *, answer: str | None = None, error: str | None = None, **values: float | int) -> Record:
    finite = {name: value if torch.isfinite(torch.tensor(value)) else None for name, value in values.items()}
    return {"row": row, "answer": answer, **dict.fromkeys(SCORES), **finite, "error": error}
