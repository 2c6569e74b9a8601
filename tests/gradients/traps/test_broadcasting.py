"""Trap 4: parameters broadcast over the batch.

A score is right, or refused by name.
"""

import pytest
import torch
from torch import nn

import isouq
from architectures import build, examples, upcasts_to
from closeness import assert_logs_close
from comparison import classes, is_exact, tokens
from reference import pad, score
from toy import N_WORDS, Broadcast, Toy, random_ids


class Positions(Toy):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.position = nn.Embedding(16, 8)
        self.start = nn.Parameter(torch.randn(1, 1, 8))

    def embedded(self, ids):
        n, length = ids.shape
        places = torch.arange(length)
        if self.kind == "one row":
            return self.embed(ids) + self.position(places[None])
        if self.kind == "no batch axis":
            return self.embed(ids) + self.position(places)
        if self.kind == "each example":
            return self.embed(ids) + self.position(places.expand(n, -1))
        if self.kind == "multiplied":
            return self.embed(ids) * self.position(places)
        if self.kind == "the tokens' own table":
            return self.embed(ids) + self.embed(places % N_WORDS)
        assert self.kind == "a learned first token"
        return torch.cat([self.start.expand(n, -1, -1), self.embed(ids)[:, 1:]], 1)


@pytest.mark.parametrize(
    "kind", ["one row", "no batch axis", "each example", "multiplied", "the tokens' own table", "a learned first token"]
)
def test_4_positions_that_all_examples_share(kind):
    """Also where there are as many examples as tokens, after a batch in which there were not, and the reverse."""
    for sizes in ([(3, 8), (1, 8), (5, 6), (3, 5)], [(5, 6), (1, 2), (3, 8)]):
        model = Positions(kind)
        for n, length in sizes:
            covered = is_exact(model, tokens(model, random_ids(n, length)), n)
            assert covered or n == length - 1, f"{kind} refused for {n} examples of {length} tokens"


def test_4_as_many_examples_as_tokens_in_gpt2():
    model = build("gpt2", tied=True)
    for n, length in ((3, 8), (7, 8), (8, 8), (1, 8)):
        case = examples((length,) * n, (3,) * n)
        with upcasts_to(torch.float64):
            right = score(model, case).epistemic["sequence"]
            assert_logs_close(isouq.score_tokens(model, *pad(case, "none"), engine="ghost").log_epistemic, right.log())


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_4_every_shape_of_broadcasting(n):
    model = Broadcast()
    assert is_exact(model, classes(model, torch.randn(n, 4, 3)), n)


class NormedParameter(nn.Module):
    """A norm or a convolution whose input, not gain or kernel, is the parameter."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.latent = nn.Parameter(torch.randn(1, 4, 8))
        self.norm, self.batch = nn.LayerNorm(8), nn.BatchNorm1d(4).eval()
        self.group, self.conv = nn.GroupNorm(2, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head((getattr(self, self.kind)(self.latent) + x[:, None]).tanh().mean(1))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["norm", "batch", "group", "conv"])
def test_4_a_parameter_that_is_itself_normalised(kind, n):
    model = NormedParameter(kind)
    assert not is_exact(model, classes(model, torch.randn(n, 8)), n)
