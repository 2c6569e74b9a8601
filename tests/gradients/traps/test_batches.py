"""Trap 8: padding, batches, dtype, examples that meet; the same for inner products (9 is in test_causal_lm.py).

A score is right, or refused by name.
"""

import contextlib

import pytest
import torch
from torch import nn

import isouq
from architectures import build, examples, upcasts_to
from closeness import assert_close, assert_logs_close
from comparison import classes, is_exact, tokens
from isouq.gradients import NotCovered, squared_norms
from isouq.gradients.products import inner_products
from reference import pad
from toy import Broadcast, Checkpointed, RawExperts, random_ids

# ── 8. Padding, batch composition, dtype; examples that meet ───────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.float32), *((name, torch.float64) for name in ("llama", "gemma3", "gpt2", "opt", "mixtral"))],
)
def test_8_a_score_depends_on_nothing_but_its_own_tokens(name, dtype):
    """Padding on either side, extra width, the order, the batch's size and company."""
    model = build(name, tied=True, dtype=dtype)
    case = examples((9, 5, 12, 7, 5), (3, 1, 2, 2, 4))
    order = [3, 0, 4, 2, 1]
    with upcasts_to(dtype):
        alone = [isouq.score_tokens(model, *pad([one], "none")).log_epistemic for one in case]
        ways = [pad(case, "left"), pad(case, "right"), pad(case, "turns", width=20)]
        every = [isouq.score_tokens(model, *way).log_epistemic for way in ways]
        every += [isouq.score_tokens(model, *ways[0], batch_size=size).log_epistemic for size in (1, 2, 3)]
        shuffled = isouq.score_tokens(model, *pad([case[i] for i in order], "left"))
    for scores in every:
        assert_logs_close(scores, torch.cat(alone), dtype)
    assert_logs_close(shuffled.log_epistemic, torch.cat(alone)[order], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_8_half_precision_is_close_to_float32(name, dtype):
    """The weights are the same numbers; the tolerance is that of closeness.py."""
    torch.set_default_dtype(torch.float32)
    model = build(name, tied=True, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p / 2).to(dtype))
    batch = pad(examples((9, 5, 12, 7), (3, 1, 2, 2)), "left")
    right = isouq.score_tokens(model, *batch, engine="autograd").log_epistemic
    for engine in ("ghost", "autograd"):
        scores = isouq.score_tokens(model.to(dtype), *batch, engine=engine)
        assert scores.engine == engine
        assert_logs_close(scores.log_epistemic, right, dtype)


class Meeting(nn.Module):
    """(example, token, feature) → (example, class), with a batch whose examples meet in some way."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.batch_norm = nn.BatchNorm1d(8, affine=way != "batch norm without parameters")

    def forward(self, x):
        n, h = len(x), torch.tanh(self.first(x))
        if "mean" in self.way:
            mean = h.mean(0, keepdim=True)
            h = h - (mean.detach() if "detached" in self.way else mean)
        if "batch norm" in self.way:
            h = self.batch_norm(h.mean(1))[:, None]
        order = {"reversed": torch.arange(n).flip(0), "two swapped": torch.tensor([0, 2, 1, *range(3, n)][:n])}
        order = order.get(self.way, torch.arange(n)) if n > 2 else torch.arange(n)
        h = torch.tanh(self.second(1.0 * h[order]))[order.argsort()]
        if self.way == "attention over examples":
            h = torch.softmax(torch.einsum("ntd,mtd->nm", h, h), 1) @ h.flatten(1)
            h = h.unflatten(1, (-1, 8))
        return self.head(h.mean(1))


@pytest.mark.parametrize(
    "way",
    [
        "minus the batch's mean",
        "minus the batch's mean, detached",
        "batch norm",
        "batch norm without parameters",
        "reversed",
        "two swapped",
        "attention over examples",
    ],
)
def test_8_examples_that_meet_in_a_batch_are_not_scored_together(way):
    model = Meeting(way).eval()
    x = torch.randn(5, 4, 8)
    if way.startswith("batch norm"):
        assert is_exact(model, classes(model, x), 5)
        model.train()
        with pytest.raises(ValueError, match="more than 1 value"):  # alone it has no statistics
            squared_norms(model, classes(model, x), 5, engine="ghost")
    else:
        assert not is_exact(model, classes(model, x), 5)


class Sorted(nn.Module):
    """Puts the examples of a batch in order of some feature, works, and puts them back, as packed sequences do."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        order = x[:, 0, 0].argsort()
        return self.head(torch.tanh(self.hidden(1.0 * x[order]))[order.argsort()].mean(1))


def test_8_examples_that_change_places_in_a_later_batch_only():
    model = Sorted()
    x = torch.randn(5, 4, 8)
    ordered = x[x[:, 0, 0].argsort()]
    assert is_exact(model, classes(model, ordered), 5)
    assert not is_exact(model, classes(model, ordered[[0, 2, 1, 3, 4]]), 5)


def test_8_equal_examples_do_not_prove_that_examples_stay_apart():
    model = Meeting("minus the batch's mean, detached")
    x = torch.randn(5, 4, 8)
    is_exact(model, classes(model, x[:1].expand(5, -1, -1)), 5)
    assert not is_exact(model, classes(model, x), 5)


def test_8_a_model_without_meetings_is_covered():
    model = Meeting("none")
    assert is_exact(model, classes(model, torch.randn(5, 4, 8)), 5)
    assert is_exact(model, classes(model, torch.randn(40, 4, 8)), 40)  # more than one digit of weights


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("layer", ["transformer", "lstm", "gru"])
def test_8_torch_layers_that_turn_the_batch_around_are_exact_or_refused(layer, n):
    """Also where there are as many examples as tokens."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = {
                "transformer": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
                "lstm": nn.LSTM(8, 8, batch_first=True),
                "gru": nn.GRU(8, 8, batch_first=True),
            }[layer]
            self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            out = self.layer(self.first(x))
            return self.head((out[0] if isinstance(out, tuple) else out).mean(1))

    model = Wrapped()
    is_exact(model, classes(model, torch.randn(n, 4, 8)), n)


class Frames(nn.Module):
    """A convolution and a norm over all frames of all examples at once."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3).eval()
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        n, length = x.shape[:2]
        frames = self.conv(x.flatten(0, 1)).mean(2)
        frames = self.norm(frames) if self.kind == "norm" else frames
        return self.head(frames.tanh().view(n, length, 3).mean(1))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["conv", "norm"])
def test_8_frames_of_all_examples_in_one_axis_are_refused(kind, n):
    model = Frames(kind)
    assert not is_exact(model, classes(model, torch.randn(n, 4, 2, 5)), n)


# ── The same traps for inner products of gradients ──────────────────────────────────────────────────────────────────


def gram(model, objective, sizes, engine):
    """Inner products of all examples, in batches of the given sizes."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def batch(start):
        return lambda rows: objective(slice(start + rows.start, start + rows.stop))

    return inner_products(model, [(batch(s), n) for s, n in zip(starts, sizes, strict=True)], engine=engine).rows


@pytest.mark.parametrize(
    ("kind", "covered"),
    [
        ("plain", True),
        ("scalars", True),
        ("raw experts", True),
        ("sorted", True),
        ("reentrant", False),
        ("not reentrant", False),
    ],
)
def test_inner_products_are_exact_or_refused_where_norms_are(kind, covered):
    """The first batch alone gives nothing away: the raw experts take one token of each example."""
    if kind == "raw experts":
        x = torch.randn(4, 2, 4).abs()
        x[:, 1] *= -1
        x[2, 1] *= -1
        x[3, 0] *= -1
        model = RawExperts()
    elif kind == "scalars":
        x, model = torch.randn(4, 4, 3), Broadcast()
    elif kind in ("plain", "sorted"):
        x = torch.randn(4, 3, 8)
        x = x[x[:, 0, 0].argsort()][[0, 1, 3, 2]]
        model = Sorted() if kind == "sorted" else Meeting("none")
    else:
        x, model = random_ids(4, 8), Checkpointed(kind)
    objective = tokens(model, x) if x.dtype == torch.int64 else classes(model, x)
    parameters = list(model.parameters())
    rows = []
    for i in range(4):
        objective(slice(i, i + 1))[0, 0].backward()
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
        model.zero_grad()
    X = torch.stack(rows)
    assert_close(gram(model, objective, (2, 2), "auto"), X @ X.T)
    context = contextlib.nullcontext() if covered else pytest.raises(NotCovered)
    with context:
        assert_close(gram(model, objective, (2, 2), "ghost"), X @ X.T)
