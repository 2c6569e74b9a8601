"""Tables as people have them: read as written, or refused in one line with the way out; written as they were."""

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import re

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isouq.use import tables

PAIR = b'{"prompt": "a", "answer": "b"}\n'


def written(table: pd.DataFrame, path) -> bytes:
    out = io.BytesIO()
    tables.Sink(path).write([table], out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("shift.csv", b"prompt,answer\nq, a,\n", "line 2: 3 fields, the header has 2"),
        ("comma.csv", b'prompt,answer\nq,"a\nb"\nWho?, Smith, John\n', "line 4: 3 fields, the header has 2"),
        ("short.csv", b"prompt,answer,id\nq,a,1\nr,b\n", "line 3: 2 fields, the header has 3"),
        ("open.csv", b'prompt,answer\nq,"a\nr,b\n', "line 2: unexpected end of data; put a field with a comma"),
        ("after.csv", b'prompt,answer\nq,"a"b\n', "line 2: ',' expected after '\"'"),
        ("latin.csv", "prompt,answer\nWo?,Köln\n".encode("latin-1"), "line 2 is no text in UTF-8"),
        ("sixteen.csv", "prompt,answer\na,b\n".encode("utf-16"), "line 1 is no text in UTF-8"),
        ("bare16.csv", "prompt,answer\na,b\n".encode("utf-16-le"), "line 1 is no text in UTF-8"),
        ("packed.csv", gzip.compress(b"prompt,answer\na,b\n", mtime=0), "is no text in UTF-8"),
        ("excel.csv", b"PK\x03\x04\x14\x00\x06\x00", "line 1 is no text in UTF-8"),
        ("nul.csv", b"prompt,answer\na,b\nc,\0\n", "line 3 is no text in UTF-8"),
        ("empty.csv", b"", "the file is empty"),
        ("blank.csv", b"\n\n", "the file is empty"),
        ("twice.csv", b"prompt,answer,answer\na,b,c\n", "two columns of one name among prompt, answer, answer"),
        ("semicolons.csv", b"prompt;answer\na;b\n", "columns 'prompt;answer' given, one named 'prompt' wanted"),
        ("promt.csv", b"promt,answer\na,b\n", "did you mean 'promt'?"),
        ("capital.csv", b"Prompt,answer\na,b\n", "did you mean 'Prompt'?"),
        ("space.csv", b"prompt, answer\na,b\n", "column ' answer' given, none named 'answer'"),
        ("plural.jsonl", b'{"prompt": "a", "Answers": "b"}\n', "column 'Answers' given, none named 'answer'"),
        ("ragged.jsonl", PAIR + b'{"prompt": "a", "anwser": "b"}\n', "column 'anwser' given, none named 'answer'"),
        ("empty.jsonl", b"", "columns none given, one named 'prompt' wanted"),
        ("array.jsonl", b'[{"prompt": "a"}]\n', "line 1: no object, but a list or a single value"),
        ("pretty.jsonl", b'{\n  "prompt": "a"\n}\n', "line 1: Expecting property name"),
        ("torn.jsonl", PAIR + b'{"prompt": "c", "ans', "line 2: Unterminated string starting at: column 17"),
        ("two.jsonl", PAIR[:-1] + PAIR, "line 1: Extra data"),
        ("key.jsonl", PAIR + b'{"prompt": "a", "answer": "b", "answer": "c"}\n', "line 2: key 'answer' is there twice"),
        ("inner.jsonl", b'{"prompt": "a", "x": {"k": 1, "k": 2}}\n', "line 1: key 'k' is there twice"),
        ("nan.jsonl", b'{"prompt": "a", "x": NaN}\n', "line 1: Out of range float values"),
        ("huge.jsonl", b'{"prompt": "a", "x": 1e999}\n', "line 1: Out of range float values"),
        ("half.jsonl", b'{"prompt": "a", "x": "\\ud83d"}\n', "line 1: 'utf-8' codec can't encode character"),
        ("deep.jsonl", b'{"prompt": ' + b"[" * 100_000 + b"\n", "line 1: maximum recursion depth"),
        ("text.parquet", b"prompt,answer\na,b\n", "no Parquet file"),
    ],
)
def test_what_cannot_be_read_is_refused_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: ") + ".*" + re.escape(message)):
        tables.read(tmp_path / name)


def test_a_folder_and_a_missing_file_are_no_input(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    for name in ("folder.csv", "absent.csv"):
        with pytest.raises(ValueError, match=f"^file: there is no file .*{name}"):
            tables.read(tmp_path / name)
        with pytest.raises(ValueError, match=f"^--input: there is no file .*{name}"):
            tables.Source(tmp_path / name)


def test_csv_cells_are_the_texts_of_the_file(tmp_path):
    cells = ["NA", "1e5", "007", "", " x ", 'a "quoted", word', "two\nlines", "carriage\rreturn", "\u2028", "1.10", "é"]
    rows = [["prompt", "answer", ""], *([f"p{i}", cell, f"{i}"] for i, cell in enumerate(cells))]
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    (tmp_path / "in.csv").write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    table = tables.read(tmp_path / "in.csv")
    assert table["answer"].tolist() == cells
    again = list(csv.reader(io.StringIO(written(table, tmp_path / "o.csv").decode(), newline=""), strict=True))
    assert again == rows
    assert [json.loads(line)["answer"] for line in written(table, tmp_path / "o.jsonl").split(b"\n")[:-1]] == cells
    assert pq.read_table(io.BytesIO(written(table, tmp_path / "o.parquet")))["answer"].to_pylist() == cells


def test_long_fields_and_missing_line_ends_are_read(tmp_path):
    (tmp_path / "in.csv").write_bytes(b"prompt,answer\r\n" + b"x" * 300_000 + b",b\r\n\r\nq,c")
    limit = csv.field_size_limit()
    assert tables.read(tmp_path / "in.csv")["prompt"].map(len).tolist() == [300_000, 1]
    assert csv.field_size_limit() == limit
    (tmp_path / "in.jsonl").write_bytes(PAIR.replace(b"\n", b"\r\n") + b"\n" + PAIR.strip())
    assert tables.read(tmp_path / "in.jsonl")["answer"].tolist() == ["b", "b"]


def test_a_header_alone_is_a_table_of_no_rows(tmp_path):
    (tmp_path / "in.csv").write_text("prompt,answer\n")
    assert len(tables.read(tmp_path / "in.csv")) == 0


@pytest.mark.parametrize("number", ["42", "1.0", "1.10", "1e3", "-0", "0.12345678901234567890", "9" * 40])
def test_a_number_of_json_is_the_text_that_stands_there(tmp_path, number):
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": {number}, "answer": {number}}}\n')
    table = tables.read(tmp_path / "in.jsonl")
    assert (table["prompt"][0], table["answer"][0]) == (number, number)


def test_json_values_keep_their_types(tmp_path):
    rows = [
        {"prompt": "a", "id": 1, "big": 2**70, "flag": True, "list": [1, 2], "mixed": 1, "x": 0.1},
        {"prompt": "b", "id": None, "big": -1, "flag": None, "list": None, "mixed": "two", "x": 1e-300},
        {"prompt": "c", "id": 3, "big": 0, "flag": False, "list": [], "mixed": {"a": "é"}, "x": None},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tables.read(tmp_path / "in.jsonl")
    again = [json.loads(line) for line in written(table, tmp_path / "o.jsonl").decode().split("\n")[:-1]]
    assert again == rows
    assert [type(row["id"]) for row in again] == [int, type(None), int]
    with pytest.raises(ValueError, match=r"--output: \.csv cannot hold the table: column 'list' has lists"):
        written(table, tmp_path / "o.csv")
    with pytest.raises(ValueError, match=r"--output: \.parquet cannot hold the table.*mixed"):
        written(table.drop(columns="big"), tmp_path / "o.parquet")
    with pytest.raises(ValueError, match=r"--output: \.parquet cannot hold the table"):
        written(table[["prompt", "big"]], tmp_path / "o.parquet")
    kept = pq.read_table(io.BytesIO(written(table[["prompt", "id", "flag", "x"]], tmp_path / "o.parquet")))
    assert [str(kind) for kind in kept.schema.types] == ["string", "int64", "bool", "double"]
    assert kept["id"].to_pylist() == [1, None, 3]
    assert (
        written(table[["id", "flag", "x"]], tmp_path / "o.csv").decode()
        == "id,flag,x\n1,True,0.1\n,,1e-300\n3,False,\n"
    )


PARQUET = pa.table(
    {
        "prompt": ["a", "b"],
        "id": pa.array([1, None], pa.int32()),
        "blob": [b"\x00\xff", None],
        "day": [datetime.date(2020, 2, 29), None],
        "time": pa.array([datetime.datetime(2020, 1, 1, 1, 2, 3), None], pa.timestamp("ns", "UTC")),
        "price": [decimal.Decimal("1.20"), None],
        "kind": pa.array(["x", None]).dictionary_encode(),
        "list": [[1, None], None],
        "parts": [{"a": 1, "b": b"x"}, None],
        "float": pa.array([0.1, float("nan")], pa.float32()),
    }
)


def test_parquet_columns_keep_their_types(tmp_path):
    pq.write_table(PARQUET, tmp_path / "in.parquet")
    table = tables.read(tmp_path / "in.parquet")
    again = pq.read_table(io.BytesIO(written(table, tmp_path / "o.parquet")))
    assert again.schema == PARQUET.schema
    assert str(again.to_pylist()) == str(PARQUET.to_pylist())
    for suffix in ("csv", "jsonl"):
        with pytest.raises(ValueError, match=rf"--output: \.{suffix} cannot hold the table: .*bytes"):
            written(table, tmp_path / f"o.{suffix}")
    plain = table.drop(columns=["blob", "list", "parts", "float"])
    first, second = written(plain, tmp_path / "o.csv").decode().split("\n")[1:3]
    assert first == "a,1,2020-02-29,2020-01-01 01:02:03+00:00,1.20,x"
    assert second == "b,,,,,"
    first, second = map(json.loads, written(plain, tmp_path / "o.jsonl").split(b"\n")[:2])
    assert first == {
        "prompt": "a",
        "id": 1,
        "day": "2020-02-29",
        "time": "2020-01-01 01:02:03+00:00",
        "price": "1.20",
        "kind": "x",
    }
    assert second == {"prompt": "b"} | dict.fromkeys(["id", "day", "time", "price", "kind"])
    with pytest.raises(ValueError, match="Out of range float"):
        written(table[["float"]], tmp_path / "o.jsonl")


def test_parquet_of_pandas_keeps_its_index_and_its_own_types(tmp_path):
    table = pd.DataFrame(
        {"prompt": ["a", "b"], "n": pd.array([1, None], dtype="Int64"), "answer": pd.array([1, None], dtype="Int64")},
        index=pd.Index(["k", "l"], name="key"),
    )
    table.to_parquet(tmp_path / "in.parquet")
    read = tables.read(tmp_path / "in.parquet")
    read["answer"] = pd.Series(["1", "made"], dtype=object)
    (tmp_path / "o.parquet").write_bytes(written(read, tmp_path / "o.parquet"))
    again = pd.read_parquet(tmp_path / "o.parquet")
    assert again.index.tolist() == ["k", "l"]
    assert again["n"].dtype == "Int64"
    assert again["answer"].tolist() == ["1", "made"]


def test_the_output_is_never_the_input(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("prompt\na\n")
    (tmp_path / "link.csv").symlink_to(source)
    os.link(source, tmp_path / "hard.csv")
    for name in ("in.csv", "link.csv", "hard.csv", f"../{tmp_path.name}/in.csv"):
        with pytest.raises(ValueError, match=r"--output: .* is the input itself"):
            tables.target(tmp_path / name, source)


def test_an_output_behind_a_link_is_the_file_that_is_meant(tmp_path):
    (tmp_path / "in.csv").write_text("prompt\na\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "far" / "o.csv")
    assert tables.target(tmp_path / "link.csv", tmp_path / "in.csv") == (tmp_path / "far" / "o.csv").resolve()
    assert (tmp_path / "far").is_dir()


def test_what_may_not_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "in.csv").write_text("prompt\na\n")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=r"--output: .*folder\.csv is a folder; name a file"):
        tables.target(tmp_path / "folder.csv", tmp_path / "in.csv")
    with pytest.raises(OSError, match=r"in\.csv"):
        tables.target(tmp_path / "in.csv" / "o.csv", tmp_path / "in.csv")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a test may run as root, who may write everywhere
    with pytest.raises(ValueError, match=r"--output: .*o\.csv may not be written"):
        tables.target(tmp_path / "o.csv", tmp_path / "in.csv")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "o.csv"
    path.write_text("old")

    def torn() -> None:
        with tables.replacing(path) as out:
            out.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        torn()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["o.csv"]
    with tables.replacing(path) as out:
        out.write(b"new")
    assert path.read_text() == "new"


def test_one_holds_the_lock_and_leaves_nothing(tmp_path):
    with tables.locked(tmp_path / "o.csv"):
        with pytest.raises(ValueError, match="another isouq score is writing it"), tables.locked(tmp_path / "o.csv"):
            pass
        with pytest.raises(ValueError, match="another isouq score is writing it"), tables.locked(tmp_path / "o.csv"):
            pass
    with pytest.raises(KeyError), tables.locked(tmp_path / "o.csv"):
        raise KeyError
    assert os.listdir(tmp_path) == []
