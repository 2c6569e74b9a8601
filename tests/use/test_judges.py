"""References in place of labels: what each judge takes for right, and how accepted answers are written."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from isouq.use import commands
from isouq.use.judges import JUDGES, judged

ANSWERS = ["The Danube!", " It is the Danube, in Budapest", "Rhine", "Danube river"]


@pytest.mark.parametrize(
    ("judge", "right"),
    [
        ("exact", [True, False, False, False]),
        ("f1", [True, False, False, True]),  # 2·1/(1 + 2) of the words of the last, 2·1/(1 + 5) of the second
        ("contains", [True, True, False, True]),
    ],
)
def test_what_each_judge_takes_for_right(judge, right) -> None:
    table = pd.DataFrame({"answer": ANSWERS, "gold": ["danube"] * 4})
    assert judged(table, judge, "gold").tolist() == right


def test_a_contained_reference_is_whole_words_and_never_empty() -> None:
    table = pd.DataFrame({"answer": ["Danubes", "the a", "x"], "gold": ["danube", "a", "!"]})
    assert judged(table, "contains", "gold").tolist() == [False, False, False]


@pytest.mark.parametrize(
    "references",
    [
        [["Rhine", "Danube"]] * 2,
        ['["Rhine", "Danube"]'] * 2,
        [np.array(["Rhine", "Danube"], dtype=object)] * 2,
        pd.Series([["Rhine", "Danube"]] * 2, index=[3, 9], dtype=pd.ArrowDtype(pa.list_(pa.string()))),
    ],
    ids=["lists", "JSON", "arrays", "Arrow"],
)
def test_any_accepted_answer_will_do_however_they_are_listed(references) -> None:
    table = pd.DataFrame({"answer": ["Danube", "Elbe"], "gold": references}, index=[3, 9])
    verdicts = judged(table, "exact", "gold")
    assert verdicts.to_dict() == {3: True, 9: False}


def test_a_text_in_brackets_that_is_no_json_is_a_text() -> None:
    table = pd.DataFrame({"answer": ["[x]"], "gold": ["[x]"]})
    assert judged(table, "exact", "gold").tolist() == [True]


def test_an_answer_that_is_missing_and_a_reference_that_is_no_text_are_refused_by_row() -> None:
    for cell in (None, np.nan, pd.NA):
        table = pd.DataFrame({"answer": ["x", cell], "gold": ["none", "none"]})
        with pytest.raises(ValueError, match=r"^answer: nothing given in row 2, a text wanted"):
            judged(table, "contains", "gold")
    for cell in ({"a": "x"}, [["x"]], {"x"}, b"x", '[["x"]]', "[null]", "[]"):
        table = pd.DataFrame({"answer": ["x", "{'a': 'x'}"], "gold": ["x", cell]}, dtype=object)
        with pytest.raises(ValueError, match=r"^gold: .* given in row 2, a text or a list of texts wanted"):
            judged(table, "exact", "gold")
    assert judged(pd.DataFrame({"answer": ["1998"], "gold": [1998]}), "exact", "gold").tolist() == [True]


def test_failed_rows_need_no_reference_and_others_do() -> None:
    table = pd.DataFrame({"answer": ["a b", None], "gold": ["b", None], "error": [None, "empty"]})
    assert judged(table, "contains", "gold").tolist() == [True, None]
    for cell in (None, "", [], ["b", None], "[]", np.nan):
        with pytest.raises(ValueError, match=r"gold: .* given in row 2, a text or a list of texts wanted"):
            judged(pd.DataFrame({"answer": ["a", "b"], "gold": ["a", cell]}), "exact", "gold")


def test_unknown_names_are_refused_with_the_nearest() -> None:
    table = pd.DataFrame({"answer": ["a"], "gold": ["a"]})
    with pytest.raises(ValueError, match=r"judge: 'exakt' given.*did you mean 'exact'"):
        judged(table, "exakt", "gold")
    with pytest.raises(ValueError, match=r"reference: 'golt' given.*did you mean 'gold'"):
        judged(table, "exact", "golt")
    assert tuple(JUDGES) == commands.JUDGES
