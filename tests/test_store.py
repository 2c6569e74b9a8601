"""A store is bound to its run, writes all or nothing, never twice, one process at a time; what fails says why."""

import json
import os
import resource
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isouq.studies.store import Store, StoreError, store_path

RUN = {"model": "m", "settings": {"seed": 0}}


def test_records_come_back_exactly_and_in_order(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite", RUN) as store:
        store.put("b", {"answer": {"log_prob": -0.1 - 0.2, "text": "naïve"}, "verdict": {"right": True}})
        store.put("a", {"answer": {"log_prob": 1e-300, "text": ""}, "array": bytes(range(256))})
        assert store.missing("verdict", ["a", "b", "c"]) == ["a", "c"]
    with Store(tmp_path / "s.sqlite", RUN) as store:
        assert list(store.get("answer")) == ["b", "a"]
        assert store.get("answer")["b"] == {"log_prob": -0.1 - 0.2, "text": "naïve"}
        assert store.get("array") == {"a": bytes(range(256))}
        assert store.get("estimate") == {}


def test_a_record_is_never_written_twice_and_a_transaction_is_whole(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite", RUN) as store:
        store.put("a", {"verdict": {"right": True}})
        with pytest.raises(StoreError, match="a already has one of answer, verdict"):
            store.put("a", {"answer": {"text": "x"}, "verdict": {"right": False}})
        assert store.get("answer") == {}
        assert store.get("verdict") == {"a": {"right": True}}
        store.put("b", {"answer": {"text": "y"}})  # the store is usable after a refusal
        store.put("a", {"verdict": {"right": False}}, replace=True)
        assert store.get("verdict") == {"a": {"right": False}}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    with Store(tmp_path / "s.sqlite", RUN) as store:
        with pytest.raises(ValueError, match="JSON compliant"):
            store.put("a", {"estimate": {"log_epistemic": value}})
        assert store.get("estimate") == {}


def test_another_runs_store_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    Store(tmp_path / "s.sqlite", RUN).close()
    with pytest.raises(StoreError, match=r"settings: \{'seed': 0\} there, \{'seed': 1\} here"):
        Store(tmp_path / "s.sqlite", {**RUN, "settings": {"seed": 1}})
    Store(tmp_path / "s.sqlite", RUN).close()


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    text, foreign = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    text.write_text("this is not a database, and longer than its header" * 9)
    with pytest.raises(StoreError, match=r"a\.sqlite is not a store"):
        Store(text, RUN)
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE meta (key, value)")
    connection.close()
    with pytest.raises(StoreError, match="some other program's database"):
        Store(foreign, RUN)


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite", RUN), pytest.raises(StoreError, match=r"s\.sqlite is in use by another process"):
        Store(tmp_path / "s.sqlite", RUN)
    Store(tmp_path / "s.sqlite", RUN).close()


def test_a_full_disk_is_said_and_what_was_stored_is_kept(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite", RUN) as store:
        store.put("a", {"answer": {"text": "kept"}})
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then answers as for a full disk
        with pytest.raises(StoreError, match=r"s\.sqlite cannot grow, the disk is full; make room"):
            store.put("b", {"answer": {"text": "x" * 100_000}})
        assert store.get("answer") == {"a": {"text": "kept"}}
        store._connection.execute("PRAGMA max_page_count = 100000")
        store.put("b", {"answer": {"text": "y"}})
    with Store(tmp_path / "s.sqlite", RUN) as store:
        assert list(store.get("answer")) == ["a", "b"]


def test_a_disk_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite", RUN) as store:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, before[1]))
        try:
            with pytest.raises(StoreError, match=r"s\.sqlite cannot be read or written by the disk"):
                store.put("a", {"answer": {"text": "x" * 1_000_000}})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        store.put("a", {"answer": {"text": "x"}})


@pytest.fixture
def plain_user() -> Iterator[Path]:
    """A folder of a user without root's rights, which ignore what is read-only."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65_534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


READ_ONLY = stat.S_IRUSR | stat.S_IXUSR


def test_a_read_only_folder_is_said(plain_user: Path) -> None:
    folder = plain_user / "store"
    folder.mkdir(mode=READ_ONLY)
    with pytest.raises(StoreError, match=r"store/s\.sqlite cannot be opened .*read-only folder; make it writable"):
        Store(folder / "s.sqlite", RUN)
    with pytest.raises(StoreError, match=r"store/deep cannot be made \(Permission denied\); use another folder"):
        Store(folder / "deep" / "s.sqlite", RUN)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_whole_store_is_read_where_nothing_can_be_written(plain_user: Path, what: str) -> None:
    path = plain_user / "store" / "s.sqlite"
    with Store(path, RUN) as store:
        store.put("a", {"answer": {"text": "x"}})
    place = path if what == "file" else path.parent
    place.chmod(READ_ONLY)
    with Store(path, RUN) as store:
        assert store.get("answer") == {"a": {"text": "x"}}
        with pytest.raises(StoreError, match=r"s\.sqlite cannot be .*read-only"):
            store.put("b", {"answer": {"text": "y"}})
    place.chmod(0o700)


def test_a_folder_in_the_place_of_the_file_or_a_file_in_that_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").mkdir()
    with pytest.raises(StoreError, match=r"s\.sqlite is a folder, a file is wanted"):
        Store(tmp_path / "s.sqlite", RUN)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file cannot be made \(File exists\)"):
        Store(tmp_path / "file" / "s.sqlite", RUN)


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_file_is_said_when_it_is_opened_or_read(tmp_path: Path, cut: bool) -> None:
    path = tmp_path / "s.sqlite"
    with Store(path, RUN) as store:
        for item in range(30):
            store.put(f"item {item}", {"answer": {"text": "0123456789" * 400}})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if cut else content[:8192] + bytes(4096) + content[12_288:])
    with pytest.raises(StoreError, match=r"s\.sqlite is damaged; move it away"), Store(path, RUN) as store:
        store.get("answer")


def test_one_changed_digit_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with Store(path, RUN) as store:
        store.put("a", {"estimate": {"log_prob": -1.2345678}})
    content = path.read_bytes()
    assert content.count(b"1.2345678") == 1
    path.write_bytes(content.replace(b"1.2345678", b"1.2345679"))
    with Store(path, RUN) as store, pytest.raises(StoreError, match=r"is damaged; .*\(at estimate of a\)"):
        store.get("estimate")


def test_an_identity_that_cannot_be_read_is_damage(tmp_path: Path) -> None:
    Store(tmp_path / "s.sqlite", RUN).close()
    with sqlite3.connect(tmp_path / "s.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '{'")
    connection.close()
    with pytest.raises(StoreError, match="is damaged"):
        Store(tmp_path / "s.sqlite", RUN)


def test_the_name_is_readable_and_tells_runs_apart(tmp_path: Path) -> None:
    one = store_path(tmp_path, "org/model@rev--triviaqa", RUN)
    assert one.name.startswith("org_model@rev--triviaqa-")
    assert one != store_path(tmp_path, "org/model@rev--triviaqa", {**RUN, "model": "n"})
    assert one == store_path(tmp_path, "org/model@rev--triviaqa", dict(reversed(RUN.items())))


def test_exported_records_are_taken_over_by_the_same_run_only(tmp_path: Path) -> None:
    file = tmp_path / "records" / "s.parquet"
    with Store(tmp_path / "one.sqlite", RUN) as store:
        store.put("a", {"answer": {"log_prob": -0.1 - 0.2, "text": "naïve"}, "verdict": {"right": True}})
        store.put("b", {"answer": {"log_prob": 1e-300, "text": ""}})
        store.export(file)
        here = {stage: store.get(stage) for stage in ("answer", "verdict")}
    with Store(tmp_path / "two.sqlite", RUN) as store:
        store.put("b", {"answer": {"text": "its own"}})
        assert store.restore(file) == 2
        assert store.get("verdict") == here["verdict"]
        assert store.get("answer")["a"] == here["answer"]["a"]
        assert store.get("answer")["b"] == {"text": "its own"}
        assert store.restore(file) == 0
    with Store(tmp_path / "three.sqlite", {"model": "other"}) as store:
        with pytest.raises(StoreError, match="holds the records of another run"):
            store.restore(file)
        assert store.get("answer") == {}
    assert [path.name for path in file.parent.iterdir()] == ["s.parquet"]
    file.write_bytes(file.read_bytes()[:-20])
    with Store(tmp_path / "four.sqlite", RUN) as store, pytest.raises(StoreError, match=r"s\.parquet cannot be read"):
        store.restore(file)


@pytest.mark.parametrize(
    "record", [{"record": "{"}, {"record": "[1]"}, {"record": 3}, {"stage": None}, {"item_id": ""}]
)
def test_a_file_whose_rows_are_no_records_is_not_taken_over(tmp_path: Path, record: dict) -> None:
    row = {"stage": "answer", "item_id": "a", "record": "{}"} | record
    table = pa.table({name: [cell] for name, cell in row.items()})
    pq.write_table(table.replace_schema_metadata({"identity": json.dumps(RUN)}), tmp_path / "s.parquet")
    with Store(tmp_path / "s.sqlite", RUN) as store:
        with pytest.raises(
            StoreError, match=r"s\.parquet cannot be read \(.*\); remove it, and what it held is computed"
        ):
            store.restore(tmp_path / "s.parquet")
        assert store.get("answer") == {}
