"""Trap 10: soft caps, scales, parallel residuals, fused projections, learned positions.

A score is right, or refused by name.
"""

import math

import pytest
import torch
from torch import nn

import isouq
from architectures import COVERED, build, examples, upcasts_to
from closeness import assert_close, assert_logs_close
from comparison import is_exact, tokens
from isouq.estimate import AGGREGATIONS
from reference import pad, score
from toy import N_WORDS, Toy, random_ids


@pytest.mark.parametrize(
    ("name", "setting", "other"),
    [
        ("gemma2", "final_logit_softcapping", None),
        ("granite", "logits_scaling", 1.0),
        ("granite", "residual_multiplier", 1.0),
        ("granite", "embedding_multiplier", 1.0),
        ("gpt_neox", "use_parallel_residual", False),
        ("opt", "do_layer_norm_before", False),
        ("cohere", "logit_scale", 1.0),
    ],
)
def test_10_settings_of_the_table_matter_and_both_values_are_exact(name, setting, other):
    case = examples((9, 5, 7), (3, 1, 2))
    scores = []
    with upcasts_to(torch.float64):
        for value in ({}, {setting: other}):
            model = build(name, tied=True, **value)
            right = score(model, case).epistemic["sequence"].log()
            scores.append(isouq.score_tokens(model, *pad(case, "left"), engine="ghost").log_epistemic)
            assert_logs_close(scores[-1], right)
    assert not torch.allclose(*scores, rtol=1e-3)


def test_10_fused_projections_and_learned_positions_are_in_the_table():
    names = {key for name in COVERED for key, _ in build(name, tied=True).named_parameters()}
    for part in ("qkv_proj", "gate_up_proj", "c_attn", "query_key_value", "wpe", "embed_positions", "q_norm", "gate"):
        assert any(part in name for name in names), part


class OddHead(Toy):
    """What follows the hidden state is not one matrix: a cap, a temperature, a learned mixture, a second head."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.temperature = nn.Parameter(torch.tensor(1.3))
        self.second = nn.Linear(N_WORDS, N_WORDS)

    def forward(self, ids):
        logits = super().forward(ids)
        if self.way == "capped":
            return 2 * torch.tanh(logits / 2)
        if self.way == "tempered":
            return logits * self.temperature
        if self.way == "divided":
            return logits / self.temperature
        if self.way == "two heads":
            return logits + self.second(torch.tanh(logits))
        assert self.way == "already normalised"
        return logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("way", "covered"),
    [("capped", True), ("tempered", True), ("divided", False), ("two heads", True), ("already normalised", True)],
)
def test_10_nothing_is_assumed_of_the_step_to_the_logits(way, covered):
    model = OddHead(way)
    assert is_exact(model, tokens(model, random_ids(3, 8)), 3) == covered


# ── Both ends of p ───────────────────────────────────────────────────────────────────────────────────────────────────


class Bigram(nn.Module):
    """logits = table[previous token]."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, input_ids):
        return self.table(input_ids)


def sure(gaps: list[float], offset: float = 0.0) -> tuple[nn.Module, torch.Tensor]:
    """A float32 model of words 0 … n that after word t gives word t + 1 a logit `gaps[t]` above the highest other."""
    n = len(gaps) + 1
    table = offset + torch.randn(n, n, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    for t, gap in enumerate(gaps):
        table[t, t + 1] = -torch.inf
        table[t, t + 1] = table[t].max() + gap
    return Bigram(table), table.double()


def right_scores(table: torch.Tensor, gaps: list[float], aggregation: str) -> dict[str, torch.Tensor]:
    """The plain loop in float64; 1 − p is the sum over the other words. Each token has a row of the table to itself."""
    others = torch.stack([torch.cat([table[t, : t + 1], table[t, t + 2 :]]) for t in range(len(gaps))])
    odds = torch.stack([table[t, t + 1] - others[t].logsumexp(0) for t in range(len(gaps))])
    log_p = nn.functional.logsigmoid(odds)
    log_G = 2 * nn.functional.logsigmoid(-odds) + (1 + others.softmax(1).square().sum(1)).log()
    n = math.log(len(gaps))
    if aggregation == "token_mean":
        aleatoric = (log_p + (-log_p.expm1()).log()).exp().mean()
        log_mean, log_epistemic = log_p.logsumexp(0) - n, (2 * log_p + log_G).logsumexp(0) - n
    else:
        log_mean = log_p.sum() / (len(gaps) if aggregation == "geometric" else 1)
        aleatoric = log_mean.exp() * -log_mean.expm1()
        log_epistemic = 2 * log_mean + log_G.logsumexp(0) - (2 * n if aggregation == "geometric" else 0)
    return {"aleatoric": aleatoric, "log_epistemic": log_epistemic, "log_gradient": log_epistemic - 2 * log_mean}


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("offset", [0.0, 500.0])
@pytest.mark.parametrize(
    "gaps",
    [[8.0], [20.0], [27.0], [60.0], [200.0], [-50.0], [-900.0], [20.0] * 5, [27.0, 27.0, 1.0], [30.0, -800.0, -750.0]],
)
def test_10_a_sure_or_an_impossible_answer_keeps_its_digits_in_float32(engine, aggregation, gaps, offset):
    model, table = sure(gaps, offset)
    ids = torch.arange(len(gaps) + 1)[None]
    scores = isouq.score_tokens(model, ids, ids > 0, aggregation=aggregation, engine=engine)
    for name, wanted in right_scores(table, gaps, aggregation).items():
        if name == "aleatoric":
            assert_close(scores.aleatoric, wanted[None], torch.float32)
            assert not scores.aleatoric.signbit().any()
        else:
            assert_logs_close(getattr(scores, name), wanted[None], torch.float32)


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
def test_10_a_word_that_rules_out_all_others_is_certain(engine):
    model = Bigram(torch.tensor([[-torch.inf, 1.0], [0.0, 0.0]]))
    scores = isouq.score_tokens(model, torch.tensor([[0, 1]]), torch.tensor([[False, True]]), engine=engine)
    assert (scores.log_prob, scores.aleatoric, scores.log_epistemic) == (0, 0, -math.inf)
    assert not scores.aleatoric.signbit()
