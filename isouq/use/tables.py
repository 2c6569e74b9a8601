"""Tables of CSV, JSON Lines and Parquet: read exactly or refused by the line, written whole or not at all.

Both go by frames of at most ROWS rows, so that memory does not grow with the length of a file. A CSV cell is a text. A
value of JSON Lines keeps its type, except that a number under prompt or answer is the text that the file has there. A
Parquet cell keeps its type.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from isouq.studies.qa.data import unique

ROWS = 4096  # of a frame
FIELD_BYTES = 2**31 - 1  # the csv module's own limit is 128 kB


class Source:
    """A file that has a column prompt and, optionally, answer: read frame by frame, as often as wanted.

    Raises ValueError naming the file, the line where there is one, what is wrong and the way out.
    """

    def __init__(self, path: Path, option: str = "--input") -> None:
        self.paths: Sequence[Path] = [path]
        self.reader = _format(option, path)[0]
        if not path.is_file():
            raise ValueError(f"{option}: there is no file {path}")

    def frames(self) -> Iterator[pd.DataFrame]:
        """The rows in order, in frames of at most ROWS; at least one, which has the columns of a file of no rows."""
        return self.reader(self.paths[0])

    def stamps(self) -> list[tuple[int, int]]:
        """What tells that a file was changed."""
        stats = [path.stat() for path in self.paths]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def read(path: Path) -> pd.DataFrame:
    """A whole file as a table. Raises as `Source`."""
    frames = list(Source(path, "file").frames())
    whole = pd.concat(frames, ignore_index=True)
    whole.attrs = frames[0].attrs
    return whole


def about_of(path: Path) -> dict[str, Any] | None:
    """What a file of scores says of the run that made it, as `Sink` wrote it; .csv and .jsonl cannot: None."""
    if path.suffix.lower() != ".parquet":
        return None
    try:
        kept = (pq.read_schema(path).metadata or {}).get(b"isouq")
    except pa.ArrowException as error:
        raise ValueError(f"{path}: no Parquet file: {error}") from error
    return json.loads(kept) if kept else None


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


def _parts(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of at most ROWS rows, one at least."""
    rows = iter(rows)
    yield list(itertools.islice(rows, ROWS))
    while part := list(itertools.islice(rows, ROWS)):
        yield part


def _check_text(path: Path) -> None:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                wrong = "\0" in line.decode()
            except UnicodeDecodeError:
                wrong = True
            if wrong:
                kinds = "other encoding, gzip, Excel?"
                raise ValueError(f"{path}: line {number} is no text in UTF-8 ({kinds}); save it as UTF-8")


def _read_csv(path: Path) -> Iterator[pd.DataFrame]:
    rows = _csv_rows(path)
    header = next(rows, None)
    if header is None:
        raise ValueError(f"{path}: the file is empty, a header with a column named 'prompt' wanted")
    _check_names(path, header)
    for part in _parts(rows):
        yield pd.DataFrame(part, columns=header, dtype=pd.ArrowDtype(pa.string()))


def _csv_rows(path: Path) -> Iterator[list[str]]:
    _check_text(path)
    start, width, limit = 1, 0, csv.field_size_limit(FIELD_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            for fields in lines:
                if fields and len(fields) != (width := width or len(fields)):
                    raise csv.Error(f"{len(fields)} fields, the header has {width}")
                if fields:
                    yield fields
                start = lines.line_num + 1
    except csv.Error as error:
        way_out = "put a field with a comma or a quote in double quotes, doubled inside"
        raise ValueError(f"{path}: line {start}: {error}; {way_out}") from error
    finally:
        csv.field_size_limit(limit)


def _read_jsonl(path: Path) -> Iterator[pd.DataFrame]:
    every = dict.fromkeys(tuple(row) for _, row in json_lines(path, _object))  # any line may bring new keys
    for keys in every:
        if "prompt" in keys:
            _check_names(path, keys)
    names = list(dict.fromkeys(itertools.chain(*every)))
    _check_names(path, names)
    for part in _parts(row for _, row in json_lines(path, _object)):
        columns = {name: [row.get(name) for row in part] for name in names}
        yield pd.DataFrame(columns, index=range(len(part)), dtype=object)


def json_lines(path: Path, parse: Callable[[str], Any]) -> Iterator[tuple[int, Any]]:
    """What `parse` makes of each line of JSON that is not blank, with its number. Raises ValueError, by the line."""
    _check_text(path)
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            try:
                content = parse(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                reason = str(error).replace("line 1 column", "column")
                raise ValueError(f"{path}: line {number}: {reason}; a JSON object on every line wanted") from error
            if content is not None:
                yield number, content


def _object(line: str) -> dict[str, Any]:
    content = json.loads(line, object_pairs_hook=unique)
    if not isinstance(content, dict):
        raise ValueError("no object, but a list or a single value")
    json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # refuses NaN, and halves of surrogate pairs
    written = json.loads(line, parse_int=str, parse_float=str)
    return content | {name: written[name] for name in ("prompt", "answer") if name in written}


def _read_parquet(path: Path) -> Iterator[pd.DataFrame]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_names(path, schema.names)
            # pandas' own notes (index, Int64, categories) are written back, except on answer, whose type may change
            notes = json.loads((schema.metadata or {}).get(b"pandas", "{}"))
            notes = notes and notes | {"columns": [x for x in notes.get("columns", ()) if x["name"] != "answer"]}
            empty = [] if file.metadata.num_rows else [schema.empty_table()]
            for rows in itertools.chain(empty, file.iter_batches(ROWS)):
                frame = rows.to_pandas(types_mapper=pd.ArrowDtype, ignore_metadata=True)
                frame.attrs = notes
                yield frame
    except pa.ArrowException as error:
        raise ValueError(f"{path}: no Parquet file: {error}") from error


# ---- writing --------------------------------------------------------------------------------------------------------


def target(path: Path, *sources: Path) -> Path:
    """The file behind `path`, links followed, in a folder that exists. Raises ValueError where it cannot be written."""
    _format("--output", path)
    real = Path(os.path.realpath(path))
    if real.exists() and any(real.samefile(source) for source in sources):
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


class Sink:
    """Frames → a file in the format of `path`: all are shown to `check` first, then given to `write`.

    `about` is kept as JSON in the metadata of Parquet, under "isouq": the model and all that its scores depend on.
    `schema`, of Parquet, has the types that all frames shown have in common: of a column with 1 and later 0.5, floats.
    Raises ValueError for cells that the format cannot hold.
    """

    def __init__(self, path: Path) -> None:
        self.suffix, self.encode = path.suffix, _format("--output", path)[1]
        self.schema: pa.Schema | None = None
        self.about: dict[str, Any] = {}

    def check(self, frame: pd.DataFrame) -> None:
        """Refuse what cannot be written."""
        with self._refusing():
            if self.encode is not None:
                self.encode(frame, False)
                return
            own = pa.Table.from_pandas(frame, preserve_index=False).schema.remove_metadata()
            self.schema = pa.unify_schemas([self.schema or own, own], promote_options="permissive")

    def write(self, frames: Iterable[pd.DataFrame], out: io.BufferedIOBase) -> None:
        """Write the frames, which all have the same columns."""
        if self.encode is not None:
            for number, frame in enumerate(frames):
                with self._refusing():
                    content = self.encode(frame, number == 0)
                out.write(content)
            return
        writer = None
        for frame in frames:
            with self._refusing():
                schema = self.schema and pa.schema([self.schema.field(name) for name in frame])
                arrow = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
                kept = {"pandas": frame.attrs, "isouq": self.about}
                notes = {key: json.dumps(content) for key, content in kept.items() if content} or None
                writer = writer or pq.ParquetWriter(out, arrow.schema.with_metadata(notes))
                writer.write_table(arrow.replace_schema_metadata(notes))
        if writer:
            writer.close()

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise ValueError(f"--output: {self.suffix} cannot hold the table: {error}; write another format") from error


def cells(column: pd.Series) -> list[Any]:
    """The cells of a column; `tolist` takes six times as long for Arrow's."""
    return pa.array(column).to_pylist() if isinstance(column.dtype, pd.ArrowDtype) else column.tolist()


def _csv(frame: pd.DataFrame, header: bool) -> bytes:
    for name in frame:
        if any(isinstance(cell, list | dict | bytes) for cell in frame[name].tolist()):
            raise ValueError(f"column {name!r} has lists, objects or bytes")
    text = frame.to_csv(index=False, header=header, lineterminator="\n")
    if "\r" in text:  # the csv module leaves fields with a carriage return bare
        text = frame.to_csv(index=False, header=header, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    return text.encode()


def _jsonl(frame: pd.DataFrame, _: bool) -> bytes:
    rows = (json.dumps(cells, ensure_ascii=False, allow_nan=False, default=_json) for cells in frame.to_dict("records"))
    return "".join(f"{row}\n" for row in rows).encode()


def _json(value: Any) -> str | None:
    if isinstance(value, bytes):
        raise ValueError("a column has bytes")
    return None if value is pd.NA else str(value)


FORMATS = {".csv": (_read_csv, _csv), ".jsonl": (_read_jsonl, _jsonl), ".parquet": (_read_parquet, None)}
