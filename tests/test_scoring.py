"""`isouq score`: file to file, bad rows named, a killed run gone on with, nothing scored twice."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import get_args

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import isouq
from isouq import cli, estimate, gradients


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A small random Llama with a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    letters = ["<eos>", "<unk>", "\n", *" ?:.abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    config = LlamaConfig(vocab_size=len(letters), max_position_embeddings=64, **sizes, **special)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def score(model_folder, source, target, *more):
    return cli.main(["score", "--model", str(model_folder), "--input", str(source), "--output", str(target), *more])


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
    model, tokenizer = isouq.assets.load_causal_lm(str(model_folder))
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
    assert "row 3: input_ids: example 0 has 93 tokens, at most the model's context of 64 wanted" in err
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
    n = 400
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
    from isouq import causal_lm

    original = causal_lm.score_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            causal_lm, "score_ids", lambda model, pairs, **o: (scored.extend(pairs), original(model, pairs, **o))[1]
        )
        assert score(model_folder, source, target) == 0
    assert len(scored) == n - len(before)
    assert len(pd.read_csv(target)) == n
    assert not partial.exists()


def test_a_partial_result_of_other_options_is_refused(model_folder, tmp_path, capsys):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    QUESTIONS.to_csv(source, index=False)
    (tmp_path / "out.csv.partial").write_text('{"fingerprint": "other"}\n')
    assert score(model_folder, source, target) == 1
    assert "is from another input or other options; delete it to start afresh" in capsys.readouterr().err


def test_the_choices_of_the_command_are_those_of_the_library():
    assert cli.AGGREGATIONS == estimate.AGGREGATIONS
    assert get_args(gradients.Engine) == cli.ENGINES
