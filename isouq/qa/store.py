"""Every stage's records of one run, in one SQLite file that survives being killed at any moment.

A stage (question, answer, verdict, estimate, …) is a table of its own, keyed by item_id; a record is
written once and never edited. What is written of a question at once is one transaction: all of it or
nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

APPLICATION_ID = 0x15000  # marks the file as ours, in SQLite's own header
_STAGE_NAME = re.compile(r"[a-z_]+")


class StoreError(ValueError):
    """The file is not this run's store, or another process writes to it."""


class Store:
    """The records of one (model, data set, settings). A context manager; one process at a time."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open or create the store at `path` for a run described by `identity` (plain JSON values).

        Raises StoreError when the file belongs to another run, is no store, or is in use.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=1.0, isolation_level=None)
        try:
            self._open(identity)
        except sqlite3.OperationalError as error:
            self.close()
            raise StoreError(f"{path} is in use by another process ({error}); wait for it to end") from error
        except (sqlite3.DatabaseError, StoreError) as error:
            self.close()
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path} is not a store of isouq ({error}); move it away") from error

    def _open(self, identity: Mapping[str, Any]) -> None:
        # The lock is held until the connection closes; the operating system drops it when the process dies.
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._connection.execute("BEGIN EXCLUSIVE")
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        wanted = json.dumps(identity, sort_keys=True, allow_nan=False)
        if tables == 0:
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._connection.execute("INSERT INTO meta VALUES ('identity', ?)", (wanted,))
        elif self._connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise StoreError(f"{self.path} is some other program's database; move it away")
        found = json.loads(self._connection.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()[0])
        self._connection.execute("COMMIT")
        if found != json.loads(wanted):
            keys = sorted(k for k in {*found, *identity} if found.get(k) != json.loads(wanted).get(k))
            differs = ", ".join(f"{k}: {found.get(k)!r} there, {identity.get(k)!r} here" for k in keys)
            raise StoreError(f"{self.path} holds another run ({differs}); use another folder or remove it")

    def put(self, item_id: str, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Write one question's records, {stage: record}, all of them or none.

        Raises StoreError when a stage already has a record of this question, ValueError on NaN or infinity.
        """
        rows = {stage: json.dumps(record, allow_nan=False) for stage, record in records.items()}
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for stage, row in rows.items():
                self._create(stage)
                self._connection.execute(f"INSERT INTO {stage} VALUES (?, ?)", (item_id, row))
        except sqlite3.IntegrityError as error:
            self._connection.execute("ROLLBACK")
            raise StoreError(f"{item_id} already has one of {', '.join(rows)}; records are never edited") from error
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def get(self, stage: str) -> dict[str, dict[str, Any]]:
        """Return all records of a stage by item_id, in the order they were written."""
        if not self._exists(stage):
            return {}
        rows = self._connection.execute(f"SELECT item_id, record FROM {stage} ORDER BY rowid")
        return {item_id: json.loads(record) for item_id, record in rows}

    def missing(self, stage: str, item_ids: Iterable[str]) -> list[str]:
        """Return those of `item_ids` that have no record of this stage, in their order."""
        present = self.get(stage).keys()
        return [item_id for item_id in item_ids if item_id not in present]

    def close(self) -> None:
        """Close the file and give up its lock."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _create(self, stage: str) -> None:
        if not _STAGE_NAME.fullmatch(stage):
            raise ValueError(f"stage must be lower-case letters and _, got {stage!r}")
        self._connection.execute(f"CREATE TABLE IF NOT EXISTS {stage} (item_id TEXT PRIMARY KEY, record TEXT NOT NULL)")

    def _exists(self, stage: str) -> bool:
        query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
        return bool(self._connection.execute(query, (stage,)).fetchone()[0])


def store_path(folder: Path, stem: str, identity: Mapping[str, Any]) -> Path:
    """Return where a run's store lies: a readable stem, then a digest of all that decides its numbers."""
    readable = re.sub(r"[^A-Za-z0-9.@-]+", "_", stem)
    return folder / f"{readable}-{digest(identity)}.sqlite"


def digest(content: Any) -> str:
    """Return 12 hex digits that stand for plain JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]


def code_digest(package: Path, parts: Iterable[str]) -> str:
    """Return 12 hex digits of the code of a package's modules and subpackages (every module inside).

    Comments, docstrings and layout do not count: only what can change a number does.
    """
    codes = {}
    for part in parts:
        folder = package / part
        for path in sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    continue
                if ast.get_docstring(node) is not None:
                    node.body[0] = ast.Pass()
            codes[path.relative_to(package).as_posix()] = ast.unparse(tree)
    return digest(codes)
