"""`isouq score`: file to file, bad rows named, a killed run gone on with, nothing scored twice."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import get_args

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import isouq
import letters
from isouq import cli, estimate, gradients
from isouq.language import generation, scoring
from isouq.use import files, tables
from letters import read_lines, score


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return letters.save(tmp_path_factory.mktemp("model"))


PLAIN = files.Run(model="", load=tuple, how=scoring.Scoring())
QUESTIONS = pd.DataFrame(
    {"id": [7, 8, 9], "prompt": ["Is it a?", "Is it b?", "Is it cc?"], "answer": [" yes", " no", " no"]}
)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_every_format_gives_the_scores_of_score_texts(model_folder, tmp_path, suffix):
    source, target = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    write = {"csv": QUESTIONS.to_csv, "parquet": QUESTIONS.to_parquet}
    if suffix == "jsonl":
        QUESTIONS.to_json(source, orient="records", lines=True)
    else:
        write[suffix](source, index=False)
    assert score(model_folder, source, target, "--batch-size", "2") == 0
    read = {"csv": pd.read_csv, "parquet": pd.read_parquet, "jsonl": lambda p: pd.read_json(p, lines=True)}
    got = read[suffix](target)
    model, tokenizer = isouq.load_causal_lm(str(model_folder))
    wanted = isouq.score_texts(model, tokenizer, list(QUESTIONS.prompt), list(QUESTIONS.answer))
    assert list(got.id.astype(int)) == [7, 8, 9]
    for column in ("log_prob", "log_epistemic", "aleatoric"):
        assert got[column].to_numpy() == pytest.approx(wanted[column].to_numpy(), rel=1e-5)


def test_a_bad_row_is_named_and_the_rest_is_scored(model_folder, tmp_path, capsys):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    pd.DataFrame({"prompt": ["ab?", "", "a" * 90, "cd?"], "answer": [" no", " no", " no", ""]}).to_csv(
        source, index=False
    )
    assert score(model_folder, source, target) == 1
    err = capsys.readouterr().err
    assert "row 2: prompt: empty" in err
    assert "row 3: input_ids: the row has 93 tokens, at most the model's context of 64 wanted" in err
    assert "example" not in err
    got = pd.read_csv(target)
    assert got.error.notna().tolist()[:3] == [False, True, True]
    assert got.log_epistemic.notna().tolist()[:3] == [True, False, False]


def test_a_missing_answer_is_generated_and_its_ids_are_scored(model_folder, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "Is it a?"}) + "\n")
    assert score(model_folder, source, target, "--max-new-tokens", "5") == 0
    row = json.loads(target.read_text())
    assert 1 <= row["n_tokens"] <= 5
    assert row["log_prob"] < 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--input", "in.txt"], "--input: in.txt given, a file ending in .csv, .jsonl, .parquet wanted"),
        (["--input", "absent.csv"], "there is no file"),
        (["--output", "out.xlsx"], "--output: out.xlsx given"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    QUESTIONS.to_csv("in.csv", index=False)
    arguments = ["score", "--model", "no-model", "--input", "in.csv", "--output", "out.csv", *change]
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_killed_run_goes_on_and_scores_nothing_twice(model_folder, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    n = 160
    pd.DataFrame({"prompt": [f"Is it {i}?" for i in range(n)], "answer": [" no"] * n}).to_csv(source, index=False)
    command = [sys.executable, "-m", "isouq.cli", "score", "--model", str(model_folder)]
    command += ["--input", str(source), "--output", str(target)]
    partial = tmp_path / "out.csv.partial"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.read_text().count("\n") > 5):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "no row was scored"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with partial.open("a") as file:
        file.write('{"row": 3, "torn')  # what a kill in the middle of a write leaves
    before = {json.loads(line)["row"] for line in partial.read_text().split("\n")[1:-1]}
    assert 5 <= len(before) < n
    scored = []
    original = scoring.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scoring, "score", lambda model, examples, how: scored.extend(examples) or original(model, examples, how)
        )
        assert score(model_folder, source, target) == 0
    assert len(scored) == n - len(before)
    assert len(pd.read_csv(target)) == n
    assert not partial.exists()


def stop_after(n, error):
    """scoring.score that raises `error` once it has scored n times."""
    calls, original = [], scoring.score

    def score_once(*args, **options):
        calls.append(1)
        if len(calls) > n:
            raise error
        return original(*args, **options)

    return score_once


@pytest.fixture
def interrupted(model_folder, tmp_path, monkeypatch):
    """A run of 3 rows stopped after the first; its source and target."""
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    QUESTIONS.to_csv(source, index=False)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", stop_after(1, KeyboardInterrupt()))
        assert score(model_folder, source, target, "--batch-size", "1") == 130
    partial = tmp_path / "out.csv.partial"
    assert len(read_lines(partial)) == 2
    return source, target, partial


def test_a_run_resumes_with_another_batch_size_byte_for_byte(model_folder, tmp_path, interrupted, monkeypatch):
    source, target, partial = interrupted
    assert score(model_folder, source, tmp_path / "whole.csv") == 0
    seen = []
    original = scoring.score
    monkeypatch.setattr(scoring, "score", lambda m, x, how: seen.extend(x) or original(m, x, how))
    assert score(model_folder, source, target, "--batch-size", "2", "--max-new-tokens", "7") == 0
    assert len(seen) == 2
    assert not partial.exists()
    assert pd.read_csv(target).iloc[:, :3].equals(pd.read_csv(tmp_path / "whole.csv").iloc[:, :3])
    assert pd.read_csv(target).log_prob.to_numpy() == pytest.approx(
        pd.read_csv(tmp_path / "whole.csv").log_prob, rel=1e-6
    )


@pytest.mark.parametrize("change", ["aggregation", "chat", "dtype", "input", "weights", "tokenizer", "configuration"])
def test_a_run_does_not_resume_as_another(model_folder, tmp_path, interrupted, capsys, change):
    source, target, partial = interrupted
    before, options, folder = partial.read_bytes(), [], model_folder
    asked = {"aggregation": ["--aggregation", "geometric"], "chat": ["--chat"], "dtype": ["--dtype", "float64"]}
    if change in asked:
        options = asked[change]
    elif change == "input":
        source.write_text(source.read_text().replace("Is it b?", "Is it d?"))
    else:
        folder = tmp_path / "other"
        shutil.copytree(model_folder, folder)
        if change == "weights":
            model = LlamaForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                model.model.norm.weight[0] += 1e-4
            model.save_pretrained(folder)
        else:
            name, old, new = ("tokenizer.json", '"x":', '"\\u00e9":')
            if change == "configuration":
                name, old, new = ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03')
            assert old in (folder / name).read_text()
            (folder / name).write_text((folder / name).read_text().replace(old, new))
    assert score(folder, source, target, *options) == 1
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert f"{partial}: 1 rows of another run" in said
    said_of = {
        "aggregation": "aggregation 'sequence' there, 'geometric' here",
        "chat": "chat False there, True here",
        "dtype": "dtype 'float32' there, 'float64' here",
        "input": "input '",
    }
    assert said_of.get(change, "weights '") in said
    assert "delete this file to start afresh, or name another --output" in said
    assert partial.read_bytes() == before


def test_the_same_weights_under_another_name_resume(model_folder, tmp_path, interrupted):
    source, target, _ = interrupted
    shutil.copytree(model_folder, tmp_path / "copy")
    assert score(tmp_path / "copy", source, target) == 0


def test_a_row_without_its_fields_is_no_rest_of_a_run(model_folder, interrupted, capsys):
    source, target, partial = interrupted
    head = partial.read_bytes().split(b"\n")[0]
    partial.write_bytes(head + b'\n{"row": 0}\n')
    assert score(model_folder, source, target) == 1
    assert capsys.readouterr().err.endswith("no rest of an interrupted run; move it away or name another --output\n")


@pytest.mark.parametrize("content", ["hello", "hello\n", '{"fingerprint": "other"}\n', "[1]\n", "", "\xff\n"])
def test_a_file_that_is_no_partial_result_is_named_and_stays(model_folder, tmp_path, capsys, content):
    source, target, partial = tmp_path / "in.csv", tmp_path / "out.csv", tmp_path / "out.csv.partial"
    QUESTIONS.to_csv(source, index=False)
    partial.write_text(content, encoding="latin-1")
    assert score("no-model", source, target) == 1
    assert (
        capsys.readouterr().err
        == f"isouq: {partial}: no rest of an interrupted run; move it away or name another --output\n"
    )
    assert partial.read_text(encoding="latin-1") == content


def test_a_second_run_is_refused_and_takes_nothing(model_folder, tmp_path, capsys):
    """It is told of the other run, also with another input, and never to delete what that one needs."""
    source, other, target = tmp_path / "in.csv", tmp_path / "other.csv", tmp_path / "out.csv"
    QUESTIONS.to_csv(source, index=False)
    QUESTIONS.iloc[::-1].to_csv(other, index=False)
    refused = []
    original = scoring.score

    def meanwhile(*args, **options):
        refused.extend(score(model_folder, name, target) for name in (source, other))
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score", meanwhile)
        assert score(model_folder, source, target) == 0
    assert refused == [1, 1]
    said = capsys.readouterr().err
    assert said.count(f"isouq: {target}: another isouq score is writing it; wait for its end or name another file") == 2
    assert "delete" not in said
    assert len(pd.read_csv(target)) == 3
    assert sorted(os.listdir(tmp_path)) == ["in.csv", "other.csv", "out.csv"]


def test_a_full_disk_is_one_line_and_loses_nothing(model_folder, tmp_path, capsys, monkeypatch):
    source, target, partial = tmp_path / "in.csv", tmp_path / "out.csv", tmp_path / "out.csv.partial"
    QUESTIONS.to_csv(source, index=False)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", stop_after(2, OSError(errno.ENOSPC, "No space left on device")))
        assert score(model_folder, source, target, "--batch-size", "1") == 1
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.endswith(f"isouq: {partial}: No space left on device; its 2 rows stay, the same command resumes")
    assert len(read_lines(partial)) == 3
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left")
        patch.setattr(tables.Sink, "write", lambda *args: (_ for _ in ()).throw(full))
        assert score(model_folder, source, target) == 1
    assert score(model_folder, source, target) == 0
    assert sorted(os.listdir(tmp_path)) == ["in.csv", "out.csv"]


def test_a_failure_before_the_first_row_leaves_nothing_that_blocks(model_folder, tmp_path, capsys, monkeypatch):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    QUESTIONS.to_csv(source, index=False)
    assert score(tmp_path / "no-model", source, target) == 1
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", stop_after(0, KeyboardInterrupt()))
        assert score(model_folder, source, target) == 130
    assert os.listdir(tmp_path) == ["in.csv"]


def test_a_run_killed_before_its_first_row_blocks_no_other(model_folder, tmp_path, interrupted):
    source, target, partial = interrupted
    partial.write_text(partial.read_text().split("\n")[0] + "\n")
    assert score(model_folder, source, target, "--aggregation", "geometric") == 0


def test_an_input_that_may_not_be_read_is_one_line(tmp_path, capsys, monkeypatch):
    def refuse(path, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    QUESTIONS.to_csv(tmp_path / "in.csv", index=False)
    monkeypatch.setattr(tables.Path, "open", refuse)
    assert score("no-model", tmp_path / "in.csv", tmp_path / "out.csv") == 1
    assert capsys.readouterr().err == f"isouq: [Errno 13] Permission denied: '{tmp_path / 'in.csv'}'\n"


def test_a_cell_is_scored_as_written_or_says_why_not(model_folder, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    cells = ["42", "1.50", "1e3", "true", "[1]", '{"a": 1}', "null", '""', '" no "', "false"]
    source.write_text("".join(f'{{"id": {i}, "prompt": "Is it?", "answer": {c}}}\n' for i, c in enumerate(cells)))
    assert score(model_folder, source, target, "--max-new-tokens", "3") == 1
    rows = read_lines(target)
    assert [row["id"] for row in rows] == list(range(10))
    assert [row["answer"] for row in rows[:6]] == ["42", "1.50", "1e3", "true", '["1"]', '{"a": "1"}']
    model, tokenizer = isouq.load_causal_lm(str(model_folder))
    wanted = isouq.score_texts(model, tokenizer, ["Is it?"] * 4, ["42", "1.50", "1e3", " no "])
    got = [rows[i]["log_prob"] for i in (0, 1, 2, 8)]
    assert got == pytest.approx(wanted.log_prob.to_numpy(), rel=1e-6)
    assert [i for i, row in enumerate(rows) if row["error"]] == [3, 4, 5, 9]
    shown = capsys.readouterr()
    assert "isouq: row 4: answer: true given, a text wanted; write it as the text to be scored\n" in shown.err
    assert "10 rows written, 4 without scores; answers generated for 2 rows; 0 rows straddle" in shown.out


def test_numbers_of_parquet_are_scored_as_digits_and_the_rest_says_why_not(model_folder, tmp_path, capsys):
    kinds = {"int": [42, None], "float": [0.5, 1.0], "bool": [True, False], "bytes": [b"no", b"no"]}
    for kind, cells in kinds.items():
        source, target = tmp_path / f"{kind}.parquet", tmp_path / f"{kind}.out.parquet"
        pq.write_table(pa.table({"prompt": ["Is it?"] * 2, "answer": cells, "n": pa.array([1, None])}), source)
        assert score(model_folder, source, target, "--max-new-tokens", "3") == int(kind != "int")
        got = pq.read_table(target)
        assert got.schema.field("n").type == pa.int64()
        assert str(got.schema.field("error").type).endswith("string")
        assert got["error"].null_count == (2 if kind == "int" else 0)
        assert got["answer"][0].as_py() == {"int": "42", "float": "0.5", "bool": "true", "bytes": "\"b'no'\""}[kind]
    assert "answers generated for 1 rows" in capsys.readouterr().out


def test_columns_of_any_name_are_kept_or_refused_before_the_model(model_folder, tmp_path, capsys):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("row,answer,index,prompt,\nid-7,yes,007,Is it?,NA\n")
    assert score(model_folder, source, target) == 0
    with target.open() as file:
        row = next(csv.DictReader(file))
    assert list(row)[:5] == ["row", "answer", "index", "prompt", ""]
    assert list(row.values())[:5] == ["id-7", "yes", "007", "Is it?", "NA"]
    for name in PLAIN.columns:
        source.write_text(f"prompt,answer,{name}\na,b,mine\n")
        assert score("no-model", source, target) == 1
        assert (
            f"column {name!r} is there, and a result is written under this name; rename it" in capsys.readouterr().err
        )


def test_what_the_output_cannot_hold_is_said_before_the_model(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a", "answer": "x", "id": 1}\n{"prompt": "b", "answer": "y", "id": "two"}\n')
    assert score("no-model", source, tmp_path / "o.parquet") == 1
    said = capsys.readouterr().err
    assert said.startswith("isouq: --output: .parquet cannot hold the table: ")
    assert "column id" in said
    assert said.count("\n") == 1
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_header_alone_gives_a_header_alone(tmp_path, capsys):
    (tmp_path / "in.csv").write_text("prompt,answer,id\n")
    assert score("no-model", tmp_path / "in.csv", tmp_path / "o.csv") == 0
    assert (tmp_path / "o.csv").read_text() == "prompt,answer,id," + ",".join(PLAIN.columns) + "\n"


def test_a_straddling_token_is_named(model_folder, tmp_path, capsys):
    """No token of this model has two characters; the tokenizer of the second joins a space to a letter."""
    folder = tmp_path / "joins"
    shutil.copytree(model_folder, folder)
    letters = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    letters[" n"] = letters.pop("Z")
    tokenizer = Tokenizer(models.BPE(letters, [(" ", "n")], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    source, target = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text('prompt,answer\nIs it? ,no\nIs it?," no"\n')
    assert score(folder, source, target) == 0
    assert [row["straddles"] for row in read_lines(target)] == [True, False]
    assert "1 rows straddle" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [IndexError, RuntimeError, TypeError, ValueError, KeyError, MemoryError])
def test_what_a_library_raises_about_a_row_is_said_by_the_row(model_folder, tmp_path, capsys, monkeypatch, kind):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Is it {c}?"}) + "\n" for c in "abc"))
    original = generation.generate

    def generate(model, tokenizer, prompts, **options):
        if any(tokenizer.decode(prompt) == "Is it b?" for prompt in prompts):
            raise kind("index out of range\nin self")
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr(generation, "generate", generate)
    assert score(model_folder, source, target, "--max-new-tokens", "3") == 1
    rows = read_lines(target)
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert "index out of range" in rows[1]["error"]
    assert "\n" not in rows[1]["error"]
    assert "isouq: row 2: " in capsys.readouterr().err


def test_a_generated_answer_follows_the_prompt_not_the_token_that_closes_it(model_folder, tmp_path):
    """The tokenizer of the copy closes every text; the answers and scores are those of the one that does not."""
    folder = tmp_path / "closes"
    shutil.copytree(model_folder, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", 0)]
    )
    tokenizer.save_pretrained(folder)
    assert PreTrainedTokenizerFast.from_pretrained(folder)("a")["input_ids"][-1] == 0
    source = tmp_path / "in.csv"
    source.write_text("prompt,answer\nIs it a?,\nIs it b?, no\n")
    for name in (model_folder, folder):
        assert score(name, source, tmp_path / f"{name.name}.csv", "--max-new-tokens", "4") == 0
    assert (tmp_path / f"{model_folder.name}.csv").read_text() == (tmp_path / "closes.csv").read_text()


def test_the_choices_of_the_command_are_those_of_the_library():
    assert cli.AGGREGATIONS == estimate.AGGREGATIONS
    assert get_args(gradients.Engine) == cli.ENGINES
