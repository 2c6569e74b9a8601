"""Traps 5 and 6: experts; embeddings scaled inside the module.

A score is right, or refused by name.
"""

import pytest
import torch
from torch import nn

import isouq
from architectures import build, dtype_of, examples, upcasts_to
from closeness import assert_close, assert_logs_close
from comparison import classes, is_exact, tokens
from isouq.gradients import squared_norms
from reference import pad, score
from toy import N_WORDS, RawExperts, Toy, random_ids

# ── 5. Experts ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["mixtral", "mixtral_grouped"])
def test_5_experts_that_some_examples_never_ask(name):
    """A router that is sure: examples of one kind go to two experts, and the third has no gradient."""
    model = build(name, tied=False, num_hidden_layers=1)
    dtype = dtype_of(name)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[2] = 0
        model.model.layers[0].mlp.gate.weight[:2] = 100 * model.model.layers[0].mlp.gate.weight[:1]
    case = examples((9, 5, 7), (3, 1, 2))
    with upcasts_to(dtype):
        right = score(model, case).epistemic["sequence"]
        scores = isouq.score_tokens(model, *pad(case, "left"), engine="ghost", breakdown=True)
    assert_logs_close(scores.log_epistemic, right.log(), dtype)
    assert any("experts" in name for name in scores.breakdown)


def test_5_experts_on_the_raw_input_are_checked_in_every_batch():
    model = RawExperts()
    x = torch.randn(2, 2, 4).abs()
    for negative, covered in (((slice(None), 1), True), ((0, slice(None)), False), ((1, slice(None)), False)):
        signs = torch.ones(2, 2)
        signs[negative] = -1
        assert is_exact(model, classes(model, x * signs[..., None]), 2) == covered


class Stacked(Toy):
    def __init__(self, way):
        super().__init__()
        self.way = way
        self.stack = nn.Parameter(torch.randn(3, 8, 8))
        self.tall = nn.Parameter(torch.randn(24, 8))

    def body(self, x):
        if self.way == "by number":
            return torch.tanh(torch.tanh(x @ self.stack[0]) @ self.stack[2] @ self.stack[0])
        if self.way == "one slice by two numbers":
            return torch.tanh(torch.tanh(x @ self.stack[-1]) @ self.stack[2])
        if self.way == "by a tensor":
            return torch.tanh(x @ self.stack[torch.tensor(1)]) @ self.stack[-2]
        if self.way == "as a view of one matrix":
            return torch.tanh(x @ self.tall.view(3, 8, 8)[0]) @ self.tall.view(3, 8, 8)[2]
        assert self.way == "together"
        return torch.bmm(x.reshape(1, -1, x.shape[2]).expand(3, -1, -1), self.stack).sum(0).view(x.shape)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("way", "covered"),
    [
        ("by number", True),
        ("one slice by two numbers", True),
        ("by a tensor", True),
        ("as a view of one matrix", False),
        ("together", False),
    ],
)
def test_5_slices_of_a_stacked_parameter(way, covered, n):
    model = Stacked(way)
    assert is_exact(model, tokens(model, random_ids(n, 8)), n) == covered


# ── 6. Embeddings scaled inside the module ─────────────────────────────────────────────────────────────────────


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * self.weight.shape[1] ** 0.5


def test_6_an_embedding_that_scales_its_output():
    model = Toy()
    model.embed = ScaledEmbedding(N_WORDS, 8)
    ids = random_ids(3, 8)
    assert is_exact(model, tokens(model, ids), 3)
    plain = Toy()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain.embed.weight *= 8**0.5
    scaled, unscaled = (squared_norms(m, tokens(m, ids), 3).by_parameter[..., 0] for m in (model, plain))
    assert_close(scaled, 8 * unscaled)


def test_6_gemma_scales_its_embedding():
    """If it ever stopped, the rows gemma2 and gemma3 of the table would no longer test the trap."""
    model = build("gemma3", tied=True)
    assert model.get_input_embeddings().embed_scale.item() == pytest.approx(4)
