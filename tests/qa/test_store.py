"""A store is bound to its run, writes all or nothing, never twice, and one process at a time."""

import sqlite3
from pathlib import Path

import pytest

from isouq.qa.store import Store, StoreError, code_digest, store_path

RUN = {"model": "m", "settings": {"seed": 0}}


def test_records_come_back_exactly_and_in_order(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite", RUN) as store:
        store.put("b", {"answer": {"log_prob": -0.1 - 0.2, "text": "naïve"}, "verdict": {"right": True}})
        store.put("a", {"answer": {"log_prob": 1e-300, "text": ""}})
        assert store.missing("verdict", ["a", "b", "c"]) == ["a", "c"]
    with Store(tmp_path / "s.sqlite", RUN) as store:
        assert list(store.get("answer")) == ["b", "a"]
        assert store.get("answer")["b"] == {"log_prob": -0.1 - 0.2, "text": "naïve"}
        assert store.get("estimate") == {}


def test_a_record_is_never_written_twice_and_a_transaction_is_whole(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite", RUN) as store:
        store.put("a", {"verdict": {"right": True}})
        with pytest.raises(StoreError, match="a already has one of answer, verdict"):
            store.put("a", {"answer": {"text": "x"}, "verdict": {"right": False}})
        assert store.get("answer") == {}
        assert store.get("verdict") == {"a": {"right": True}}
        store.put("b", {"answer": {"text": "y"}})  # the store is usable after a refusal


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
    with Store(tmp_path / "s.sqlite", RUN), pytest.raises(StoreError, match="in use by another process"):
        Store(tmp_path / "s.sqlite", RUN)
    Store(tmp_path / "s.sqlite", RUN).close()


def test_the_name_is_readable_and_tells_runs_apart(tmp_path: Path) -> None:
    one = store_path(tmp_path, "org/model@rev--triviaqa", RUN)
    assert one.name.startswith("org_model@rev--triviaqa-")
    assert one != store_path(tmp_path, "org/model@rev--triviaqa", {**RUN, "model": "n"})
    assert one == store_path(tmp_path, "org/model@rev--triviaqa", dict(reversed(RUN.items())))


def test_the_code_digest_follows_code_and_ignores_comments(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    module, inner = tmp_path / "m.py", tmp_path / "part" / "n.py"

    def found(code: str) -> str:
        module.write_text(code)
        return code_digest(tmp_path, ["m", "part"])

    inner.write_text("x = 1\n")
    first = found('def f():\n    """Old."""\n    return 1\n')
    assert found('def f():\n    """New."""\n    # why\n    return (1)\n') == first
    assert found("def f():\n    return 2\n") != first
    again = found("def f():\n    return 1\n")
    inner.write_text("x = 2\n")
    assert code_digest(tmp_path, ["m", "part"]) != again
