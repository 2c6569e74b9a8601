"""Chapter 06: its page runs on a tiny model in both of its ways, and its verdict follows from its rule."""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

import letters
from isouq.pipeline import graph, schemas
from isouq.use import your_model
from isouq.use.calibrate import Calibrator
from isouq.use.evaluate import COLUMNS, Evaluation

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "notebooks" / "06_your_model.ipynb"


def run(**parameters) -> dict:
    """The names that the page leaves behind, run with other parameters."""
    cells = [cell.source for cell in nbformat.read(PAGE, as_version=4).cells if cell.cell_type == "code"]
    names: dict = {}
    exec(cells[0], names)
    names.update(parameters)
    for number, cell in enumerate(cells[1:], 1):
        exec(compile(cell, f"cell {number}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return letters.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tiny(model_folder, tmp_path):
    """Parameters for a tiny model and thirty questions, every third answer of which is labelled right."""
    table = pd.DataFrame({"asked": [f"Is it {i}?" for i in range(30)], "said": [" yes", " no", " so"] * 10})
    table["fine"] = [row % 3 == 0 for row in range(30)]
    table["kind"] = [row // 4 for row in range(30)]
    table["reference"] = "a"  # what letters of a random model hold now and then
    table.to_csv(tmp_path / "mine.csv", index=False)
    given = {"model": str(model_folder), "file": str(tmp_path / "mine.csv"), "prompt": "asked"}
    given |= {"work_dir": str(tmp_path / "work"), "results_path": str(tmp_path / "results.json")}
    return given | {"n_resamples": 40, "n_looked_at": 2, "max_new_tokens": 6}


@pytest.mark.usefixtures("figure_style")
def test_the_page_runs_on_answers_and_labels_of_ones_own(tiny, tmp_path, capsys):
    names = run(**tiny, answer="said", label="fine", clusters="kind")
    assert names["table"]["answer"].tolist() == [" yes", " no", " so"] * 10
    assert names["table"]["text"].tolist() == [" yes", " no", " so"] * 10, "scored as written"
    assert names["table"]["p_wrong"].between(0, 1).all()
    assert names["tokens"]["example"].unique().tolist() == ["most certain", "least certain"]
    saved = json.loads((tmp_path / "results.json").read_text())["results"]
    assert saved["your_model.accuracy"]["value"] == pytest.approx(1 / 3)
    assert {"your_model.likelihood.auroc", "your_model.combined.auroc_gain", "your_model.calibrated.ece"} <= set(saved)
    assert re.search(r"^(Use|No score)", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.usefixtures("figure_style")
def test_the_page_lets_the_model_answer_and_judges_by_references(tiny, monkeypatch):
    verdicts = [row % 2 == 0 for row in range(30)]  # a random model is never right
    monkeypatch.setattr("isouq.use.judges.judged", lambda table, judge, reference: pd.Series(verdicts))
    names = run(**tiny, clusters=None)
    assert names["table"]["answer"].str.len().gt(0).all()
    assert (names["table"]["text"] == " " + names["table"]["answer"]).all()
    assert names["table"]["right"].tolist() == verdicts


def evaluation(**aurocs) -> Evaluation:
    """An evaluation of which only AUROCs and their gains are known: name → (value, low, high, gain low, gain high)."""
    rows = [
        [name, "auroc", value, low, high, 60, (gain_low + gain_high) / 2, gain_low, gain_high]
        for name, (value, low, high, gain_low, gain_high) in aurocs.items()
    ]
    return Evaluation(pd.DataFrame(rows, columns=COLUMNS), (), {})


NOT_DEFINED = (np.nan, np.nan)


@pytest.mark.parametrize(
    ("control", "rivals", "wanted"),
    [
        ((0.7, 0.6, 0.8), {"a": (0.8, 0.7, 0.9, 0.01, 0.2), "b": (0.9, 0.8, 0.95, 0.1, 0.3)}, "Use b: on these 60 ans"),
        ((0.7, 0.6, 0.8), {"a": (0.8, 0.7, 0.9, -0.01, 0.2)}, "Use the plain negative log-likelihood (AUROC 0.70 [0.6"),
        (
            (0.5, 0.4, 0.6),
            {"a": (0.5, 0.4, 0.6, -0.1, 0.1)},
            "No score is shown to help: on these 60 answers the plain negative",
        ),
        ((0.5, 0.4, 0.6), {"a": (0.7, 0.6, 0.8, 0.1, 0.3)}, "Use a: on these 60 answers its AUROC is 0.70"),
        ((0.7, np.nan, np.nan), {"a": (0.7, np.nan, np.nan, np.nan, np.nan)}, "No score is shown"),
    ],
)
def test_the_verdict_names_the_score_with_the_largest_gain_above_zero_or_none(control, rivals, wanted):
    found = evaluation(likelihood=(*control, *NOT_DEFINED), **rivals)
    assert your_model.verdict(found).startswith(wanted)


def test_what_is_not_defined_is_not_saved():
    errors = {"brier": (0.2, 0.1, 0.3), "ece": (0.1, 0.05, 0.2)}
    fitted = Calibrator(score="combined", method="logistic", coefficients=(0.0,), knots=None, n=60, **errors)
    found = evaluation(likelihood=(0.7, 0.6, 0.8, *NOT_DEFINED), a=(0.7, np.nan, np.nan, 0.0, 0.1))
    saved = your_model.named_results(
        found, fitted, pd.DataFrame({"right": ["yes", "no", ""], "error": ["", "", "too long"]})
    )
    names = ["accuracy", "likelihood.auroc", "a.auroc_gain", "calibrated.brier", "calibrated.ece"]
    assert list(saved) == [f"your_model.{name}" for name in names]
    assert (saved["your_model.accuracy"].value, saved["your_model.accuracy"].n) == (0.5, 2)


def test_questions_are_read_by_the_names_of_their_columns(tmp_path):
    table = pd.DataFrame({"q": ["a?", "b?"], "answer": ["x", "y"], "mine": [" u", ""]})
    for suffix, write in ((".csv", table.to_csv), (".parquet", table.to_parquet)):
        write(file := str(tmp_path / f"in{suffix}"), index=False)
        assert your_model.questions(file, prompt="q").columns.tolist() == ["prompt", "mine"]
        assert your_model.questions(file, prompt="q", answer="mine")["answer"].tolist() == [" u", ""]
    with pytest.raises(ValueError, match=r"columns q, answer, mine given, 'prompt' wanted among them"):
        your_model.questions(file, prompt="prompt")
    with pytest.raises(
        ValueError, match=r"file: in\.txt given, a file that ends with \.csv, \.jsonl, \.parquet wanted"
    ):
        your_model.questions("in.txt", prompt="q")


def test_texts_of_digits_stay_as_written_and_what_is_used_later_is_asked_for_first(tmp_path):
    file = str(tmp_path / "in.csv")
    Path(file).write_text("prompt,answer,gold\n007, 1.50,TRUE\n1e3, 2,NA\n")
    read = your_model.questions(file, "gold", None, prompt="prompt", answer="answer")
    assert read.to_numpy().tolist() == [["007", " 1.50", "TRUE"], ["1e3", " 2", "NA"]]
    for name in ("label", "answer"):  # the model's own answer is no reference
        with pytest.raises(ValueError, match=f"beside the answer that the model writes it has no column '{name}'"):
            your_model.questions(file, "gold", name, prompt="prompt")
    Path(file).write_text("prompt,gold,gold\na,b,c\n")
    with pytest.raises(ValueError, match="key 'gold' is there twice"):
        your_model.questions(file, prompt="prompt")
    Path(file).write_text("prompt,gold\nWho?, Smith, John\n")
    with pytest.raises(ValueError, match="rows have more cells than its 2 columns"):
        your_model.questions(file, prompt="prompt")


def test_the_supplied_questions_are_sixty_found_from_anywhere_and_part_of_the_job(tmp_path, monkeypatch):
    run_of = graph.Graph({"profile": "smoke"})
    [line] = run_of.questions("06_your_model")
    assert re.fullmatch(r'notebooks/06_questions\.csv: "[0-9a-f]{64}"', line)
    assert run_of.questions("05_cost") == []
    monkeypatch.chdir(tmp_path)
    given = schemas.YourModel()
    table = your_model.questions(given.file, prompt=given.prompt)
    assert len(table) == table["prompt"].nunique() == 60
    assert table[given.reference].str.len().gt(0).all()
