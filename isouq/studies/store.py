"""The records of one run, in one SQLite file that survives being killed at any moment: the store of every study.

A stage (question, answer, verdict, estimate, …) is a table of its own, keyed by item_id. What is written of an item at
once is one transaction. A record is plain JSON, or bytes where it is an array. Scored questions and inner products of
gradients are stored here. The posteriors' records are files instead, which are committed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from isouq.studies.identity import digest

APPLICATION_ID = 0x15001  # marks the file as ours, and the form of its tables, in SQLite's own header
_STAGE_NAME = re.compile(r"[a-z_]+")
_CAUSES = {  # by SQLite's primary result code
    sqlite3.SQLITE_BUSY: "is in use by another process; wait for it to end",
    sqlite3.SQLITE_FULL: "cannot grow, the disk is full; make room and run again: what was stored before is kept",
    sqlite3.SQLITE_READONLY: "cannot be written: it or its folder is read-only; make both writable, or use another",
    sqlite3.SQLITE_IOERR: "cannot be read or written by the disk; check the disk, or use a folder on another",
    sqlite3.SQLITE_CORRUPT: "is damaged; move it away, and what it held is computed anew",
    sqlite3.SQLITE_NOTADB: "is not a store of isouq; move it away",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened for writing, as in a read-only folder; make it writable or use another",
}


class StoreError(ValueError):
    """The file is not this run's store, is damaged or in use, or cannot be written; the message has the way out."""


class Store:
    """The records of one run, such as one (model, data set, settings). A context manager; one process at a time."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open or create the store at `path` for a run described by `identity` (plain JSON values).

        Raises StoreError when the file belongs to another run, is no store, is damaged, is in use or cannot be written.
        """
        self.path, self.identity = path, json.loads(json.dumps(identity, allow_nan=False))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{path.parent} cannot be made ({error.strerror}); use another folder") from error
        with self._explained():
            self._connection = sqlite3.connect(path, timeout=1.0, isolation_level=None)
        try:
            with self._transaction("EXCLUSIVE"):
                self._open(self.identity)
        except BaseException:
            self.close()
            raise

    def _open(self, wanted: dict[str, Any]) -> None:
        execute = self._connection.execute
        if not execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            execute(f"PRAGMA application_id = {APPLICATION_ID}")
            execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            execute("INSERT INTO meta VALUES ('identity', ?)", (json.dumps(wanted, sort_keys=True),))
        elif execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise StoreError(f"{self.path} is some other program's database, or of another isouq; move it away")
        row = execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
        try:
            there = json.loads(row[0])
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self.path} {_CAUSES[sqlite3.SQLITE_CORRUPT]}") from error
        if there != wanted:
            keys = sorted(key for key in {*there, *wanted} if there.get(key) != wanted.get(key))
            differs = ", ".join(f"{key}: {there.get(key)!r} there, {wanted.get(key)!r} here" for key in keys)
            raise StoreError(f"{self.path} holds another run ({differs}); use another folder or remove it")

    def put(self, item_id: str, records: Mapping[str, Mapping[str, Any] | bytes], *, replace: bool = False) -> None:
        """Write one item's records, {stage: record}, all of them or none.

        Raises StoreError when a stage already has a record of this item (unless `replace`) and when the file cannot be
        written, ValueError on NaN or infinity.
        """
        rows = {stage: r if isinstance(r, bytes) else json.dumps(r, allow_nan=False) for stage, r in records.items()}
        verb = "INSERT OR REPLACE" if replace else "INSERT"
        with self._transaction("IMMEDIATE"):
            for stage, row in rows.items():
                try:
                    self._insert(verb, stage, item_id, row)
                except sqlite3.IntegrityError as error:
                    text = f"{item_id} already has one of {', '.join(rows)}; records are never edited"
                    raise StoreError(f"{self.path}: {text}") from error

    def get(self, stage: str) -> dict[str, Any]:
        """Return all records of a stage by item_id, in the order they were written. Raises StoreError for damage."""
        records = {}
        with self._explained():
            if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (stage,)).fetchone():
                return {}
            for item_id, row, checksum in self._connection.execute(f"SELECT * FROM {stage} ORDER BY rowid"):
                if checksum != _checksum(item_id, row):
                    raise StoreError(f"{self.path} {_CAUSES[sqlite3.SQLITE_CORRUPT]} (at {stage} of {item_id})")
                records[item_id] = row if isinstance(row, bytes) else json.loads(row)
        return records

    def missing(self, stage: str, item_ids: Iterable[str]) -> list[str]:
        """Return those of `item_ids` that have no record of this stage, in their order."""
        present = self.get(stage).keys()
        return [item_id for item_id in item_ids if item_id not in present]

    def export(self, path: Path) -> None:
        """Write all records as Parquet: stage, item_id, record (JSON), and the identity in the file's metadata."""
        with self._explained():
            names = self._connection.execute("SELECT name FROM sqlite_master WHERE name != 'meta' AND type = 'table'")
            stages = sorted(name for (name,) in names)
        rows = [(s, item_id, json.dumps(record)) for s in stages for item_id, record in self.get(s).items()]
        columns = {name: [row[i] for row in rows] for i, name in enumerate(("stage", "item_id", "record"))}
        table = pa.table(columns, metadata={"identity": json.dumps(self.identity)})
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        pq.write_table(table, partial, compression="zstd", compression_level=12)
        partial.replace(path)

    def restore(self, path: Path) -> int:
        """Take over the records of a file that `export` wrote, where this store has none; return how many were new.

        Raises StoreError for the records of another run, and for a file that is damaged.
        """
        if identity_of(path) != self.identity:
            raise StoreError(f"{path} holds the records of another run; move it away")
        with _readable(path):
            rows = pq.read_table(path, columns=["stage", "item_id", "record"]).to_pylist()
            if not all(row["stage"] and row["item_id"] and isinstance(json.loads(row["record"]), dict) for row in rows):
                raise ValueError("a row is no record")
        with self._transaction("IMMEDIATE"):
            before = self._connection.total_changes
            for row in rows:
                self._insert("INSERT OR IGNORE", row["stage"], row["item_id"], row["record"])
            return self._connection.total_changes - before

    def _insert(self, verb: str, stage: str, item_id: str, row: str | bytes) -> None:
        if not _STAGE_NAME.fullmatch(stage):
            raise ValueError(f"stage must be lower-case letters and _, got {stage!r}")
        columns = "item_id TEXT PRIMARY KEY, record NOT NULL, checksum TEXT NOT NULL"
        self._connection.execute(f"CREATE TABLE IF NOT EXISTS {stage} ({columns})")
        self._connection.execute(f"{verb} INTO {stage} VALUES (?, ?, ?)", (item_id, row, _checksum(item_id, row)))

    def close(self) -> None:
        """Close the file and give up its lock."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        with self._explained(), self._connection:  # which commits, or rolls back
            # The lock is held until the connection closes; the operating system drops it when the process dies.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute(f"BEGIN {kind}")
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into sentences with the path and the way out."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of it says where in SQLite
            cause = _CAUSES.get(code, "cannot be used; use another folder")
            if code == sqlite3.SQLITE_CANTOPEN and self.path.is_dir():
                cause = "is a folder, a file is wanted; remove it or use another folder"
            raise StoreError(f"{self.path} {cause} (SQLite: {error})") from error


def identity_of(path: Path) -> Any:
    """Return the identity of the run whose records a file has. Raises StoreError for a file that cannot be read."""
    with _readable(path):
        return json.loads((pq.read_schema(path).metadata or {}).get(b"identity", b"null"))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path} cannot be read ({error}); remove it, and what it held is computed anew") from error


def _checksum(item_id: str, row: str | bytes) -> str:
    """Return a checksum of a record, since SQLite itself does not notice a byte that changed on the disk."""
    content = row if isinstance(row, bytes) else row.encode()
    return hashlib.blake2b(content, key=item_id.encode()[:64], digest_size=6).hexdigest()


def store_path(folder: Path, stem: str, identity: Mapping[str, Any]) -> Path:
    """Return where a run's store lies: a readable stem, then a digest of all that decides its numbers."""
    readable = re.sub(r"[^A-Za-z0-9.@-]+", "_", stem)
    return folder / f"{readable}-{digest(identity)}.sqlite"
