"""May the examples of a batch meet: what classes answer for, what a batch itself shows.

Right is always what an example gets alone, whatever came before and whoever stands beside it.
"""

import contextlib

import pytest
import torch
from torch import nn

import isouq
from architectures import COVERED, HELD_OUT, build, class_name, examples, upcasts_to
from closeness import assert_close, assert_logs_close
from comparison import assert_same, classes, wanted
from isouq.gradients import NotCovered, isolation, squared_norms
from isouq.gradients.isolation import DECODERS, STACKED, is_decoder, is_stack
from reference import pad, score
from toy import N_WORDS, random_ids

N = 6


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4).eval(),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 3),
        nn.LogSoftmax(1),
    )


# ── By class ───────────────────────────────────────────────────────────────────────────────────────────────────────

ARCHITECTURES = {**COVERED, **HELD_OUT}
KNOWN = [name for name in ARCHITECTURES if class_name(name) in DECODERS]
CASES = [examples((9, 5, 7), (3, 1, 2)), examples((5, 8, 8, 6), (1, 4, 2, 2), seed=1), examples((7,), (2,), seed=2)]


def test_every_class_that_is_answered_for_is_tested_here():
    assert {class_name(name) for name in KNOWN} == DECODERS


@pytest.mark.parametrize("name", KNOWN)
def test_a_decoder_answered_for_takes_one_pass_a_batch_and_is_right_again_after_others(name, monkeypatch):
    dtype = torch.float32 if name == "mixtral_grouped" else torch.float64
    model, passes = build(name, tied=True, dtype=dtype), []
    model(input_ids=torch.tensor([[3, 4]]))  # not counted: what a model builds when it is first called
    assert is_decoder(model)
    with upcasts_to(dtype):
        right = [score(model, case) for case in CASES]
        forward = type(model).forward
        monkeypatch.setattr(type(model), "forward", counting(forward, passes))
        for i in (0, 1, 2, 0):
            passes.clear()
            scores = isouq.score_tokens(model, *pad(CASES[i], "turns"), engine="ghost", batch_size=8)
            assert scores.engine == "ghost"
            assert len(passes) == 1
            assert_logs_close(scores.log_epistemic, right[i].epistemic["sequence"].log(), dtype)


def counting(forward, passes):
    def counted(self, *args, **kwargs):
        passes.append(1)
        return forward(self, *args, **kwargs)

    counted.__module__, counted.__signature__ = forward.__module__, __import__("inspect").signature(forward)
    return counted


def a_subclass(model):
    model.__class__ = type("Own", (type(model),), {"__module__": "own"})


def a_forward_in_its_place(model):
    inside = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: inside(x) - 0.1 * inside(x).mean(0, keepdim=True)


def a_hook(model):
    model.model.layers[0].register_forward_hook(lambda _m, _i, out: out + 0.1 * out.roll(1, 0))


def a_pre_hook(model):
    model.lm_head.register_forward_pre_hook(lambda _m, given: (given[0] + 0.1 * given[0].mean(0, keepdim=True),))


def a_module_of_other_origin(model):
    class Gate(nn.Module):
        def forward(self, x):
            return x * (x.detach() > x.detach().mean(0, keepdim=True))

    model.model.layers[0].mlp.act_fn = Gate()


def an_attention_of_other_origin(model):
    from transformers import AttentionInterface

    def attend(module, query, key, value, attention_mask=None, **_):
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        weights = (query @ key.transpose(2, 3)).sigmoid().tril()
        return (weights @ value).transpose(1, 2).roll(1, 0), None

    AttentionInterface.register("own", attend)
    model.config._attn_implementation = "own"


def a_patched_class(model):
    layer = type(model.model.norm)
    plain = layer.forward
    model.undo = lambda: setattr(layer, "forward", plain)
    layer.forward = lambda self, x: plain(self, x) + 0.1 * x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    "change",
    [
        a_subclass,
        a_forward_in_its_place,
        a_hook,
        a_pre_hook,
        a_module_of_other_origin,
        an_attention_of_other_origin,
        a_patched_class,
    ],
)
def test_a_decoder_that_was_changed_is_asked_anew_and_right(change):
    """Scored before and after the change, so that nothing known of the model as it was is carried over."""
    with upcasts_to(torch.float64):
        model, case = build("llama", tied=False), CASES[0]
        isouq.score_tokens(model, *pad(case, "left"))
        change(model)
        try:
            assert not is_decoder(model)
            estimates = [isouq.score_tokens(model, *pad(CASES[i], "left")) for i in (0, 1, 0)]
            right = [score(model, CASES[i]) for i in (0, 1, 0)]
        finally:
            getattr(model, "undo", lambda: None)()
    for scores, reference in zip(estimates, right, strict=True):
        assert_close(scores.log_prob, reference.log_prob)
        assert_logs_close(scores.log_epistemic, reference.epistemic["sequence"].log())


def test_a_hook_for_all_modules_and_training_mode_are_asked_anew():
    model = build("llama", tied=True)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_decoder(model)
    handle.remove()
    assert is_decoder(model)
    model.model.layers[0].train()
    assert not is_decoder(model)
    model.eval().model.rotary_emb.rope_type = "dynamic"  # frequencies depend on the longest sequence of the batch
    assert not is_decoder(model)


STACKS = {
    "layers": convolutional()[:-1],
    "nested": nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.GELU()), nn.Linear(8, 3)),
}
NO_STACKS = {
    "an own module": lambda: nn.Sequential(nn.Flatten(), Own("none")),
    "softmax of the raw examples": lambda: nn.Sequential(nn.Softmax(0), nn.Flatten(), nn.Linear(72, 3)),
    "statistics of the batch": lambda: nn.Sequential(
        nn.BatchNorm2d(2, affine=False, track_running_stats=False), nn.Flatten(), nn.Linear(72, 3)
    ),
    "norm over the batch": lambda: nn.Sequential(
        nn.LayerNorm([N, 2, 6, 6], elementwise_affine=False), nn.Flatten(), nn.Linear(72, 3)
    ),
    "a subclass": lambda: nn.Sequential(nn.Flatten(), type("Own", (nn.Linear,), {})(72, 3)),
    "training mode": lambda: convolutional().train(),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_pile_of_torchs_layers_takes_one_pass_a_batch(name):
    model, x = STACKS[name].eval(), torch.randn(N, 2, 6, 6)
    assert is_stack(model)
    right, passes = wanted(model, classes(model, x), N), []

    def objective(rows):
        passes.append(rows)
        return classes(model, x)(rows)

    norms = squared_norms(model, objective, N, engine="ghost", apart=True)
    assert_same(norms, right, torch.float32)
    assert len(passes) == 1


@pytest.mark.parametrize("name", NO_STACKS)
def test_what_is_not_a_pile_of_torchs_layers(name):
    model = NO_STACKS[name]()
    assert not is_stack(model if name == "training mode" else model.eval())


@pytest.mark.parametrize("layer", [nn.LayerNorm([N, 4]), nn.RMSNorm([N, 4]), nn.Conv1d(N, N, 1)], ids=repr)
def test_a_pile_that_takes_the_axis_of_the_examples_for_another_gets_no_score(layer):
    """Its layers are known, but none of the examples could run alone."""
    model, x = nn.Sequential(layer).eval(), torch.randn(N, 4)
    assert is_stack(model)
    with pytest.raises((ValueError, RuntimeError)):
        squared_norms(model, classes(model, x), N, apart=True)
    model = nn.Sequential(layer, nn.Linear(4, 3)).eval()  # nor where the layer's own rule is not asked
    with pytest.raises((ValueError, RuntimeError)):
        squared_norms(model, classes(model, x), N, apart=True, parameters=["1.*"])


@pytest.mark.parametrize("name", sorted(STACKED))
def test_every_layer_answered_for_takes_row_by_row(name):
    """Rows of the raw input, with no parameter before it: nothing of this shows in a graph."""
    sizes = {"Linear": (6, 3), "Conv1d": (5, 4, 2), "Conv2d": (5, 4, 2), "GroupNorm": (5, 5), "BatchNorm1d": (5,)}
    sizes |= {"BatchNorm2d": (5,), "LayerNorm": (6,), "RMSNorm": (6,), "MaxPool2d": (2,), "AvgPool2d": (2,)}
    sizes |= {"AdaptiveAvgPool2d": (2,)}
    layer = getattr(nn, name)(*sizes.get(name, ())).eval()
    x = torch.randn(4, 5, 6) if name in ("Conv1d", "BatchNorm1d", "Dropout1d") else torch.randn(4, 5, 6, 6)
    together = layer(x)
    for i in range(4):
        torch.testing.assert_close(layer(x[i : i + 1])[0], together[i])


# ── By the batch itself ────────────────────────────────────────────────────────────────────────────────────────────


class Own(nn.Module):
    """Ids (example, token) → logits (example, class), with one of MIXTURES between; `words` may be anything."""

    def __init__(self, way):
        super().__init__()
        self.way, self.calls = way, 0
        self.embed, self.hidden, self.head = nn.Embedding(N_WORDS, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.branch = nn.Linear(8, 8, bias=False)
        if "zero" in way:
            nn.init.zeros_(self.branch.weight)

    def forward(self, ids):
        self.calls += 1
        h = MIXTURES[self.way](self, ids, self.embed(ids))
        return self.head(torch.tanh(self.hidden(h)).mean(1))


def capacity(m, x, room):
    rows = x.flatten(0, 1)
    kept = (torch.arange(len(rows)) < room).to(x.dtype)[:, None]
    return x + (m.branch(rows) * kept).view_as(x)


def in_order(m, ids, x):
    order = ids[:, 0].argsort(stable=True)
    return m.branch(x[order]).tanh()[order.argsort()]


def packed(m, ids, x):
    """As code for packed sequences has it: rows of all examples, those of a token of no interest left out."""
    keep = (ids != 3).flatten()
    rows = m.branch(x.flatten(0, 1)[keep]).tanh()
    out = torch.zeros_like(x).flatten(0, 1)
    out[keep] = rows
    return x + out.view_as(x)


def through(value, gradient):
    """The first's value, the second's gradient."""
    return value.detach() + gradient - gradient.detach()


MIXTURES = {
    "none": lambda m, ids, x: x,
    "capacity": lambda m, ids, x: capacity(m, x, 14),
    "capacity of a branch of value zero": lambda m, ids, x: capacity(m, x, 14),
    "sorted by the data": in_order,
    "packed": packed,
    "mask against the batch's mean": lambda m, ids, x: x * (x > x.mean(0)),
    "count of a word in the batch": lambda m, ids, x: x * (1 + 0.1 * (ids == 3).sum()),
    "a word that mixes": lambda m, ids, x: x + (ids == 3).any() * x.mean(0, keepdim=True).detach(),
    "large batches only": lambda m, ids, x: x - 0.1 * x.mean(0, keepdim=True) if len(x) > 4 else x,
    "scaled by the batch's size": lambda m, ids, x: x / len(x),
    "another order": lambda m, ids, x: m.branch(x.roll(1, 0)).roll(-1, 0),
    "value apart, gradient of the mean": lambda m, ids, x: through(x, x + x.mean(0, keepdim=True)),
    "value apart, gradient of a neighbour": lambda m, ids, x: through(x, x.roll(1, 0)),
    "tokens for examples": lambda m, ids, x: m.branch(x.transpose(0, 1)).tanh().transpose(0, 1),
    "dropped after the first call": lambda m, ids, x: x if m.calls == 1 else x - x.mean(0, keepdim=True),
    "normalised over the batch": lambda m, ids, x: (
        nn.functional.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2) if len(x) > 1 else x
    ),
    "doubled by copies": lambda m, ids, x: torch.cat([x, x]).view(2, *x.shape).sum(0),
}
APART_ALL_THE_SAME = {
    "none",
    "sorted by the data",
    "packed",
    "another order",
    "tokens for examples",
    "doubled by copies",
}


@pytest.mark.parametrize("way", MIXTURES)
def test_an_example_gets_what_it_gets_alone_in_any_order_of_batches(way, unchecked):
    torch.manual_seed(0)
    model, ids = Own(way).double().eval(), random_ids(6, 5)
    ids[0, 0], ids[1:] = 3, ids[1:].where(ids[1:] != 3, 4)
    if way == "dropped after the first call":
        model.calls = 1  # deterministic from here on
    alone = wanted(model, classes(model, ids), 6)
    scores_alone = torch.cat([isouq.score_classes(model, ids[i : i + 1], "all").log_epistemic for i in range(6)])
    for n in (2, 6, 1, 5):
        objective = classes(model, ids[:n])
        assert_same(squared_norms(model, objective, n), alone[:n])
        with contextlib.suppress(NotCovered):
            assert_same(squared_norms(model, objective, n, engine="ghost", apart=True), alone[:n])
        assert_logs_close(isouq.score_classes(model, ids[:n], "all").log_epistemic, scores_alone[:n])


@pytest.mark.parametrize("way", sorted(MIXTURES))
def test_the_result_says_when_examples_went_one_at_a_time(way):
    torch.manual_seed(0)
    model, ids = Own(way).double().eval(), random_ids(6, 5)
    ids[0, 0] = 3
    engine = isouq.score_classes(model, ids).engine
    if way == "none":
        assert engine == "ghost"
    elif way not in APART_ALL_THE_SAME:
        assert engine == "ghost, one at a time"


@pytest.mark.parametrize("way", ["capacity", "sorted by the data", "mask against the batch's mean"])
def test_inner_products_of_examples_that_meet_are_those_of_each_alone(way):
    torch.manual_seed(0)
    m = Own(way).double().eval()

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = m, nn.Linear(8, N_WORDS).double()

        def forward(self, input_ids):
            mixed = MIXTURES[way](m, input_ids, m.embed(input_ids))
            return type("Out", (), {"logits": self.head(torch.tanh(m.hidden(mixed)).cumsum(1))})

    model, ids = Causal(), random_ids(5, 6)
    answer = torch.zeros(5, 6, dtype=torch.bool)
    answer[:, -2:] = True
    products = isouq.inner_products(model, ids, answer)
    rows = []
    for i in range(5):
        log_p = model(ids[i : i + 1, :-1]).logits[0].log_softmax(-1)
        S = log_p[3, ids[i, 4]] + log_p[4, ids[i, 5]]
        grads = torch.autograd.grad(S, list(model.parameters()), allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(grads, model.parameters(), strict=True)
                ]
            )
        )
    X = torch.stack(rows)
    torch.testing.assert_close(products, X @ X.T, rtol=1e-9, atol=1e-12)


def test_a_second_output_that_mixes_in_its_gradient_alone_is_found():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            other = self.b(x)
            return torch.cat([self.a(x), through(other, other + other.mean(0, keepdim=True))], 1)

    model, x = Two().double().eval(), torch.randn(5, 4, dtype=torch.float64)
    scores = isouq.score_outputs(model, x, noise_variance=1.0)
    alone = torch.cat([isouq.score_outputs(model, x[i : i + 1], noise_variance=1.0).log_epistemic for i in range(5)])
    assert_logs_close(scores.log_epistemic, alone)


@pytest.mark.parametrize("n", [16, 17, 40])
def test_many_examples_are_told_apart(n):
    """More than the weights of one pass: two examples that share a weight there differ in another."""

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            far = h[[(i + 16) % len(h) for i in range(len(h))]] if len(h) > 16 else h
            return self.head(through(h, h + far))

    model, x = Pairs().double().eval(), torch.randn(n, 4, dtype=torch.float64)
    objective = classes(model, x)
    assert_same(squared_norms(model, objective, n), wanted(model, objective, n))


def test_a_batch_that_meets_frees_its_graph_before_the_examples_go_one_at_a_time(monkeypatch):
    alive = []
    model = Own("scaled by the batch's size").eval()
    known = isolation.is_known

    def is_known(model, plan, **options):
        if plan.n_examples > 1:
            plan.graph.mark = type("Mark", (), {"__del__": lambda _: alive.clear()})()
            alive.append(1)
        else:
            assert not alive
        return known(model, plan, **options)

    monkeypatch.setattr(isolation, "is_known", is_known)
    assert isouq.score_classes(model, random_ids(4, 5)).engine == "ghost, one at a time"
