"""A whole study on a tiny random model: what is stored, what is scored, and what survives kill -9."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from isouq import models
from isouq.language import scoring
from isouq.language.examples import from_pairs
from isouq.studies import assets
from isouq.studies.qa import data, generation, stages, study
from isouq.studies.qa.data import DataSet, Question
from isouq.studies.qa.study import Settings
from isouq.studies.qa.subject import N_TRUE_SHOTS
from isouq.studies.store import Store

RUN = {"study": "test"}


def small_set(n: int, choose: bool = False) -> DataSet:
    wrong = ("zz", "a long one") if choose else ()
    questions = tuple(Question(f"q{i}", f"what is {i}" + "?" * (i % 5), (f"x{i}", "y"), wrong) for i in range(n))
    return DataSet("small", questions, "Q:{question}\nA:{answer}\n")


def letters(texts) -> torch.Tensor:
    """A stand-in for embeddings: how often each letter occurs, of unit length."""
    counts = torch.tensor([[text.count(chr(c)) for c in range(32, 127)] for text in texts], dtype=torch.float32)
    return torch.nn.functional.normalize(counts, dim=1)


def run_small(path: Path, model, tokenizer, *, n: int = 12, choose: bool = False, **settings) -> pd.DataFrame:
    settings = {"max_new_tokens": 5, "n_samples": 3, **settings}
    wanted = Settings(n_questions=n, n_shots=2, batch_size=4, n_token_mean=3, **settings)
    subject = study.prepare(model, tokenizer, small_set(40, choose), wanted, choose=choose, encoder=letters)
    with Store(path, RUN) as store:
        study.complete(store, subject, wanted, progress=False)
        return study.tabulate(store, subject.questions)


@pytest.fixture
def table(tmp_path: Path, llama, tokenizer) -> pd.DataFrame:
    return run_small(tmp_path / "s.sqlite", llama, tokenizer)


def test_the_stored_ids_are_what_is_scored(table: pd.DataFrame, tmp_path: Path, llama, tokenizer) -> None:
    wanted = Settings(n_questions=12, n_shots=2)
    subject = study.prepare(llama, tokenizer, small_set(40), wanted)
    with Store(tmp_path / "s.sqlite", RUN) as store:
        ids = [store.get("answer")[question.item_id]["token_ids"] for question in subject.questions]
    for row, (prompt, answer) in enumerate(zip(subject.prompts, ids, strict=True)):
        if not answer:
            continue
        how = scoring.Scoring(aggregations=("sequence", "geometric", "token_mean"), engine="autograd")
        one = scoring.score(llama, from_pairs([(prompt, answer)]), how)
        assert table["log_prob"][row] == pytest.approx(one["sequence"].log_prob.item(), abs=1e-5)
        for name, found in one.items():
            if name == "token_mean" and row >= 3:
                assert np.isnan(table["log_epistemic_token_mean"][row])
                continue
            assert table[f"log_epistemic_{name}"][row] == pytest.approx(found.log_epistemic.item(), abs=1e-4)
            assert np.exp(table[f"log_aleatoric_{name}"][row]) == pytest.approx(found.aleatoric.item(), rel=1e-5)
        log_g = one["sequence"].log_epistemic.item() - 2 * one["sequence"].log_prob.item()
        assert table["log_gradient"][row] == pytest.approx(log_g, abs=1e-4)


def test_the_two_modes_of_truthfulqa_share_their_samples(tmp_path: Path, llama, tokenizer) -> None:
    wanted = Settings(n_questions=6, n_shots=2, n_samples=3, max_new_tokens=5, store_dir=str(tmp_path))
    subject = study.prepare(llama, tokenizer, small_set(40, True), wanted, encoder=letters)
    identity = {"data_set": "truthfulqa", "choose": False}
    with Store(study.store_path(tmp_path, "m--truthfulqa", identity), identity) as store:
        study.complete(store, subject, wanted, progress=False)
        drawn = {stage: store.get(stage) for stage in ("shot", *study.SAMPLED)}
    other = {"data_set": "truthfulqa_choose", "choose": True}
    with Store(tmp_path / "choose.sqlite", other) as store:
        asked = [question.item_id for question in subject.questions][:4]
        store.put(asked[0], {"sample": {"text": ["its own"]}})
        study._take_samples(store, "m", subject.questions[:4], wanted)
        assert store.get("shot") == drawn["shot"]
        assert set(store.get("sample")) == set(asked) & {*drawn["sample"], asked[0]}
        assert store.get("sample").pop(asked[0]) == {"text": ["its own"]}
        meanings = store.get("meaning")
        assert all(meanings[key] == drawn["meaning"][key] for key in drawn["meaning"].keys() & set(asked))
        assert not store.get("answer"), "the answers of the two modes differ"
    elsewhere = {**other, "seed": 1}
    with Store(tmp_path / "elsewhere.sqlite", elsewhere) as store:
        study._take_samples(store, "m", subject.questions, wanted)
        assert not store.get("sample"), "samples of another seed are not these"


def test_asked_without_examples_the_prompt_is_the_question_alone_and_p_true_keeps_its_own(llama, tokenizer) -> None:
    content = small_set(40)
    usual, bare = (
        study.prepare(llama, tokenizer, content, Settings(n_questions=12, n_shots=n, n_samples=3)) for n in (2, 0)
    )
    assert bare.prompts == generation.encode_prompts(tokenizer, [content.prompt(q) for q in bare.questions])
    assert len(bare.shots) == len(usual.shots) == N_TRUE_SHOTS
    assert bare.questions == usual.questions
    assert not {question.item_id for question, _ in bare.shots} & {question.item_id for question in bare.questions}


def test_a_larger_run_extends_a_smaller_and_scores_nothing_again(tmp_path: Path, llama, tokenizer, monkeypatch) -> None:
    small = run_small(tmp_path / "s.sqlite", llama, tokenizer, n=5)
    scored: list[int] = []
    plain = scoring.score

    def count(model, examples, how):
        scored.append(len(examples))
        return plain(model, examples, how)

    monkeypatch.setattr(scoring, "score", count)
    large = run_small(tmp_path / "s.sqlite", llama, tokenizer, n=12)
    pd.testing.assert_frame_equal(large[:5], small)
    assert sum(scored) == (~large["empty"][5:]).sum()
    scored.clear()
    pd.testing.assert_frame_equal(run_small(tmp_path / "s.sqlite", llama, tokenizer, n=12), large)
    assert not scored


def test_an_empty_answer_is_wrong_unscored_and_counted(tmp_path: Path, llama, tokenizer, monkeypatch) -> None:
    plain = generation.generate

    def silent_first(*args, **options):
        return [generation.Generation((), "", "newline"), *plain(*args, **options)[1:]]

    monkeypatch.setattr(generation, "generate", silent_first)
    table = run_small(tmp_path / "s.sqlite", llama, tokenizer)
    empty = table[table["empty"]]
    assert len(empty) >= 3  # one a batch
    assert empty["wrong"].all()
    assert empty[["log_prob", "log_epistemic_sequence", "aleatoric_geometric"]].isna().all(axis=None)
    assert table[~table["empty"]]["log_prob"].notna().all()


def test_a_question_that_fails_says_why_and_the_others_go_on(tmp_path: Path, llama, tokenizer, monkeypatch) -> None:
    """Two questions fail where they are scored, and one where samples are drawn."""
    plain_score, plain_draw = scoring.score, generation.draw

    def score(model, examples, how):
        if any(len(example) == sizes[0] for example in examples):
            raise ValueError("too long, say")
        return plain_score(model, examples, how)

    def draw(model, tokenizer, prompts, numbers, **options):
        if any(list(prompt) == unlucky for prompt in prompts):
            raise RuntimeError("no memory, say")
        return plain_draw(model, tokenizer, prompts, numbers, **options)

    whole = run_small(tmp_path / "whole.sqlite", llama, tokenizer)
    subject = study.prepare(llama, tokenizer, small_set(40), Settings(n_questions=12, n_shots=2, n_samples=3))
    lengths = [len(p) + n for p, n in zip(subject.prompts, whole["n_tokens"], strict=True)]
    sizes = [max(lengths)]
    unlucky = list(subject.prompts[int(np.argmin(lengths))])
    monkeypatch.setattr(scoring, "score", score)
    monkeypatch.setattr(generation, "draw", draw)
    table = run_small(tmp_path / "s.sqlite", llama, tokenizer)
    gone = {subject.questions[i].item_id for i, n in enumerate(lengths) if n == sizes[0]}
    assert {k for k, v in table.attrs["failed"].items() if v == "estimate: too long, say"} == gone
    other = subject.questions[int(np.argmin(lengths))].item_id
    assert table.attrs["failed"][other] == "sample: RuntimeError: no memory, say"
    kept = whole[~whole["item_id"].isin(table.attrs["failed"])].reset_index(drop=True)
    times = [name for name in whole if name.startswith("seconds_")]
    pd.testing.assert_frame_equal(table.drop(columns=times), kept.drop(columns=times), rtol=1e-4)
    monkeypatch.undo()
    again = run_small(tmp_path / "s.sqlite", llama, tokenizer)  # what failed is tried again
    assert again.attrs["failed"] == {}
    pd.testing.assert_frame_equal(again.drop(columns=times), whole.drop(columns=times), rtol=1e-4)


def test_a_study_of_which_all_fails_is_an_error(tmp_path: Path, llama, tokenizer, monkeypatch) -> None:
    def fail(*args, **options):
        raise ValueError("no such thing")

    monkeypatch.setattr(generation, "generate", fail)
    with pytest.raises(ValueError, match="all 12 questions failed; the first at answer: no such thing"):
        run_small(tmp_path / "s.sqlite", llama, tokenizer)


def test_in_a_choice_the_answer_is_the_candidate_of_highest_log_p(tmp_path: Path, llama, tokenizer) -> None:
    table = run_small(tmp_path / "c.sqlite", llama, tokenizer, choose=True)
    assert set(table["ended_by"]) == {"given"}
    asked = study.prepare(llama, tokenizer, small_set(40, True), Settings(n_questions=12, n_shots=2))
    for row, prompt in zip(table.itertuples(), asked.prompts, strict=True):
        texts = [row.reference, "y", "zz", "a long one"]
        ids = [generation.encode_answer(tokenizer, text) for text in texts]
        log_p, n_tokens = scoring.log_probs(llama, from_pairs((prompt, answer) for answer in ids))
        assert row.answer == texts[int(log_p.argmax())]
        assert row.right == (int(log_p.argmax()) < 2)
        assert row.right_by_mean == (int((log_p / n_tokens).argmax()) < 2)
        assert row.log_prob == pytest.approx(log_p.max().item(), abs=1e-4)
        assert row.right_by_chance == 0.5


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import conftest, test_study
from isouq.studies.qa import study
torch.set_num_threads(1)
llama, tokenizer = (getattr(conftest, name).__wrapped__() for name in ("llama", "tokenizer"))
plain = study.Store.put
def announce(store, item_id, records):
    plain(store, item_id, records)
    print(item_id, *records, flush=True)
study.Store.put = announce
test_study.run_small(Path(sys.argv[1]), llama, tokenizer, n=30)
print("whole", flush=True)
"""


def test_kill_9_at_any_point_loses_nothing_and_repeats_nothing(tmp_path: Path, llama, tokenizer, monkeypatch) -> None:
    path = tmp_path / "killed.sqlite"
    command = [sys.executable, "-c", KILLED, str(path), str(Path(__file__).parent)]
    written: list[str] = []
    for limit in (7, 70, 190):  # among the questions, the verdicts, the samples
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            written.append(line.strip())
            if len(written) >= limit:
                os.kill(process.pid, signal.SIGKILL)
                break
        written += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait()
    assert "whole" not in written
    put = study.Store.put

    def announce(store, item_id, records):
        put(store, item_id, records)
        written.append(" ".join([item_id, *records]))

    monkeypatch.setattr(study.Store, "put", announce)
    resumed = run_small(path, llama, tokenizer, n=30)  # to the end, in this process
    assert len(written) == len(set(written)), "a question was worked on twice"
    whole = run_small(tmp_path / "whole.sqlite", llama, tokenizer, n=30)
    times = [name for name in whole if name.startswith("seconds_")]
    pd.testing.assert_frame_equal(resumed.drop(columns=times), whole.drop(columns=times), rtol=1e-4)


def test_an_unknown_data_set_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="truthfulqa, truthfulqa_choose, got 'truthful'"):
        study.run("no such model", "truthful", Settings())


@pytest.mark.parametrize("change", ["nothing", "code", "weights", "commit", "data", "settings", "size"])
def test_a_study_is_scored_again_exactly_where_something_that_decides_it_changed(
    tmp_path: Path, llama, tokenizer, monkeypatch, change: str
) -> None:
    source = tmp_path / "data.json"
    source.write_text("one")
    monkeypatch.setattr(study, "_load_model", lambda *how: (llama, tokenizer, models.weights(llama, tokenizer)))
    monkeypatch.setattr(assets, "path", lambda asset, file=None: source)
    monkeypatch.setattr(data, "load", lambda name, path: small_set(40))
    options = {"n_shots": 2, "n_token_mean": 0, "n_samples": 0, "max_new_tokens": 3}
    options |= {"store_dir": str(tmp_path / "store")}
    study.run("tiny", "triviaqa", Settings(n_questions=4, **options), progress=False)
    scored: list[int] = []
    plain = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *a, **o: scored.append(len(a[2])) or plain(*a, **o))
    asked = Settings(n_questions=5 if change == "size" else 4, seed=int(change == "settings"), **options)
    with contextlib.ExitStack() as stack:
        if change == "code":
            monkeypatch.setattr(stages, "VERSION", stages.VERSION + 1)
        if change == "weights":
            weight = llama.model.norm.weight.data
            stack.callback(weight.copy_, weight.clone())
            weight[0] += 1e-3
        if change == "commit":
            stack.callback(setattr, llama.config, "_commit_hash", None)
            llama.config._commit_hash = "1" * 40
        if change == "data":
            source.write_text("two")
        study.run("tiny", "triviaqa", asked, progress=False)
    assert sum(scored) == {"nothing": 0, "size": 1}.get(change, 4)


def test_a_file_of_questions_is_asked_like_any_set(tmp_path: Path, llama, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(study, "_load_model", lambda *how: (llama, tokenizer, models.weights(llama, tokenizer)))
    file = tmp_path / "mine.csv"
    file.write_text("question,answer\n" + "".join(f"what is {i}?,x{i}\n" for i in range(12)))
    settings = Settings(n_questions=6, n_shots=2, n_samples=0, max_new_tokens=3, store_dir=str(tmp_path / "store"))
    table = study.run("tiny", str(file), settings, progress=False)
    assert len(table) == 6
    assert set(table["question"]) <= {f"what is {i}?" for i in range(12)}
    assert [path.name[:11] for path in (tmp_path / "store").iterdir()] == ["tiny--mine-"]
