"""Tables of CSV, JSON Lines and Parquet: read exactly or refused by the line, written whole or not at all.

A CSV cell is a text. A value of JSON Lines keeps its type, except that a number under prompt or answer is the text that
the file has there. A Parquet cell keeps its type.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

FIELD_BYTES = 2**31 - 1  # the csv module's own limit is 128 kB


def read(path: Path) -> pd.DataFrame:
    """The table of a file that has a column prompt and, optionally, answer.

    Raises ValueError naming the file, the line where there is one, what is wrong and the way out.
    """
    reader = _format("--input", path)[0]
    if not path.is_file():
        raise ValueError(f"--input: there is no file {path}")
    table = reader(path)
    _check_names(path, list(table))
    return table


def _format(option: str, path: Path) -> tuple[Any, Any]:
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{option}: {path} given, a file ending in {', '.join(FORMATS)} wanted")
    return FORMATS[path.suffix.lower()]


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raise ValueError for a name given twice, for no column prompt, and for a name that only resembles answer."""
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two columns of one name among {', '.join(names)}; rename one")
    if "prompt" not in names:
        near, given = _like("prompt", names), ", ".join(map(repr, names)) or "none"
        hint = f"did you mean {near!r}?" if near else "rename one (commas stand between the columns of .csv)"
        raise ValueError(f"{path}: columns {given} given, one named 'prompt' wanted; {hint}")
    if "answer" not in names and (near := _like("answer", names)):
        ways = "'answer' has its texts scored; a name less like it has answers generated"
        raise ValueError(f"{path}: column {near!r} given, none named 'answer'; rename it: {ways}")


def _like(wanted: str, names: Sequence[str]) -> str | None:
    by_letters = {"".join(filter(str.isalnum, name.casefold())): name for name in names}
    near = difflib.get_close_matches(wanted, by_letters, n=1, cutoff=0.75)
    return by_letters[near[0]] if near else None


def _text(path: Path) -> str:
    content = path.read_bytes()
    wrong = content.find(b"\0")
    if wrong < 0:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            wrong = error.start
    line = content.count(b"\n", 0, wrong) + 1
    raise ValueError(f"{path}: line {line} is no text in UTF-8 (other encoding, gzip, Excel?); save it as UTF-8")


def _read_csv(path: Path) -> pd.DataFrame:
    lines = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows: list[list[str]] = []
    start, limit = 1, csv.field_size_limit(FIELD_BYTES)
    try:
        for fields in lines:
            if rows and fields and len(fields) != len(rows[0]):
                raise csv.Error(f"{len(fields)} fields, the header has {len(rows[0])}")
            rows += [fields] if fields else []
            start = lines.line_num + 1
    except csv.Error as error:
        way_out = "put a field with a comma or a quote in double quotes, doubled inside"
        raise ValueError(f"{path}: line {start}: {error}; {way_out}") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError(f"{path}: the file is empty, a header with a column named 'prompt' wanted")
    return pd.DataFrame(rows[1:], columns=rows[0], dtype=object)


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        try:
            rows += [_object(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            reason = str(error).replace("line 1 column", "column")
            raise ValueError(f"{path}: line {number}: {reason}; a JSON object on every line wanted") from error
    for keys in {tuple(row) for row in rows if "prompt" in row}:
        _check_names(path, keys)
    names = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame({name: [row.get(name) for row in rows] for name in names}, dtype=object)


def _object(line: str) -> dict[str, Any]:
    content = json.loads(line, object_pairs_hook=_unique)
    if not isinstance(content, dict):
        raise ValueError("no object, but a list or a single value")
    json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # refuses NaN, and halves of surrogate pairs
    written = json.loads(line, parse_int=str, parse_float=str)
    return content | {name: written[name] for name in ("prompt", "answer") if name in written}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
        raise ValueError(f"key {twice[0]!r} is there twice")
    return dict(pairs)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        arrow = pq.read_table(path, partitioning=None)  # else a folder named x=1 would add a column x
    except pa.ArrowException as error:
        raise ValueError(f"{path}: no Parquet file: {error}") from error
    table = arrow.to_pandas(types_mapper=pd.ArrowDtype, ignore_metadata=True)
    # pandas' own notes (index, Int64, categories) are written back, except on answer, whose type may change
    notes = json.loads((arrow.schema.metadata or {}).get(b"pandas", "{}"))
    table.attrs = notes and notes | {"columns": [note for note in notes.get("columns", ()) if note["name"] != "answer"]}
    return table


# ---- writing --------------------------------------------------------------------------------------------------------


def target(path: Path, source: Path) -> Path:
    """The file behind `path`, links followed, in a folder that exists. Raises ValueError where it cannot be written."""
    _format("--output", path)
    real = Path(os.path.realpath(path))
    if real.exists() and real.samefile(source):
        raise ValueError(f"--output: {path} is the input itself; name another file")
    if real.is_dir():
        raise ValueError(f"--output: {path} is a folder; name a file")
    real.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(real if real.exists() else real.parent, os.W_OK):
        raise ValueError(f"--output: {path} may not be written; change its permissions or name another file")
    return real


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` for this process, until it ends or is killed. Raises ValueError where another process holds it."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise ValueError(f"{path}: another isouq score is writing it; wait for its end or name another file") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where an open file cannot be removed
            os.unlink(lock.lock_file)
        lock.release()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedIOBase]:
    """A new file that replaces `path` when it is complete."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as out:
            yield out
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(table: pd.DataFrame, path: Path, out: io.BufferedIOBase) -> None:
    """Write the table to `out` in the format of `path`. Raises ValueError for cells that the format cannot hold."""
    try:
        _format("--output", path)[1](table, out)
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise ValueError(f"--output: {path.suffix} cannot hold the table: {error}; write another format") from error


def _write_csv(table: pd.DataFrame, out: io.BufferedIOBase) -> None:
    for name in table:
        if any(isinstance(cell, list | dict | bytes) for cell in table[name].tolist()):
            raise ValueError(f"column {name!r} has lists, objects or bytes")
    text = table.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # the csv module leaves fields with a carriage return bare
        text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    out.write(text.encode())


def _write_jsonl(table: pd.DataFrame, out: io.BufferedIOBase) -> None:
    for cells in table.to_dict("records"):
        out.write(json.dumps(cells, ensure_ascii=False, allow_nan=False, default=_json).encode() + b"\n")


def _json(value: Any) -> str | None:
    if isinstance(value, bytes):
        raise ValueError("a column has bytes")
    return None if value is pd.NA else str(value)


def _write_parquet(table: pd.DataFrame, out: io.BufferedIOBase) -> None:
    notes = {"pandas": json.dumps(table.attrs)} if table.attrs else None
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(notes), out)


FORMATS = {
    ".csv": (_read_csv, _write_csv),
    ".jsonl": (_read_jsonl, _write_jsonl),
    ".parquet": (_read_parquet, _write_parquet),
}
