"""Traps 1 and 2: underflow; tied weights.

A score is right, or refused by name.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isouq
from architectures import build, examples, upcasts_to
from closeness import assert_close, assert_logs_close
from comparison import is_exact, tokens
from reference import pad, score
from toy import N_WORDS, Toy, random_ids


def test_the_toy_itself_is_covered():
    model = Toy()
    assert is_exact(model, tokens(model, random_ids(3, 8)), 3)


# ── 1. Underflow ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("length", "n_answer"), [(45, 40), (200, 190)])
@pytest.mark.parametrize("engine", ["ghost", "autograd"])
def test_1_probabilities_below_the_range_of_float32_and_of_float64(engine, length, n_answer):
    """‖∇p‖² is 0 in float32 from log p = −106 down, and in float64 from −373; its logarithm is not."""
    torch.set_default_dtype(torch.float32)
    model = build("llama", tied=True, dtype=torch.float32, max_position_embeddings=256)
    case = examples((length,), (n_answer,))
    scores = isouq.score_tokens(model, *pad(case, "none"), engine=engine)
    assert scores.log_prob.item() < -106
    assert scores.log_prob.float().exp().square() == 0
    assert scores.log_epistemic.isfinite().all()
    model = model.double()
    with upcasts_to(torch.float64):
        double = isouq.score_tokens(model, *pad(case, "none"), engine="autograd")
        reference = score(model, case).epistemic["sequence"]
    assert_close(scores.log_epistemic, double.log_epistemic, torch.float32)
    if double.log_prob.item() > -340:
        assert_logs_close(double.log_epistemic, reference.log())
    else:
        assert reference == 0
        assert scores.epistemic == 0


# ── 2. Tied weights ────────────────────────────────────────────────────────────────────────────────────────────


class TiedThrough(Toy):
    def __init__(self, way):
        super().__init__()
        self.way = way
        self.table = nn.Parameter(torch.randn(8, N_WORDS))

    def forward(self, ids):
        weight = self.embed.weight
        if self.way == "itself":
            return F.linear(self.embed(ids).cumsum(1), weight)
        if self.way == "a view":
            return F.linear(self.embed(ids).cumsum(1), weight.view(N_WORDS, 8))
        if self.way == "the transpose of a table":
            return F.embedding(ids, self.table.T).cumsum(1) @ self.table
        if self.way == "the square of a layer":
            return self.head(self.hidden(self.hidden(self.embed(ids))).cumsum(1))
        if self.way == "a layer and its transpose":
            return self.head(F.linear(self.hidden(self.embed(ids)), self.hidden.weight.T).cumsum(1))
        assert self.way == "two embeddings and the head"
        return F.linear((self.embed(ids) * self.embed(ids.flip(1)).cumsum(1)).cumsum(1), weight)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("way", "covered"),
    [
        ("itself", True),
        ("a view", False),
        ("the transpose of a table", False),
        ("the square of a layer", True),
        ("a layer and its transpose", True),
        ("two embeddings and the head", True),
    ],
)
def test_2_every_way_of_sharing_a_weight(way, covered, n):
    model = TiedThrough(way)
    assert is_exact(model, tokens(model, random_ids(n, 8)), n) == covered
