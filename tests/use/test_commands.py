"""`isouq evaluate` and `isouq calibrate`, and the README's five commands from scores to a decision."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import letters
from isouq import cli
from isouq.use import tables
from isouq.use.calibrate import Calibrator
from isouq.use.evaluate import evaluate
from labelled import made_up

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def scores(tmp_path):
    """A file of scores that says which run made it."""
    sink = tables.Sink(tmp_path / "scores.parquet")
    sink.about = {"model": "tiny", "weights": "12", "aggregation": "sequence", "dtype": "float32"}
    with (tmp_path / "scores.parquet").open("wb") as out:
        sink.write([made_up(100)], out)
    return tmp_path / "scores.parquet"


def test_evaluate_prints_and_writes_the_table_the_warnings_and_the_figure(scores, tmp_path, capsys) -> None:
    out, figure = tmp_path / "evaluation.json", tmp_path / "curves.svg"
    command = ["evaluate", str(scores), "--right", "right", "--resamples", "100", "--out", str(out)]
    assert cli.main([*command, "--figure", str(figure)]) == 0
    found, written = evaluate(made_up(100), n_resamples=100), json.loads(out.read_text())
    assert capsys.readouterr().out == f"{found}\n"
    assert written["warnings"] == list(found.warnings)
    assert cli.main([*command, "--clusters", "n_tokens"]) == 0
    assert capsys.readouterr().out == f"{evaluate(made_up(100), clusters='n_tokens', n_resamples=100)}\n"
    values = pd.DataFrame(written["scores"]).astype(found.table.dtypes.to_dict())
    pd.testing.assert_frame_equal(values, found.table, rtol=1e-9)
    assert figure.read_text().startswith("<?xml")


def test_references_take_the_place_of_labels(tmp_path, capsys) -> None:
    table = made_up(100)
    right = table.pop("right")
    table["answer"] = right.map({True: "The Danube.", False: "Rhine"})
    table.assign(gold='["danube", "donau"]').to_csv(tmp_path / "scores.csv", index=False)
    command = ["evaluate", str(tmp_path / "scores.csv"), "--reference", "gold", "--resamples", "100"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{evaluate(made_up(100), n_resamples=100)}\n"
    assert cli.main([*command, "--judge", "f1"]) == 0


def test_calibrate_keeps_the_run_that_a_parquet_file_names_and_says_where_none_is(scores, tmp_path, capsys) -> None:
    command = ["--right", "right", "--resamples", "100", "--abstain", "0.8", "--score", "likelihood"]
    command += ["--out", str(tmp_path / "mine.json")]
    assert cli.main(["calibrate", str(scores), *command]) == 0
    found = Calibrator.load(tmp_path / "mine.json")
    assert (found.about, found.abstain) == (tables.about_of(scores), 0.8)
    shown = capsys.readouterr()
    assert f"answer where p_wrong <= {found.threshold:.4f}" in shown.out
    assert not shown.err
    made_up(100).to_csv(tmp_path / "scores.csv", index=False)
    assert cli.main(["calibrate", str(tmp_path / "scores.csv"), *command]) == 0
    assert Calibrator.load(tmp_path / "mine.json").about is None
    assert "does not say which model its scores are of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--right", "rigth"], "right: 'rigth' given, one of prompt, .* wanted; did you mean 'right'?"),
        (["--right", "right", "--judge", "f1"], "--judge: given without --reference"),
        (["--reference", "gold"], "reference: 'gold' given, one of prompt, "),
        (
            ["--right", "right", "--figure", "curves.gif"],
            r"--figure: curves\.gif given, a file ending in \.svg or \.png",
        ),
        (["--right", "right", "--out", "table.xlsx"], r"--out: table\.xlsx given, a file ending in \.csv or \.json"),
        (["--right", "right", "--scores", "p_ture"], "scores: 'p_ture' given"),
    ],
)
def test_a_wrong_command_is_one_line_with_the_way_out(scores, capsys, arguments, message) -> None:
    assert cli.main(["evaluate", str(scores), *arguments]) == 1
    shown = capsys.readouterr().err
    assert re.search(message, shown)
    assert shown.count("\n") == 1


def test_outputs_go_neither_over_the_scores_nor_nowhere_which_is_said_first(scores, tmp_path, capsys) -> None:
    table = tmp_path / "scores.csv"
    made_up(100).to_csv(table, index=False)
    (tmp_path / "link.csv").symlink_to(table)
    (tmp_path / "hard.csv").hardlink_to(table)
    (tmp_path / "folder.csv").mkdir()
    before = table.read_bytes()
    for name in ("scores.csv", "link.csv", "hard.csv", "folder.csv", "absent/x.csv"):
        command = ["evaluate", str(table), "--right", "right", "--resamples", "40"]
        assert cli.main([*command, "--out", str(tmp_path / name)]) == 1
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1)
        assert f"{name} is a folder, in none, or the scores themselves" in shown.err
    assert table.read_bytes() == before
    command = ["calibrate", str(scores), "--right", "right", "--resamples", "40"]
    assert cli.main([*command, "--out", str(tmp_path / "absent" / "mine.json")]) == 1
    assert "--out: " in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "none.parquet"), "--right", "right"]) == 1
    assert capsys.readouterr().err == f"isouq: file: there is no file {tmp_path / 'none.parquet'}\n"


def test_without_scikit_learn_the_message_names_the_extra(scores) -> None:
    hidden = "import sys; sys.modules['sklearn'] = None; from isouq import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", hidden, "evaluate", str(scores), "--right", "right"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "sklearn is not installed; pip install 'isouq[evaluate]'" in ran.stderr


# The README


def five_commands() -> list[list[str]]:
    section = README.split("## From scores to a decision")[1].split("\n## ")[0]
    block = re.search(r"^```bash\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for line in block[1].strip().replace("\\\n", " ").split("\n")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the README takes for granted: labelled and new questions, and a model to ask."""
    letters.save(tmp_path / "model")
    words = [f"is it {a}{b}?" for a in "abcdefgh" for b in "abcdefgh"]
    right = ["false" if row % 8 == 0 else "true" for row in range(64)]
    labelled = pd.DataFrame({"prompt": words, "answer": [f" {word[6:]}".replace("?", "") for word in words]})
    labelled.assign(right=right).to_csv(tmp_path / "labelled.csv", index=False)
    labelled[::7].to_csv(tmp_path / "new.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_five_commands_lead_from_scores_to_p_wrong(folder, capsys) -> None:
    commands = five_commands()
    assert [command[:2] for command in commands[:4]] == [
        ["isouq", x] for x in ("score", "evaluate", "calibrate", "score")
    ]
    for command in commands[:4]:
        fewer = ["--resamples", "100"] if command[1] in ("evaluate", "calibrate") else []
        assert cli.main([str(folder / "model") if "smollm2" in word else word for word in command[1:]] + fewer) == 0
    [program, *arguments] = commands[4]
    assert program == "python"
    shown = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
    assert "p_wrong" in shown
    assert "accuracy" in capsys.readouterr().out
    table, mine = pd.read_parquet("new.parquet"), Calibrator.load("mine.json")
    assert mine.about == tables.about_of(folder / "scores.parquet")
    assert table["p_wrong"].tolist() == pytest.approx(mine.apply(table).tolist())
    assert table["p_wrong"].between(0, 1).all()
