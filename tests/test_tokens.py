"""Each token's own estimate beside a plain loop, its text, and the course of an answer in a few numbers."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import isouq
from architectures import build, upcasts_to
from closeness import assert_close, assert_logs_close
from isouq.estimate import AGGREGATIONS
from reference import squared_norm, token_log_probs

PROMPTS = ["Is it é? ", "Is it 葉?", "Who?"]
ANSWERS = ["yes", " élan 葉!", " n"]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, as byte-level vocabularies fall back on for rare characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def model():
    return build("llama", tied=True, vocab_size=256)


@pytest.fixture(autouse=True)
def float64():
    with upcasts_to(torch.float64):
        yield


@pytest.mark.parametrize(("engine", "batch_size"), [("ghost", 1), ("ghost", 3), ("ghost", "auto"), ("autograd", 2)])
def test_every_token_has_the_numbers_of_a_plain_loop(model, tokenizer, engine, batch_size):
    found = isouq.score_each_token(model, tokenizer, PROMPTS, ANSWERS, engine=engine, batch_size=batch_size)
    rows, log_p, squares = [], [], []
    for example, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids, n_answer = tokenizer(prompt + answer, return_tensors="pt")["input_ids"][0], len(answer.encode())
        tokens = token_log_probs(model, ids, n_answer)
        rows += [[example, position] for position in range(n_answer)]
        log_p.append(tokens.detach())
        squares += [squared_norm(p, list(model.parameters())) for p in tokens.exp()]
    p = torch.cat(log_p).exp()
    assert found[["example", "position"]].to_numpy().tolist() == rows
    assert_close(torch.tensor(found["log_prob"]), torch.cat(log_p))
    assert_close(torch.tensor(found["aleatoric"]), p * (1 - p))
    assert_logs_close(torch.tensor(found["log_epistemic"]), torch.stack(squares).log())


def test_their_mean_over_an_answer_is_token_mean(model, tokenizer):
    found = isouq.score_each_token(model, tokenizer, PROMPTS, ANSWERS)
    means = found.assign(p=np.exp(found["log_prob"]), u=np.exp(found["log_epistemic"])).groupby("example")
    wanted = isouq.score_texts(model, tokenizer, PROMPTS, ANSWERS, aggregation="token_mean")
    for mean, column in [("p", "probability"), ("aleatoric", "aleatoric"), ("u", "epistemic")]:
        assert_close(torch.tensor(means[mean].mean().to_numpy()), torch.tensor(wanted[column].to_numpy()))
    assert_close(torch.tensor(means["log_prob"].sum()), torch.tensor(wanted["log_prob"]))


def test_the_norm_can_be_restricted_to_some_parameters(model, tokenizer):
    parts = [["model.layers.*"], ["model.embed_tokens.*", "model.norm.*"]]
    every = isouq.score_each_token(model, tokenizer, PROMPTS[:1], ANSWERS[:1])["log_epistemic"]
    some = [isouq.score_each_token(model, tokenizer, PROMPTS[:1], ANSWERS[:1], parameters=part) for part in parts]
    assert_logs_close(torch.tensor(np.logaddexp(*(part["log_epistemic"] for part in some))), torch.tensor(every))


def test_the_texts_of_the_tokens_put_together_are_the_answer(model, tokenizer):
    found = isouq.score_each_token(model, tokenizer, PROMPTS, ANSWERS)
    assert found.groupby("example")["token"].agg("".join).tolist() == ANSWERS
    assert found.loc[found["example"] == 1, "token"].tolist()[:3] == [" ", "", "é"], "é has two bytes, two tokens"


def test_a_first_token_keeps_its_space_and_a_torn_character_is_shown(tokenizer):
    from isouq.language.tokens import token_texts

    words = Tokenizer(models.Unigram([("▁is", -1.0), ("▁Paris", -1.0), ("<unk>", -9.0)], unk_id=2))
    words.decoder = decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=words)
    assert token_texts(spaced, [0], [1, 1]) == [" Paris", " Paris"]
    half = tokenizer("é")["input_ids"][:1]
    assert token_texts(tokenizer, tokenizer("a")["input_ids"], half) == ["\ufffd"]


def test_what_score_texts_refuses_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="answers: 1 given for 2 prompts"):
        isouq.score_each_token(model, tokenizer, PROMPTS[:2], ANSWERS[:1])
    with pytest.raises(ValueError, match="answers: number 0 is empty"):
        isouq.score_each_token(model, tokenizer, PROMPTS[:1], [""])


# ── The course of an answer ────────────────────────────────────────────────────────────────────────────────────


def course(*values, example=0):
    return pd.DataFrame({"example": example, "position": range(len(values)), "log_epistemic": values})


def test_the_profile_is_that_of_numpys_own_line():
    y = np.random.default_rng(0).normal(size=9)
    shuffled = course(*y).sample(frac=1, random_state=0)
    [found] = isouq.trace(shuffled).to_dict("records")
    slope = np.polyfit(np.linspace(0, 1, 9), y, 1)[0]
    line = np.polyval(np.polyfit(np.arange(9), y, 1), np.arange(9))
    assert found["n_tokens"] == 9
    assert found["level"] == pytest.approx(y.mean())
    assert found["slope"] == pytest.approx(slope)
    assert found["linearity"] == pytest.approx(1 - ((y - line) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    assert (found["peak"], found["peak_position"]) == (y.max(), y.argmax())


def test_certain_tokens_short_and_level_answers_have_a_profile():
    table = pd.concat(
        [
            course(-math.inf, -2.0, -4.0, example=5),
            course(-3.0, example=2),
            course(-1.0, -1.0, example=9),
            course(-math.inf, example=4),
        ]
    )
    found = isouq.trace(table)
    assert found.index.tolist() == [5, 2, 9, 4], "in the order of the table"
    assert found.loc[5, ["n_tokens", "level", "slope", "peak_position"]].tolist() == [3, -3.0, -4.0, 1]
    assert found.loc[2, ["level", "peak"]].tolist() == [-3.0, -3.0]
    assert found.loc[[2, 4], ["slope", "linearity"]].isna().all(axis=None)
    assert found.loc[9, "slope"] == 0
    assert np.isnan(found.loc[9, "linearity"])
    assert found.loc[4, ["level", "peak"]].tolist() == [-math.inf, -math.inf]


def test_a_table_of_something_else_is_refused():
    with pytest.raises(ValueError, match="columns example, position given, 'log_epistemic' wanted"):
        isouq.trace(course(1.0).drop(columns="log_epistemic"))
    with pytest.raises(ValueError, match="log_epistemic has NaN"):
        isouq.trace(course(1.0, math.nan))


# ── By layer ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_layers_add_up_to_the_whole_and_each_is_the_norm_over_its_parameters(model, tokenizer, aggregation):
    ids = tokenizer(["Is it so? yes", "Is it so? nay"], return_tensors="pt")["input_ids"]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, -3:] = True
    how = {"aggregation": aggregation}
    found = isouq.score_tokens(model, ids, mask, breakdown=True, **how)
    table = found.by_layer()
    whole = table.groupby("example")["log_epistemic"].agg(np.logaddexp.reduce)
    assert_logs_close(torch.tensor(whole.to_numpy()), found.log_epistemic)
    blocks = [[layer, kind] for layer in (0, 1) for kind in ("attention", "mlp", "norm")]
    rows = table.loc[table["example"] == 1, ["layer", "kind"]].to_numpy(dtype=object).tolist()
    assert sorted(map(str, rows)) == sorted(map(str, [*blocks, [pd.NA, "embedding"], [pd.NA, "norm"]]))
    part = isouq.score_tokens(model, ids, mask, parameters=["model.layers.1.mlp.*"], **how)
    one = table[(table["layer"] == 1) & (table["kind"] == "mlp")]
    assert_logs_close(torch.tensor(one["log_epistemic"].to_numpy()), part.log_epistemic)


@pytest.mark.parametrize(("name", "n_blocks"), [("gpt2", 2), ("gpt_neox", 2), ("opt", 2), ("bloom", 2), ("mamba", 2)])
def test_blocks_are_found_under_the_names_that_families_give_them(name, n_blocks):
    model, ids = build(name, tied=True), torch.tensor([[3, 4, 5]])
    scores = isouq.score_tokens(model, ids, torch.tensor([[False, True, True]]), breakdown=True)
    assert set(scores.by_layer()["layer"].dropna()) == set(range(n_blocks))


@pytest.mark.parametrize("name", ["bert.encoder.layer.1.output.dense.weight", "decoder.block.1.ff.weight"])
def test_a_block_may_have_its_name_in_the_singular(model, name):
    scores = isouq.score_tokens(model, torch.tensor([[3, 4]]), torch.tensor([[False, True]]), breakdown=True)
    table = dataclasses.replace(scores, breakdown={name: scores.log_epistemic}).by_layer()
    assert table[["layer", "kind"]].to_numpy(dtype=object).tolist() == [[1, "other"]]


def test_without_a_breakdown_there_are_no_layers(model):
    ids = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match=r"breakdown: none by example given, .*; score answers with breakdown=True"):
        isouq.score_tokens(model, ids, torch.tensor([[False, True]])).by_layer()
