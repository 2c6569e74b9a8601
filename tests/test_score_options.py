"""`isouq score` on chats, devices and cards that are too small; files longer than a frame; logs of lm_eval."""

import json
import tracemalloc

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import isouq
import letters
from isouq import cli, models
from isouq.language import generation, scoring
from isouq.language.chat import Prompting
from isouq.use import files, tables
from isouq.use.calibrate import Calibrator
from letters import read_lines, score

TEMPLATE = (
    "<eos>{% for m in messages %}{% if m.role == 'system' and m.content == 'no' %}{{ raise_exception('no such role') }}"
    "{% endif %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A model with a chat template that brings the same start token as the tokenizer puts before every text."""
    folder = letters.save(tmp_path_factory.mktemp("chat"), TEMPLATE)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    starts = processors.TemplateProcessing("<eos> $A", special_tokens=[("<eos>", 0)])
    tokenizer.backend_tokenizer.post_processor = starts
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(chat_folder):
    return isouq.load_causal_lm(str(chat_folder))


def questions(path, n=5, answer=" no"):
    rows = [{"prompt": f"Is it {'abcdefgh'[i % 8] * (1 + i % 3)}?", "answer": answer} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


# ---- chats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "text"), [(None, "u:Hi\na:"), ("be kind", "s:be kind\nu:Hi\na:")])
def test_a_chat_is_scored_after_the_templates_own_text_with_one_start_token(chat_model, system, text):
    model, tokenizer = chat_model
    assert tokenizer("a")["input_ids"][0] == 0
    prompt = [0, *map(letters.LETTERS.index, text)]
    ids = torch.tensor([prompt + list(map(letters.LETTERS.index, "no"))])
    answer_mask = torch.arange(ids.shape[1])[None] >= len(prompt)
    wanted = isouq.score_tokens(model, ids, answer_mask)
    got = isouq.score_texts(model, tokenizer, ["Hi"], ["no"], chat=True, system=system)
    assert got.log_epistemic[0] == pytest.approx(wanted.log_epistemic.item(), rel=1e-5)
    assert got.log_prob[0] == pytest.approx(wanted.log_prob.item(), rel=1e-6)
    assert not got.straddles[0]
    plain = isouq.score_texts(model, tokenizer, ["Hi"], ["no"])
    assert abs(plain.log_prob[0] - got.log_prob[0]) > 1e-4


def test_a_start_token_that_the_prompt_has_already_is_not_doubled(chat_folder):
    """Prompts that a template has written, as in the logs of lm_eval."""
    ask = Prompting(PreTrainedTokenizerFast.from_pretrained(chat_folder, bos_token="<eos>"))
    text = [0, *map(letters.LETTERS.index, "Hi")]
    assert [ask.prompt_ids(prompt) for prompt in ("Hi", "<eos>Hi", "<eos><eos>Hi")] == [text, text, [0, 0, *text]]
    assert ask.pair("<eos>Hi", "no").prompt == text


def test_given_and_generated_answers_follow_the_same_chat_prompt(chat_folder, chat_model, tmp_path, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Hi", "answer": "no"}\n{"prompt": "Hi"}\n')
    asked, original = [], generation.generate
    monkeypatch.setattr(generation, "generate", lambda m, t, x, **o: asked.extend(x) or original(m, t, x, **o))
    assert score(chat_folder, source, target, "--chat", "--system", "be kind", "--max-new-tokens", "4") == 0
    model, tokenizer = chat_model
    assert asked == [Prompting(tokenizer, True, "be kind").prompt_ids("Hi")]
    given, made = read_lines(target)
    wanted = isouq.score_texts(model, tokenizer, ["Hi"], ["no"], chat=True, system="be kind")
    assert given["log_epistemic"] == pytest.approx(wanted.log_epistemic[0], rel=1e-5)
    assert 1 <= made["n_tokens"] <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat"], "chat: the tokenizer of {folder} has no chat template; leave it out, or take an instruct model"),
        (["--system", "no"], "system: a text given, but no chat; add chat, or write the text into the prompts"),
    ],
)
def test_a_chat_that_cannot_be_is_refused_in_one_line(tmp_path, capsys, options, message):
    folder, source = letters.save(tmp_path / "plain"), tmp_path / "in.jsonl"
    questions(source)
    assert score(folder, source, tmp_path / "out.csv", *options) == 1
    assert capsys.readouterr().err.strip().split("\n")[-1] == "isouq: " + message.format(folder=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "plain"]


def test_a_template_without_system_messages_is_named_and_texts_alone_are_taken(chat_model, unchecked):
    model, tokenizer = chat_model
    with pytest.raises(ValueError, match=r"system: the model's chat template refuses it: no such role; write it into"):
        isouq.score_texts(model, tokenizer, ["Hi"], ["no"], chat=True, system="no")
    with pytest.raises(TypeError, match="'Hi' and None given as number 1, texts wanted"):
        isouq.score_texts(model, tokenizer, ["Hi", "Hi"], ["no", None], chat=True)
    with pytest.raises(ValueError, match="example 1 has no prompt or no answer token"):
        isouq.score_texts(model, tokenizer, ["Hi", "Hi"], ["no", ""], chat=True)


# ---- aggregations ----------------------------------------------------------------------------------------------------


def test_all_aggregations_come_from_one_pass_and_are_those_of_three_runs(chat_folder, tmp_path, monkeypatch):
    source, calls, original = tmp_path / "in.jsonl", [], scoring.score
    questions(source, 3)
    monkeypatch.setattr(scoring, "score", lambda *args: calls.append(args) or original(*args))
    assert score(chat_folder, source, tmp_path / "all.parquet", "--aggregation", "all") == 0
    assert len(calls) == 1
    every = pd.read_parquet(tmp_path / "all.parquet")
    about = json.loads(pq.read_schema(tmp_path / "all.parquet").metadata[b"isouq"])
    assert about["model"] == str(chat_folder)
    assert (about["aggregation"], about["chat"], about["system"]) == ("sequence, geometric, token_mean", False, None)
    assert (about["weights"], about["dtype"]) == (models.weights(*isouq.load_causal_lm(str(chat_folder))), "float32")
    fields = ["probability", "aleatoric", "epistemic", "log_epistemic"]
    for name, suffix in (("sequence", ""), ("geometric", "_geometric"), ("token_mean", "_token_mean")):
        assert score(chat_folder, source, tmp_path / f"{name}.parquet", "--aggregation", name) == 0
        one = pd.read_parquet(tmp_path / f"{name}.parquet")
        for field in fields:
            assert every[field + suffix].tolist() == pytest.approx(one[field].tolist(), rel=1e-5)
    assert list(every)[2:-2] == ["n_tokens", "log_prob", *fields] + [
        f"{field}_{name}" for name in ("geometric", "token_mean") for field in fields
    ]


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_what_ran_is_said_in_one_line(chat_folder, tmp_path, capsys):
    questions(tmp_path / "in.jsonl", 2)
    assert score(chat_folder, tmp_path / "in.jsonl", tmp_path / "o.csv", "--memory", "8e9", "--dtype", "bfloat16") == 0
    [line] = [line for line in capsys.readouterr().err.split("\n") if line.startswith("isouq: ")]
    start = f"isouq: {chat_folder}, revision none (weights "
    assert line.startswith(start)
    assert line.endswith("), bfloat16, cpu, engine auto, sequences a pass: as fit 8e+09 bytes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_refused_and_auto_is_the_cpu(chat_folder, tmp_path, capsys):
    questions(tmp_path / "in.jsonl", 2)
    assert score(chat_folder, tmp_path / "in.jsonl", tmp_path / "o.csv", "--device", "cuda") == 1
    said = capsys.readouterr().err
    assert said.startswith("isouq: device: 'cuda' given, but torch ")
    assert said.endswith("sees none; its CUDA build and a driver are needed; or use 'auto'\n")
    model, _ = isouq.load_causal_lm(str(chat_folder), device="auto", dtype="auto")
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    with pytest.raises(ValueError, match="device: 'gpu' given, one of auto, cpu, cuda, mps wanted"):
        isouq.load_causal_lm(str(chat_folder), device="gpu")
    with pytest.raises(ValueError, match="device: 'auto' and device_map 'auto' given; leave one out"):
        isouq.load_causal_lm(str(chat_folder), device="auto", device_map="auto")
    with pytest.raises(ValueError, match=r"'.*@v1' is no folder, no asset .* and no Hub id"):
        isouq.load_causal_lm(str(chat_folder), revision="v1")
    with pytest.raises(ValueError, match=r"unknown model 'smollm2-135m-instruct@v1'; did you mean the asset 'smollm2-"):
        isouq.load_causal_lm("smollm2-135m-instruct", revision="v1")


@pytest.mark.parametrize(
    ("free", "device_map", "moved"), [(10**9, None, ["cuda"]), (1000, "auto", [])], ids=["fits", "is larger"]
)
def test_auto_takes_one_card_and_all_where_the_model_is_larger(chat_folder, monkeypatch, free, device_map, moved):
    """A card that is not there: it says how much is free, and what goes to it is written down."""
    asked, to, original = {}, [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))

    def from_pretrained(source, **options):
        asked.update(options)
        model = original(source)
        model.to = to.append
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    isouq.load_causal_lm(str(chat_folder), device="auto", dtype="auto")
    assert (asked["device_map"], asked["dtype"], to) == (device_map, "auto", moved)


@pytest.mark.parametrize(
    "options",
    [["--dtype", "float61"], ["--device", "tpu"], ["--memory", "0"], ["--memory", "8GB"], ["--memory", "nan"]],
)
def test_an_unknown_device_type_or_size_shows_the_usage(capsys, options):
    with pytest.raises(SystemExit) as stop:
        score("no-model", "in.csv", "out.csv", *options)
    assert stop.value.code == 2
    assert options[1] in capsys.readouterr().err


# ---- memory ----------------------------------------------------------------------------------------------------------


def a_card(monkeypatch, n_tokens):
    """scoring.score on a card that holds so many tokens, padding included; returns the sizes of passes that it did."""
    passes, original = [], scoring.score

    def score_on_card(model, examples, how):
        if len(examples) * max(map(len, examples)) > n_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        passes.append(len(examples))
        return original(model, examples, how)

    monkeypatch.setattr(scoring, "score", score_on_card)
    return passes


def test_a_batch_that_does_not_fit_is_halved_and_the_run_goes_on(chat_folder, tmp_path, monkeypatch, capsys):
    source = tmp_path / "in.jsonl"
    questions(source, 20)
    assert score(chat_folder, source, tmp_path / "whole.csv") == 0
    passes = a_card(monkeypatch, 64)
    capsys.readouterr()
    assert score(chat_folder, source, tmp_path / "o.csv") == 0
    said = capsys.readouterr().err
    assert "isouq: out of memory with 8 sequences a pass; going on with 4\n" in said
    assert said.count("out of memory") == 1
    assert passes == [4] * 5
    wanted, got = (pd.read_csv(tmp_path / name) for name in ("whole.csv", "o.csv"))
    assert got.log_epistemic.to_numpy() == pytest.approx(wanted.log_epistemic.to_numpy(), rel=1e-5)


def test_a_row_that_does_not_fit_alone_names_its_bytes_and_the_others_are_scored(
    chat_folder, tmp_path, monkeypatch, capsys
):
    source, target = tmp_path / "in.jsonl", tmp_path / "o.jsonl"
    rows = [{"prompt": "Is it " + "a" * (50 if i == 5 else 1) + "?", "answer": " no"} for i in range(16)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    passes = a_card(monkeypatch, 50)
    assert score(chat_folder, source, target) == 1
    done = read_lines(target)
    assert [i for i, row in enumerate(done) if row["error"]] == [5]
    assert all(row["log_epistemic"] for i, row in enumerate(done) if i != 5)
    said = f"isouq: row 6: {done[5]['error']}\n"
    assert said in capsys.readouterr().err
    model, tokenizer = isouq.load_causal_lm(str(chat_folder))
    pair = Prompting(tokenizer).pair(rows[5]["prompt"], " no")
    [example] = scoring.from_pairs([pair[:2]])
    need = scoring.pass_cost(model, [example])([example])
    stated = float(done[5]["error"].split("about ")[1].split(" ")[0])
    assert done[5]["error"].startswith(f"memory: {len(example)} tokens take about ")
    assert 0.5 * need < stated < 2 * need
    assert max(passes) == 4  # the row too large by itself does not slow the others down


def test_a_prompt_too_large_to_answer_fails_alone(chat_folder, tmp_path, monkeypatch):
    source, target, original = tmp_path / "in.jsonl", tmp_path / "o.jsonl", generation.generate
    questions(source, 6, answer="")

    def generate(model, tokenizer, prompts, **options):
        if len(prompts) > 2 or max(map(len, prompts)) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr(generation, "generate", generate)
    assert score(chat_folder, source, target, "--max-new-tokens", "3") == 1
    errors = [row["error"] for row in read_lines(target)]
    assert [error and "out of memory" in error for error in errors] == [None, None, True, None, None, True]


def test_memory_decides_the_passes_and_too_little_is_named_by_every_row(chat_folder, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    questions(source, 3)
    assert score(chat_folder, source, tmp_path / "o.csv") == 0
    assert score(chat_folder, source, tmp_path / "m.csv", "--memory", "1e9") == 0
    one, other = (pd.read_csv(tmp_path / name) for name in ("o.csv", "m.csv"))
    assert one.log_epistemic.to_numpy() == pytest.approx(other.log_epistemic.to_numpy(), rel=1e-5)
    capsys.readouterr()
    assert score(chat_folder, source, tmp_path / "n.csv", "--memory", "10") == 1
    said = capsys.readouterr().err
    assert said.count("memory: 10 bytes given, but a pass of one example takes ") == 3
    assert pd.read_csv(tmp_path / "n.csv").log_prob.isna().all()


# ---- files longer than a frame ---------------------------------------------------------------------------------------


@pytest.fixture
def short_frames(monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 2)


LATE = [
    {"prompt": "Is it a?", "x": None, "n": 1},
    {"prompt": "Is it b?", "x": None, "n": 2},
    {"prompt": "Is it c?", "x": "text", "n": 0.5, "late": [1]},
    {"prompt": "Is it d?", "x": None, "n": None},
    {"prompt": "Is it e?", "x": "é\rf", "n": 3, "answer": " yes"},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_that_come_or_change_their_type_later_are_written_as_in_one_frame(
    chat_folder, tmp_path, monkeypatch, suffix
):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in LATE))
    for name, n_rows in (("one", 100), ("more", 2)):
        monkeypatch.setattr(tables, "ROWS", n_rows)
        assert score(chat_folder, source, tmp_path / f"{name}.{suffix}", "--max-new-tokens", "3") == 0
    one, more = (tmp_path / f"{name}.{suffix}" for name in ("one", "more"))
    if suffix == "jsonl":
        assert one.read_bytes() == more.read_bytes()
        assert [row["n"] for row in read_lines(more)] == [1, 2, 0.5, None, 3]
    else:
        assert pq.read_table(one).equals(pq.read_table(more))
        assert pq.read_table(more)["late"].to_pylist() == [None, None, [1], None, None]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_parquet_file_of_several_frames_is_written_whole(chat_folder, tmp_path, short_frames, suffix):
    table = pa.table({"id": pa.array(range(5), pa.int32()), "prompt": [f"Is it {c}?" for c in "abcde"]})
    pq.write_table(table.append_column("answer", [[" a\r", " b", " c", " d", " e"]]), tmp_path / "in.parquet")
    target = tmp_path / f"o.{suffix}"
    assert score(chat_folder, tmp_path / "in.parquet", target) == 0
    got = tables.read(target)
    assert got["id"].astype(int).tolist() == list(range(5))
    assert got["answer"].tolist() == [" a\r", " b", " c", " d", " e"]
    if suffix == "parquet":
        assert pq.read_schema(target).field("id").type == pa.int32()


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("in.csv", ["prompt,answer", "a,b", "c,d", "e,f", "g"], "in.csv: line 5: 1 fields, the header has 2"),
        ("in.jsonl", ['{"prompt": "a"}'] * 4 + ["{"], "in.jsonl: line 5: Expecting property name"),
        ("in.jsonl", ['{"prompt": "a"}'] * 4 + ['{"prompt": "a", "error": 1}'], "column 'error' is there"),
        ("in.jsonl", ['{"prompt": "a"}'] * 4 + ['{"prompt": "a", "anser": "b"}'], "column 'anser' given, none named"),
        ("in.jsonl", ['{"prompt": "a", "x": 1}'] * 4 + ['{"prompt": "a", "x": "b"}'], ".parquet cannot hold the table"),
        ("in.jsonl", ['{"prompt": "a", "x": 9007199254740993}'] * 4 + ['{"prompt": "a", "x": 0.5}'], "cannot hold"),
    ],
)
def test_what_is_wrong_far_down_is_said_before_the_model_is_loaded(tmp_path, capsys, short_frames, name, rows, message):
    (tmp_path / name).write_text("\n".join(rows) + "\n")
    assert score("no-model", tmp_path / name, tmp_path / "o.parquet") == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_input_that_changes_meanwhile_is_refused_and_its_scores_stay(chat_folder, tmp_path, capsys, monkeypatch):
    source, original = tmp_path / "in.jsonl", scoring.score
    questions(source, 3)

    def meanwhile(*args):
        source.write_text(source.read_text().replace("Is", "As"))
        return original(*args)

    monkeypatch.setattr(scoring, "score", meanwhile)
    assert score(chat_folder, source, tmp_path / "o.csv") == 1
    assert f"{source}: changed while it was scored; its scores are in" in capsys.readouterr().err
    assert len(read_lines(tmp_path / "o.csv.partial")) == 4


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    """The first reading of six times as many rows; without frames the peak is near six times as high."""
    run, peaks = files.Run(model="", load=tuple, how=scoring.Scoring()), []
    for n in (8_000, 48_000):
        rows = pa.table({"prompt": [f"Is it number {i} of many?" for i in range(n)], "answer": [" no"] * n})
        pq.write_table(rows, tmp_path / f"{n}.parquet")
        tracemalloc.start()
        asked = files._survey(tables.Source(tmp_path / f"{n}.parquet"), tables.Sink(tmp_path / "o.csv"), run)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (asked.rows, asked.missing) == (n, 0)
    assert peaks[1] < 1.5 * peaks[0]


# ---- calibrators -----------------------------------------------------------------------------------------------------


def test_a_calibrator_adds_p_wrong_and_is_refused_before_rows_are_scored(
    chat_folder, chat_model, tmp_path, short_frames
):
    lines = ['{"prompt": "a", "answer": "b"}'] * 3 + ['{"prompt": "", "answer": "b"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    source, seen = tables.Source(tmp_path / "in.jsonl"), []

    class Stub:
        def check(self, about):
            seen.append(about)
            if about["chat"]:
                raise ValueError("calibrator: of other scores")

        def apply(self, table):
            return 1 - table["probability"].astype(float)

    def run(**options):
        how = scoring.Scoring(batch_size=2)
        return files.Run(model="mine", load=lambda: chat_model, how=how, calibrator=Stub(), **options)

    assert files.score_file(source, tmp_path / "o.jsonl", run()).errors == 1
    assert [row["p_wrong"] is None for row in read_lines(tmp_path / "o.jsonl")] == [False] * 3 + [True]
    (tmp_path / "o.jsonl").unlink()
    assert files.score_file(source, tmp_path / "o.parquet", run()).errors == 1
    got = pd.read_parquet(tmp_path / "o.parquet")
    assert got["p_wrong"].tolist()[:3] == pytest.approx((1 - got["probability"]).tolist()[:3])
    assert got["p_wrong"].isna().tolist() == [False] * 3 + [True]
    kept = json.loads(pq.read_schema(tmp_path / "o.parquet").metadata[b"isouq"])
    assert seen == [kept] * 2
    with pytest.raises(ValueError, match="calibrator: of other scores"):
        files.score_file(source, tmp_path / "p.parquet", run(chat=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "o.parquet"]


def test_a_calibrator_of_a_column_that_the_table_lacks_is_refused_before_the_model_is_loaded(tmp_path):
    ends = dict.fromkeys(("brier", "ece"), (0.1, 0.1, 0.1))
    mine = Calibrator(score="mine", method="logistic", coefficients=(0.0, 1.0), knots=None, n=60, **ends)
    questions(tmp_path / "in.jsonl")
    run = files.Run(model="mine", load=lambda: pytest.fail("loaded"), how=scoring.Scoring(), calibrator=mine)
    with pytest.raises(ValueError, match=r"scores: 'mine' given, one of likelihood, .*prompt"):
        files.score_file(tables.Source(tmp_path / "in.jsonl"), tmp_path / "o.jsonl", run)


# ---- logs of lm-evaluation-harness -----------------------------------------------------------------------------------


def sample(doc_id, requests, responses, **more):
    """A line as `lm_eval --log_samples` writes it: requests under gen_args_i and arg_j, all responses as texts."""
    arguments = {f"gen_args_{i}": {f"arg_{j}": x for j, x in enumerate(r)} for i, r in enumerate(requests)}
    return {
        "doc_id": doc_id,
        "doc": {},
        "target": "1",
        "arguments": arguments,
        "resps": responses,
        "filter": "none",
        **more,
    }


def choices(doc_id, log_probs, **more):
    requests = [["Is it a?", " yes"], ["Is it a?", " no"]]
    return sample(
        doc_id, requests, [[[str(x), "False"]] for x in log_probs], acc=float(log_probs[1] > log_probs[0]), **more
    )


def log(path, *samples):
    path.write_text("".join(json.dumps(line) + "\n" for line in samples))
    return path


def test_a_log_of_choices_and_one_of_generations_are_scored_and_keep_their_metrics(chat_folder, chat_model, tmp_path):
    generations = [
        sample(7, [["Q:a\n", {"until": ["\n"]}]], [[" no"]], filter=name, exact_match=hit, filtered_resps=["n"])
        for name, hit in (("strict", 0.0), ("flexible", 1.0))
    ]
    paths = [
        log(tmp_path / "samples_boolq_2026-01-02T03-04-05.678.jsonl", choices(0, [-2, -1]), choices(1, [-1, -2])),
        log(tmp_path / "samples_gsm8k_2026-01-02T03-04-05.678.jsonl", *generations),
    ]
    arguments = ["score", "--model", str(chat_folder), "--from", "lm-eval", *map(str, paths)]
    assert cli.main([*arguments, "--output", str(tmp_path / "o.parquet")]) == 0
    got = pd.read_parquet(tmp_path / "o.parquet")
    assert got[["task", "doc_id", "prompt", "answer"]].to_numpy().tolist() == [
        ["boolq", 0, "Is it a?", " no"],
        ["boolq", 1, "Is it a?", " yes"],
        ["gsm8k", 7, "Q:a\n", " no"],
    ]
    assert got["acc"].tolist()[:2] == [1.0, 0.0]
    assert got[["exact_match,strict", "exact_match,flexible"]].to_numpy().tolist()[2] == [0.0, 1.0]
    wanted = isouq.score_texts(*chat_model, list(got.prompt), list(got.answer))
    assert got.log_epistemic.tolist() == pytest.approx(wanted.log_epistemic.tolist(), rel=1e-5)


def test_requests_as_lists_and_the_half_without_a_prompt_are_read(tmp_path):
    lists = choices(0, [-2, -1]) | {"arguments": [["Is it a?", " yes"], ["Is it a?", " no"]]}
    halves = choices(1, [-1, -2, 0, 0], acc_mutual_info=0.0)
    halves["arguments"] |= {"gen_args_2": {"arg_0": "", "arg_1": " yes"}, "gen_args_3": {"arg_0": "", "arg_1": " no"}}
    path = log(tmp_path / "samples_t_2026-01-02T03-04-05.678.jsonl", lists, halves)
    assert tables_of(path)["answer"].tolist() == [" no", " yes"]


def tables_of(*paths):
    from isouq.use.lm_eval import Log

    return pd.concat(Log("lm-eval", [str(path) for path in paths]).frames())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([sample(0, [["a", " b"]], [[["-1", "True"]]])], "line 1: loglikelihood of a single text, no answer"),
        ([sample(0, [["a"]], [["-1"]])], "line 1: requests loglikelihood_rolling, a text without an answer"),
        ([sample(0, [["a", {}, {"visual": []}]], [["b"]])], "line 1: requests with images or sounds"),
        ([sample(0, [[["[]"], {}]], [["b"]])], "line 1: the prompt is a list of messages to an API"),
        ([choices(0, [-1, -2])] * 2, "line 2: question 0 of t is there already, in "),
        ([{"doc_id": 1, "prompt": "a"}], r"line 1: no sample of lm_eval --log_samples \(KeyError: 'arguments'\)"),
        ([], "no sample in it"),
        ([sample(0, [["a", {}]], [[None]])], "line 1: the model's answer is None; a text wanted"),
        ([sample(0, [["a", {}]], [[["x", "y"]]])], r"line 1: the model's answer is \['x', 'y'\]; a text wanted"),
        ([choices(0, [-1, float("nan")])], "line 1: 2 choices and log-probabilities .*nan.*; one for each wanted"),
        ([choices(0, [-1, -2]) | {"resps": [[["-1", "True"]]]}], "line 1: 2 choices and log-probabilities"),
    ],
)
def test_a_log_without_answers_is_refused_by_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        tables_of(log(tmp_path / "samples_t.jsonl", *lines))


def test_what_a_log_lacks_is_neither_asked_nor_made_up(chat_folder, tmp_path, capsys):
    """An empty response has no score, a metric that is no number no cell, and a template is not applied twice."""
    lines = [sample(i, [["Q:a", {}]], [[text]], f1=x) for i, (text, x) in enumerate([(" no", 1), ("", float("nan"))])]
    path = log(tmp_path / "samples_t.jsonl", *lines)
    arguments = ["score", "--model", str(chat_folder), "--from", "lm-eval", str(path)]
    assert cli.main([*arguments, "--output", str(tmp_path / "o.jsonl")]) == 1
    first, second = read_lines(tmp_path / "o.jsonl")
    assert (first["answer"], first["f1"], first["error"]) == (" no", 1, None)
    assert second["error"] == "answer: empty, a text of at least one token wanted"
    assert (second["answer"], second["f1"], second["log_prob"]) == (None, None, None)
    assert cli.main([*arguments, "--chat", "--output", str(tmp_path / "o.jsonl")]) == 1
    assert "--chat: the prompts of a log are as the model has read them" in capsys.readouterr().err


def test_a_metric_named_as_a_text_of_the_log_does_not_take_its_place(tmp_path):
    line = sample(0, [["a", {}]], [[" b"]], prompt=1, answer=2, task=3, f1=0.5)
    got = tables_of(log(tmp_path / "samples_t.jsonl", line))
    assert got[["task", "prompt", "answer", "f1"]].to_numpy().tolist() == [["t", "a", " b", 0.5]]


def test_another_format_than_lm_eval_is_refused(tmp_path, capsys):
    assert cli.main(["score", "--model", "m", "--from", "helm", "a.json", "--output", str(tmp_path / "o.csv")]) == 1
    assert capsys.readouterr().err == "isouq: --from: helm a.json given, lm-eval and its samples_*.jsonl wanted\n"
