"""The ten traps of exact gradient norms, each with its tests: a score is right, or refused by name."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from architectures import COVERED, VOCAB, build, dtype_of, examples, upcasts_to
from closeness import assert_close, assert_logs_close
from comparison import assert_same, classes, is_exact, tokens, wanted
from reference import pad, score
from torch import nn
from torch.utils.checkpoint import checkpoint

import isouq
from isouq.causal_lm import score_aggregations
from isouq.gradients import NotCovered, squared_norms
from isouq.gradients.products import inner_products

N_WORDS = 11


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_ids(n: int, length: int) -> torch.Tensor:
    return torch.randint(0, N_WORDS, (n, length))


class Toy(nn.Module):
    """Embedding, a causal mixing of tokens, a hidden layer, a head; the tests below replace one part of it."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(N_WORDS, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, N_WORDS, bias=False)

    def embedded(self, ids):
        return self.embed(ids)

    def body(self, x):
        return torch.tanh(self.hidden(x))

    def forward(self, ids):
        x = self.embedded(ids)
        return self.head((x + self.body(x)).cumsum(1))


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
    found = isouq.score_tokens(model, *pad(case, "none"), engine=engine)
    assert found.log_prob.item() < -106
    assert found.log_prob.float().exp().square() == 0
    assert found.log_epistemic.isfinite().all()
    model = model.double()
    with upcasts_to(torch.float64):
        double = isouq.score_tokens(model, *pad(case, "none"), engine="autograd")
        reference = score(model, case).epistemic["sequence"]
    assert_close(found.log_epistemic, double.log_epistemic, torch.float32)
    if double.log_prob.item() > -340:
        assert_logs_close(double.log_epistemic, reference.log())
    else:
        assert reference == 0
        assert found.epistemic == 0


# ── 2. Tied weights ────────────────────────────────────────────────────────────────────────────────────────────


def test_2_tied_weights_need_their_cross_term():
    """Head and embedding summed as if they were two parameters would be wrong by more than 1 %."""
    tied, untied = build("llama", tied=True), build("llama", tied=False)
    untied.load_state_dict(tied.state_dict())
    case = examples((9, 5, 7), (3, 1, 2))
    with upcasts_to(torch.float64):
        right = score(tied, case).epistemic["sequence"]
        blind = score(untied, case).epistemic["sequence"]
        found = isouq.score_tokens(tied, *pad(case, "left"), engine="ghost")
    assert ((blind - right).abs() / right).max() > 0.01
    assert_logs_close(found.log_epistemic, right.log())
    assert found.n_parameters == sum(p.numel() for p in untied.parameters()) - VOCAB * 16


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


# ── 3. Gradient checkpointing ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_3_checkpointing_of_a_hub_model(name, reentrant):
    """Inert in eval mode; in training mode (here without dropout) it works, and ghost refuses."""
    off = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"), 0.0)
    model = build(name, tied=True, dtype=torch.float32, **(off if name == "gpt2" else {}))
    case = examples((7, 5), (3, 2))

    def found(engine):
        return isouq.score_tokens(model, *pad(case, "left"), engine=engine).log_epistemic

    right = score(model, case).epistemic["sequence"].log()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_logs_close(found("ghost"), right, torch.float32)
    model.train()
    for engine in ("auto", "autograd"):
        assert_logs_close(found(engine), right, torch.float32)
    with pytest.raises(NotCovered):
        found("ghost")
    assert model.training


class Checkpointed(Toy):
    def __init__(self, kind, *, repeats=1):
        super().__init__()
        self.kind, self.repeats = kind, repeats

    def body(self, x):
        for _ in range(self.repeats):
            if self.kind == "none":
                x = super().body(x)
            elif self.kind == "saved on the CPU":
                with torch.autograd.graph.save_on_cpu():
                    x = super().body(x)
            else:
                x = checkpoint(super().body, x, use_reentrant=self.kind == "reentrant")
        return x


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


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_3_every_parameter_is_counted_once(name):
    model = build(name, tied=True)
    case = examples((7, 5), (3, 2))
    with upcasts_to(torch.float64):
        for engine in ("ghost", "autograd"):
            found = isouq.score_tokens(model, *pad(case, "left"), engine=engine, breakdown=True)
            assert list(found.breakdown) == [n for n, _ in model.named_parameters()]
            assert_close(sum(part.exp() for part in found.breakdown.values()), found.epistemic)


# ── 4. Parameters broadcast over the batch ─────────────────────────────────────────────────────────────────────


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


class Broadcast(nn.Module):
    """Scalars, rows, columns and planes of parameters on a (example, 4, 3) value."""

    def __init__(self):
        super().__init__()
        shapes = ((), (3,), (4, 1), (4, 3), (1, 1, 3), (1, 4, 1))
        self.gains = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.shifts = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        for gain, shift in zip(self.gains, self.shifts, strict=True):
            x = gain * (1 + x.tanh()) + shift
        return self.head(x.mean(1))


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
        found = isouq.score_tokens(model, *pad(case, "left"), engine="ghost", breakdown=True)
    assert_logs_close(found.log_epistemic, right.log(), dtype)
    assert any("experts" in name for name in found.breakdown)


class RawExperts(nn.Module):
    """A mixture as the very first layer: nothing in the graph says whose rows an expert was given."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        rows = x.flatten(0, 1)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            mine = ((rows[:, 0] > 0) == bool(i)).nonzero()[:, 0]
            out = out.index_add(0, mine, rows[mine] @ expert)
        return self.head(out.view(x.shape).tanh().mean(1))


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


# ── 7. Coverage ────────────────────────────────────────────────────────────────────────────────────────────────


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
    with pytest.raises(NotCovered, match=r"hidden\.weight may be used inside HidingBackward"):
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


def test_7_an_idle_parameter_has_gradient_zero():
    model = Toy()
    model.idle = nn.Linear(3, 3)
    assert is_exact(model, tokens(model, random_ids(3, 8)), 3)


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


# ── 8. Padding, batch composition, dtype; examples that meet ───────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "mixtral"])
def test_8_a_score_depends_on_nothing_but_its_own_tokens(name, dtype):
    """Padding on either side, extra width, the order, the batch's size and company."""
    model = build(name, tied=True, dtype=dtype)
    case = examples((9, 5, 12, 7, 5), (3, 1, 2, 2, 4))
    order = [3, 0, 4, 2, 1]
    with upcasts_to(dtype):
        alone = [isouq.score_tokens(model, *pad([one], "none")).log_epistemic for one in case]
        ways = [pad(case, "left"), pad(case, "right"), pad(case, "turns", width=20)]
        found = [isouq.score_tokens(model, *way).log_epistemic for way in ways]
        found += [isouq.score_tokens(model, *ways[0], batch_size=size).log_epistemic for size in (1, 2, 3)]
        shuffled = isouq.score_tokens(model, *pad([case[i] for i in order], "left"))
    for scores in found:
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
        found = isouq.score_tokens(model.to(dtype), *batch, engine=engine)
        assert found.engine == engine
        assert_logs_close(found.log_epistemic, right, dtype)


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
def test_8_examples_that_meet_in_a_batch_are_refused(way):
    model = Meeting(way).eval()
    x = torch.randn(5, 4, 8)
    if way.startswith("batch norm"):
        assert is_exact(model, classes(model, x), 5)
        model.train()
        with pytest.raises(NotCovered):  # although the same model was fine in eval mode
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


class TokenMajor(nn.Module):
    """(token, example, feature) inside; `pool` reads the mean over tokens or the first token alone."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool
        self.first, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(torch.tanh(self.first(x.transpose(0, 1)))).tanh()
        return self.head(h.mean(0) if self.pool == "mean" else h[0])


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize(("n", "length"), [(3, 4), (4, 4), (2, 4), (1, 4), (4, 2)])
def test_8_a_token_major_model_is_exact_or_refused(pool, n, length):
    model = TokenMajor(pool)
    covered = is_exact(model, classes(model, torch.randn(n, length, 8)), n)
    assert n == 1 or not covered


@pytest.mark.parametrize(("n", "length"), [(1, 4), (3, 4), (4, 4), (2, 4)])
@pytest.mark.parametrize("layer", ["transformer", "lstm", "gru"])
def test_8_torch_layers_that_turn_the_batch_around_are_exact_or_refused(layer, n, length):
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
    is_exact(model, classes(model, torch.randn(n, length, 8)), n)


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


class Backwards(nn.Module):
    """Not causal: what pads a sequence on its right changes the logits on its left."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(N_WORDS, 8), nn.Linear(8, N_WORDS)

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        return type("Output", (), {"logits": self.head(x.cumsum(1) + x.mean(1, keepdim=True))})


def test_8_a_model_that_sees_the_padding_is_refused_and_auto_is_right():
    model = Backwards()
    case = [(random_ids(1, n)[0], 2) for n in (5, 9, 7)]
    with pytest.raises(NotCovered, match="padding"):
        isouq.score_tokens(model, *pad(case, "left"), engine="ghost")
    found = isouq.score_tokens(model, *pad(case, "left"))
    with pytest.raises(AssertionError):  # the reference sees the last token too, which isouq never feeds
        assert_logs_close(found.log_epistemic, score(model, case).epistemic["sequence"].log())
    alone = [isouq.score_tokens(model, *pad([one], "none"), engine="autograd").log_epistemic for one in case]
    assert_logs_close(found.log_epistemic, torch.cat(alone))


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
        ("raw experts", False),
        ("sorted", False),
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


# ── 10. Soft caps, scales, parallel residuals, fused projections, learned positions (9 is in test_causal_lm.py) ──


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
