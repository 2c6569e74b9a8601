"""Trap 3: gradient checkpointing.

A score is right, or refused by name.
"""

import contextlib

import pytest
import torch
from torch import nn

import isouq
from architectures import build, examples
from closeness import assert_logs_close
from comparison import assert_same, classes, is_exact, tokens, wanted
from isouq.gradients import NotCovered, squared_norms
from reference import pad, score
from toy import Checkpointed, Toy, random_ids


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_3_checkpointing_of_a_hub_model(name, reentrant):
    """Inert in eval mode; in training mode (here without dropout) it works, and ghost refuses."""
    off = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"), 0.0)
    model = build(name, tied=True, dtype=torch.float32, **(off if name == "gpt2" else {}))
    case = examples((7, 5), (3, 2))

    def scores(engine):
        return isouq.score_tokens(model, *pad(case, "left"), engine=engine).log_epistemic

    right = score(model, case).epistemic["sequence"].log()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_logs_close(scores("ghost"), right, torch.float32)
    model.train()
    for engine in ("auto", "autograd"):
        assert_logs_close(scores(engine), right, torch.float32)
    with pytest.raises(NotCovered):
        scores("ghost")
    assert model.training


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(
    ("kind", "covered"), [("none", True), ("saved on the CPU", True), ("reentrant", False), ("not reentrant", False)]
)
def test_3_checkpointing_inside_a_model(kind, covered, repeats):
    """With `repeats`, one layer's gradient comes from several recomputed segments: still one parameter."""
    torch.manual_seed(1)
    plain, model = Toy(), Checkpointed(kind, repeats=repeats)
    model.load_state_dict(plain.state_dict())
    plain = Checkpointed("none", repeats=repeats)
    plain.load_state_dict(model.state_dict())
    ids = random_ids(3, 8)
    right = wanted(plain, tokens(plain, ids), 3)
    for engine in ("autograd", "auto"):
        assert_same(squared_norms(model, tokens(model, ids), 3, engine=engine), right)
    context = contextlib.nullcontext() if covered else pytest.raises(NotCovered)
    with context:
        assert_same(squared_norms(model, tokens(model, ids), 3, engine="ghost"), right)


class SavedOnTheCpu(nn.Module):
    """Layers of one width: unpacked activations of equal shape may stand where another stood."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(8))

    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            for a, b in zip(self.layers[::2], self.layers[1::2], strict=True):
                x = torch.tanh(a(x)) * b(x)
            return x.mean(1)


def test_3_activations_that_are_unpacked_anew_share_no_products():
    model = SavedOnTheCpu()
    assert is_exact(model, classes(model, torch.randn(4, 3, 16)), 4)
