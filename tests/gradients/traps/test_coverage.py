"""Trap 7: silent loss of coverage.

A score is right, or refused by name.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from comparison import assert_same, classes, is_exact, tokens, wanted
from isouq.gradients import NotCovered, squared_norms
from toy import N_WORDS, Toy, random_ids


def test_7_frozen_parameters_count():
    model = Toy()
    ids = random_ids(3, 8)
    right = wanted(model, tokens(model, ids), 3)
    model.hidden.requires_grad_(False)
    model.embed.requires_grad_(False)
    for engine in ("ghost", "autograd"):
        assert_same(squared_norms(model, tokens(model, ids), 3, engine=engine), right)
    assert [p.requires_grad for p in model.parameters()] == [False, False, False, True]


class Packed(nn.Module):
    """A weight stored as integers with a scale, as quantised checkpoints are."""

    def __init__(self, dtype):
        super().__init__()
        self.packed = nn.Parameter((10 * torch.randn(8, 8)).to(dtype), requires_grad=False)

    def forward(self, x):
        return x @ (self.packed.double() / 10)


@pytest.mark.parametrize("engine", ["auto", "ghost", "autograd"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_7_quantised_parameters_are_refused_by_name(dtype, engine):
    model = Toy()
    model.hidden = Packed(dtype)
    with pytest.raises(ValueError, match=r"quantised.*hidden\.packed.*load it in float32"):
        squared_norms(model, tokens(model, random_ids(3, 8)), 3, engine=engine)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_7_dynamically_quantised_modules_are_refused_by_name():
    """Their weight is no parameter at all, so a count of parameters would not miss it."""
    model = Toy()
    model.hidden = torch.ao.nn.quantized.dynamic.Linear(8, 8)
    with pytest.raises(ValueError, match=r"quantised.*hidden \(Linear\)"):
        squared_norms(model, tokens(model, random_ids(3, 8)), 3)


class OddLinear(nn.Linear):
    """A subclass that is not what its name says."""

    def forward(self, input, scale=1.0):
        return F.linear(input * scale, self.weight) * self.bias + super().forward(input).tanh()


class OddUse(Toy):
    def __init__(self, way):
        super().__init__()
        self.way = way
        self.hidden = OddLinear(8, 8) if way in ("subclassed", "by keyword") else nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)

    def body(self, x):
        w = self.hidden.weight
        if self.way == "subclassed":
            return self.hidden(x)
        if self.way == "by keyword":
            return self.hidden(scale=2.0, input=x)
        if self.way == "outside its module":
            return x @ w.T + F.linear(x, w, self.hidden.bias)
        if self.way == "and elementwise":
            return self.hidden(x) * w.diagonal()
        if self.way == "scaled":
            return F.linear(x, 0.5 * w)
        if self.way == "on the left":
            return (w @ x.transpose(1, 2)).transpose(1, 2)
        if self.way == "by einsum":
            return torch.einsum("ntd,ed->nte", x, w)
        if self.way == "joined to another":
            return F.linear(x, torch.cat([w, self.idle.weight])).unflatten(2, (2, 8)).sum(2)
        if self.way == "times another":
            return F.linear(x, w @ self.idle.weight)
        assert self.way == "for a fixed table"
        return x * torch.tanh(self.hidden(torch.linspace(0, 1, 8)))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "way",
    [
        "subclassed",
        "by keyword",
        "outside its module",
        "and elementwise",
        "scaled",
        "on the left",
        "by einsum",
        "joined to another",
        "times another",
        "for a fixed table",
    ],
)
def test_7_odd_uses_of_a_weight_are_exact_or_refused(way, n):
    model = OddUse(way)
    covered = is_exact(model, tokens(model, random_ids(n, 8)), n)
    if way in ("subclassed", "by keyword", "outside its module", "on the left"):
        assert covered


class Hiding(torch.autograd.Function):
    """Runs a module's own backward pass inside, so that its parameters are not in the outer graph."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.module(x), grad)
        return x.grad, None


class Hidden(Toy):
    def body(self, x):
        return Hiding.apply(x, super().body)


def test_7_parameters_hidden_in_a_custom_function_are_refused():
    torch.manual_seed(1)
    plain, model = Toy(), Hidden()
    model.load_state_dict(plain.state_dict())
    ids = random_ids(3, 8)
    right = wanted(plain, tokens(plain, ids), 3)
    for engine in ("auto", "autograd"):
        assert_same(squared_norms(model, tokens(model, ids), 3, engine=engine), right)
    with pytest.raises(NotCovered, match=r"hidden\.weight gathers a gradient inside HidingBackward"):
        squared_norms(model, tokens(model, ids), 3, engine="ghost")


class Lora(nn.Module):
    """A frozen base layer and a low-rank addition, as PEFT writes it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
def test_7_adapters_add_to_the_frozen_base_or_are_scored_alone(engine):
    model = Toy()
    model.hidden = Lora(model.hidden)
    ids = random_ids(3, 8)
    everything = squared_norms(model, tokens(model, ids), 3, engine=engine)
    model.requires_grad_(True)
    right = wanted(model, tokens(model, ids), 3)
    assert_same(everything, right)
    adapters = squared_norms(model, tokens(model, ids), 3, engine=engine, parameters=["*lora_*"])
    assert adapters.names == ("hidden.lora_A.weight", "hidden.lora_B.weight")
    assert adapters.n_parameters == 2 * 2 * 8
    assert_same(adapters, right[..., [everything.names.index(n) for n in adapters.names]])


def test_7_adapters_on_a_quantised_base_are_refused_only_where_the_base_is_asked_for():
    model = Toy()
    model.hidden = Lora(model.hidden)
    model.hidden.base_layer = Packed(torch.int8)
    objective = tokens(model, random_ids(3, 8))
    with pytest.raises(ValueError, match="quantised"):
        squared_norms(model, objective, 3)
    ghost, autograd = (
        squared_norms(model, objective, 3, engine=e, parameters=["*lora_*"]) for e in ("ghost", "autograd")
    )
    assert_same(ghost, autograd.by_parameter)


@pytest.mark.parametrize("n", [1, 3])
def test_7_the_padding_index_of_an_embedding_gathers_no_gradient(n):
    model = Toy()
    model.embed = nn.Embedding(N_WORDS, 8, padding_idx=-2)
    ids = random_ids(n, 8)
    ids[:, 2:4] = N_WORDS - 2
    assert is_exact(model, tokens(model, ids), n)
    counted = wanted(model, tokens(model, ids), n)
    model.embed.padding_idx = None
    assert not torch.allclose(wanted(model, tokens(model, ids), n), counted)


def test_7_a_sparse_embedding():
    model = Toy()
    right = wanted(model, tokens(model, ids := random_ids(3, 8)), 3)
    model.embed.sparse = True
    for engine in ("ghost", "autograd"):
        assert_same(squared_norms(model, tokens(model, ids), 3, engine=engine), right)


def test_7_an_embedding_scaled_by_frequency_is_refused():
    model = Toy()
    model.embed.scale_grad_by_freq = True
    assert not is_exact(model, tokens(model, random_ids(3, 8)), 3)


def test_7_a_tensor_outside_the_model_is_refused_and_its_gradient_left_alone():
    outside = torch.randn(8, requires_grad=True)

    class Prompted(Toy):
        def embedded(self, ids):
            return self.embed(ids) + outside

    model = Prompted()
    assert not is_exact(model, tokens(model, random_ids(3, 8)), 3)
    assert outside.grad is None


@pytest.mark.parametrize("engine", ["auto", "ghost", "autograd"])
def test_7_an_output_without_a_gradient_is_an_error_and_no_score(engine):
    model = Toy()
    objective = tokens(model, random_ids(3, 8))
    with pytest.raises(ValueError, match="carries no gradient"):
        squared_norms(model, lambda rows: objective(rows).detach(), 3, engine=engine)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        squared_norms(model, objective, 3, engine=engine)
    with torch.no_grad():  # is lifted: the estimate needs gradients, whoever calls it
        assert (squared_norms(model, objective, 3, engine=engine).total > 0).all()


@pytest.mark.parametrize("engine", ["auto", "ghost", "autograd"])
def test_7_a_gradient_that_is_not_a_number_is_an_error_and_no_score(engine):
    class Edge(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)

        def forward(self, x):
            return self.second(self.first(x).abs().sqrt())

    model = Edge()
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"first\.weight is NaN or infinite for example 1"):
        squared_norms(model, classes(model, x), 2, engine=engine)
