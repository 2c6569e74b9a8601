"""The draw of questions, the prompts, and each reader on a small file of the set's own form."""

import json
import sys

import fsspec.implementations.local
import pandas as pd
import pyarrow as pa
import pytest

from isouq.studies.qa import data, study
from isouq.studies.qa.data import DataSet, Question


@pytest.fixture
def hundred() -> DataSet:
    questions = tuple(Question(str(i), f"question {i}", (f"answer {i}",)) for i in range(100))
    return DataSet("hundred", questions, "Q: {question}\nA:{answer}\n\n")


def test_a_smaller_draw_is_the_front_of_a_larger_one(hundred: DataSet) -> None:
    large, shots = data.sample(hundred, 90, n_shots=5, seed=3)
    small, same_shots = data.sample(hundred, 20, n_shots=5, seed=3)
    assert small == large[:20]
    assert shots == same_shots
    assert len({q.item_id for q in large}) == 90
    assert not {q.item_id for q in large} & {q.item_id for q in shots}
    assert data.sample(hundred, 20, n_shots=5, seed=4)[0] != small


def test_examples_are_short_since_every_prompt_pays_for_them(hundred: DataSet) -> None:
    long = tuple(Question(f"long {i}", "w" * data.SHOT_CHARACTERS, ("x",)) for i in range(300))
    mixed = DataSet("mixed", long + hundred.questions, hundred.template)
    assert {q.item_id for q in data.sample(mixed, 10, n_shots=5, seed=0)[1]} <= {str(i) for i in range(100)}
    with pytest.raises(ValueError, match="0 of them short"):
        data.sample(DataSet("long", long, hundred.template), 10, n_shots=1, seed=0)


@pytest.mark.parametrize("n_questions", [0, 96])
def test_a_draw_that_the_set_cannot_give_is_refused(hundred: DataSet, n_questions: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 95, got {n_questions}"):
        data.sample(hundred, n_questions, n_shots=5, seed=0)


def test_the_prompt_ends_where_the_answer_begins(hundred: DataSet) -> None:
    first, second = hundred.questions[:2]
    assert hundred.prompt(second, [first]) == "Q: question 0\nA: answer 0\n\nQ: question 1\nA:"


def test_triviaqa_puts_the_value_before_its_aliases(tmp_path) -> None:
    rows = [{"question_id": "tc_1", "question": " Who? ", "answer": {"value": "Me", "aliases": ["I", "Me"]}}]
    path = tmp_path / "data.arrow"
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert data.load("triviaqa", path).questions == (Question("tc_1", "Who?", ("Me", "I")),)


def test_wikidata_merges_a_statement_that_occurs_twice(tmp_path) -> None:
    examples = [
        {"input": "The genre of X is", "target": ["pop", "rock"]},
        {"input": "The capital of Y is", "target": "Z"},
        {"input": "The genre of X is", "target": "jazz"},
    ]
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"examples": examples}))
    loaded = data.load("wikidata", path)
    assert [q.answers for q in loaded.questions] == [("pop", "rock", "jazz"), ("Z",)]
    assert loaded.prompt(loaded.questions[1], loaded.questions[:1]) == "The genre of X is pop\nThe capital of Y is"


def test_truthfulqa_uses_its_official_prefix_and_no_label_twice(tmp_path) -> None:
    answers = {"Best answer": "B.", "True answers": ["A.", "B."], "False answers": ["C.", "C."]}
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"prefix": "Q: a\nA: b\n\n", "examples": [{"Question": "Why?", **answers}]}))
    loaded = data.load("truthfulqa", path)
    (question,) = loaded.questions
    assert (question.answers, question.false_answers) == (("B.", "A."), ("C.",))
    assert loaded.prompt(question) == "Q: a\nA: b\n\nQ: Why?\nA:"


@pytest.mark.assets
@pytest.mark.parametrize(("name", "n"), [("triviaqa", 7993), ("wikidata", 20320), ("truthfulqa", 299)])
def test_the_real_sets_are_whole_and_answerable(name: str, n: int) -> None:
    questions = study.load_questions(name).questions
    assert len(questions) == len({q.item_id for q in questions}) == n
    assert all(q.question and q.answers and all(q.answers) for q in questions)
    assert all(bool(q.false_answers) == (name == "truthfulqa") for q in questions)
    assert not any(set(q.answers) & set(q.false_answers) for q in questions)


ROWS = [
    {"question": "Who wrote Faust?", "answer": ["Goethe", "J. W. Goethe"], "false_answers": ["Schiller"]},
    {"question": " Capital of Peru? ", "answer": ["Lima"], "false_answers": ["Cusco", "Quito"]},
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_questions_of_a_file(tmp_path, ending: str) -> None:
    file = tmp_path / f"My questions.{ending}"
    if ending == "csv":
        file.write_text("id,question,answer\n7,Who wrote Faust?,Goethe\n08,Capital of Peru?,NA\n")
    elif ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pd.DataFrame(ROWS).to_parquet(file)
    assert data.is_file(str(file))
    assert data.key_part(str(file)) == "my-questions"
    one, two = data.read_file(str(file)).questions
    if ending == "csv":
        assert (one.item_id, one.answers) == ("7", ("Goethe",))
        assert (two.item_id, two.answers, two.false_answers) == ("08", ("NA",), ())
    else:
        assert one.answers == ("Goethe", "J. W. Goethe")
        assert (two.question, two.false_answers) == ("Capital of Peru?", ("Cusco", "Quito"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,reply\na,b\n", "columns question, reply given, 'answer' wanted"),
        ("question,answer\na,b\n,c\n", "row 2: question '' given, a text wanted"),
        ("question,answer\na,b\nc,\n", "row 2: answer '' given, a text wanted"),
        ("question,answer\na,b\na,c\n", r"two rows of one question or id \("),
        ("question,answer,id\na,b,7\nc,d,7\n", r"two rows of one question or id \(7\)"),
        ("question,answer,id\na,b,7\nc,d,\n", "row 2: no id given; wanted in every row, or no column of that name"),
        ("question,answer,answer\na,b,c\n", "cannot be read: key 'answer' is there twice"),
        ("question,answer\n", "no row given, at least one question wanted"),
        ("question,answer\na,b,c,d\n", "cannot be read: rows have more cells than its 2 columns"),
        ("question,answer\na,b\nc,d,e\n", "cannot be read: .*Expected 2 fields in line 3, saw 3"),
        ("question,answer\na\n", "row 1: answer '' given, a text wanted"),
        ("", "cannot be read: No columns to parse"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_a_file_that_is_not_of_questions_is_refused_by_name(tmp_path, text: str | None, message: str) -> None:
    file = tmp_path / "q.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=f"q.csv: {message}"):
        data.read_file(str(file))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": []}, "row 2: one question and at least one answer wanted"),
        ({"answer": 3}, "row 2: answer 3 given, a text wanted"),
        ({"answer": ["d", ["e"]]}, "row 2: answer .* given, a text wanted"),
        ({"question": None}, "row 2: question nan given, a text wanted"),
        ({"question": ["c", "d"]}, "row 2: one question and at least one answer wanted"),
        ({"question": True}, "row 2: question True given, a text wanted"),
        ({"answer": "d", "false_answers": ["e", " d"]}, "row 2: 'd' given as right and as wrong; one of them wanted"),
        ({"false_answers": [""]}, r"row 2: false_answers \[''\] given, a text wanted"),
    ],
)
def test_a_row_of_other_types_is_refused_by_its_number(tmp_path, row: dict, message: str) -> None:
    file = tmp_path / "q.jsonl"
    rows = [{"question": "a", "answer": ["b"], "false_answers": []}, {"question": "c", "answer": "d"}]
    rows[1] |= {"false_answers": []} | row
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(ValueError, match=f"q.jsonl: {message}"):
        data.read_file(str(file))


def test_lines_of_json_are_read_as_written(tmp_path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "a", "answer": "b", "answer": "c"}\n')
    with pytest.raises(ValueError, match=r"q\.jsonl: cannot be read: key 'answer' is there twice"):
        data.read_file(str(file))
    number = 12345678901234567890123
    file.write_text(f'{{"question": "2020-01-01", "answer": "b", "id": {number}}}\n\n')
    (question,) = data.read_file(str(file)).questions
    assert (question.item_id, question.question) == (str(number), "2020-01-01")


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_a_file_on_the_hub_is_read_through_its_file_system(monkeypatch, tmp_path, ending: str) -> None:
    """The Hub's file system is a folder here; the address is the one that a reader would give."""

    class Hub(fsspec.implementations.local.LocalFileSystem):
        protocol = "hf"

        @classmethod
        def _strip_protocol(cls, path):
            return str(tmp_path / path.removeprefix("hf://"))

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    (tmp_path / "datasets/owner/set@v1").mkdir(parents=True)
    file = tmp_path / f"datasets/owner/set@v1/q.{ending}"
    table = pd.DataFrame([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    {"csv": lambda: table.to_csv(file, index=False), "parquet": lambda: table.to_parquet(file)}.get(
        ending, lambda: table.to_json(file, orient="records", lines=True)
    )()
    name = f"hf://datasets/owner/set@v1/q.{ending}"
    assert [q.answers for q in data.read_file(name).questions] == [("b",), ("d",)]
    file.unlink()
    with pytest.raises(ValueError, match=f"{name}: cannot be read: "):
        data.read_file(name)
