"""Trap 10: soft caps, scales, parallel residuals, fused projections, learned positions.

A score is right, or refused by name.
"""

import pytest
import torch
from architectures import COVERED, build, examples, upcasts_to
from closeness import assert_logs_close
from comparison import is_exact, tokens
from reference import pad, score
from torch import nn
from toy import N_WORDS, Toy, random_ids

import isouq
from isouq.causal_lm import score_aggregations


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
    found = []
    with upcasts_to(torch.float64):
        for value in ({}, {setting: other}):
            model = build(name, tied=True, **value)
            right = score(model, case).epistemic["sequence"].log()
            found.append(isouq.score_tokens(model, *pad(case, "left"), engine="ghost").log_epistemic)
            assert_logs_close(found[-1], right)
    assert not torch.allclose(*found, rtol=1e-3)


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


def test_10_all_three_aggregations_share_one_call():
    model = build("gemma2", tied=True)
    batch = pad(examples((9, 5), (3, 1)), "left")
    together = score_aggregations(model, *batch, aggregations=("token_mean", "sequence", "geometric"))
    for name, found in together.items():
        assert_logs_close(found.log_epistemic, isouq.score_tokens(model, *batch, aggregation=name).log_epistemic)
