"""The reference engine beside plain autograd, and what it and the fast engine leave behind."""

import doctest
import functools
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from closeness import assert_close
from comparison import assert_same, classes, wanted
from isouq import gradients
from isouq.gradients import NotCovered, autograd, squared_norms


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


@pytest.fixture
def inputs():
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_reference_is_plain_autograd(model, inputs):
    norms = squared_norms(model, classes(model, inputs), 5, engine="autograd")
    assert norms.engine == "autograd"
    assert norms.names == tuple(name for name, _ in model.named_parameters())
    assert norms.n_parameters == sum(p.numel() for p in model.parameters())
    assert_close(norms.objective, model(inputs).log_softmax(-1)[:, :2].detach())
    assert_same(norms, wanted(model, classes(model, inputs), 5))


def test_the_example_in_the_docstring_runs():
    results = doctest.testmod(gradients)
    assert results.attempted
    assert not results.failed


def test_reference_sees_one_example_at_a_time(model, inputs):
    seen = []
    objective = classes(model, inputs)

    def watched(rows):
        seen.append((rows.start, rows.stop))
        return objective(rows)

    squared_norms(model, watched, 5, engine="autograd")
    assert seen == [(i, i + 1) for i in range(5)]


def test_reference_holds_one_gradient_at_a_time(model, inputs, monkeypatch):
    """Its peak of memory is the largest parameter: when one gradient is complete, all earlier ones are gone."""
    held, plain = [], autograd.differentiate

    def watched(value, tracked, take, *, retain):
        alive = weakref.WeakSet()

        def counted(p, grad):
            alive.add(grad.untyped_storage())
            held.append(sum(storage.nbytes() > 8 for storage in alive))
            take(p, grad)

        plain(value, tracked, counted, retain=retain)

    monkeypatch.setattr(autograd, "differentiate", watched)
    squared_norms(model, classes(model, inputs), 5, engine="autograd")
    assert len(held) == 5 * 2 * len(list(model.parameters()))
    assert max(held) == 1


def test_a_weight_in_half_precision_is_squared_in_float32():
    """Squares of small gradients underflow in float16: 1e-4² is 0 there."""
    layer = nn.Linear(4, 2, bias=False).half()
    x = torch.full((1, 4), 1e-4, dtype=torch.float16)
    for engine in ("autograd", "ghost"):
        norms = squared_norms(layer, lambda rows: layer(x[rows])[:, :1], 1, engine=engine)
        assert_close(norms.total, torch.tensor([[4 * x[0, 0].double().square()]]), torch.float32)


@pytest.mark.parametrize("engine", ["autograd", "ghost"])
def test_a_large_weight_loses_no_digits_in_the_sum_of_squares(engine):
    """One float32 sum over 4 million squares would be wrong in the fourth digit."""
    torch.manual_seed(0)
    layer, x = nn.Linear(2000, 2000, bias=False), torch.rand(1, 3, 2000)
    norms = squared_norms(layer, lambda rows: layer(x[rows]).sum((1, 2))[:, None], 1, engine=engine)
    assert_close(norms.total, 2000 * x.double().sum(1).square().sum(1, keepdim=True), torch.float32)


# ── Properties of both engines ─────────────────────────────────────────────────────────────────────────────────

ENGINES = pytest.mark.parametrize("engine", ["ghost", "autograd"])


@ENGINES
def test_linear_softmax_in_closed_form(engine):
    """p = softmax(Wx + b): ‖∇ log p_c‖² = ‖e_c − p‖²·(‖x‖² + 1)."""
    layer = nn.Linear(4, 3).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    norms = squared_norms(layer, lambda rows: layer(x[rows]).log_softmax(-1), 6, engine=engine)
    p = layer(x).softmax(-1).detach()
    residual = (torch.eye(3) - p[:, None]).square().sum(-1)
    assert_close(norms.total, residual * (x.square().sum(1, keepdim=True) + 1))
    assert_close(norms.by_parameter[..., 1], residual)


@ENGINES
def test_a_multiple_of_the_objective_multiplies_the_norm_by_its_square(model, inputs, engine):
    objective = classes(model, inputs)
    once = squared_norms(model, objective, 5, engine=engine).by_parameter
    scaled = squared_norms(model, lambda rows: -3 * objective(rows), 5, engine=engine).by_parameter
    assert_close(scaled, 9 * once)


@ENGINES
def test_the_order_of_the_batch_is_that_of_the_result(model, inputs, engine):
    order = torch.tensor([3, 0, 4, 2, 1])
    once = squared_norms(model, classes(model, inputs), 5, engine=engine).by_parameter
    assert_close(squared_norms(model, classes(model, inputs[order]), 5, engine=engine).by_parameter, once[order])


@ENGINES
@pytest.mark.parametrize("patterns", [["3.*"], ["*.bias"], ["0.weight", "5.*"], ["1.*"]])
def test_a_subset_of_parameters_is_the_same_part_of_the_whole(model, inputs, engine, patterns):
    whole = squared_norms(model, classes(model, inputs), 5, engine="autograd")
    part = squared_norms(model, classes(model, inputs), 5, engine=engine, parameters=patterns)
    places = [whole.names.index(name) for name in part.names]
    assert 0 < len(places) < len(whole.names)
    assert part.n_parameters == sum(p.numel() for n, p in model.named_parameters() if n in part.names)
    assert_close(part.by_parameter, whole.by_parameter[..., places])


@ENGINES
def test_parameters_that_take_no_part_have_gradient_zero(model, inputs, engine):
    both = nn.ModuleDict({"used": model, "idle": nn.Linear(3, 3)})
    norms = squared_norms(both, classes(model, inputs), 5, engine=engine, parameters=["idle.*"])
    assert (norms.by_parameter == 0).all()


@ENGINES
def test_columns_are_differentiated_apart(model, inputs, engine):
    objective = classes(model, inputs)
    both = squared_norms(model, objective, 5, engine=engine)
    second = squared_norms(model, lambda rows: objective(rows)[:, 1:], 5, engine=engine)
    assert_close(both.columns(slice(1, 2)).total, second.total)


# ── The model is left as it was found ──────────────────────────────────────────────────────────────────────────


def state(model: nn.Module) -> dict:
    """All that a caller could miss: hooks, flags, gradients by identity and value, modes, weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {n: [len(getattr(m, h)) for h in hooks] for n, m in model.named_modules()},
        "tensor hooks": {
            n: [len(h or ()) for h in (p._backward_hooks, p._post_accumulate_grad_hooks)]
            for n, p in model.named_parameters()
        },
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "grad": {n: (id(p.grad), p.grad is not None and p.grad.tolist()) for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "weights": {n: (id(v), v.tolist()) for n, v in model.named_parameters()},
        "buffers": {n: v.tolist() for n, v in model.named_buffers()},
        "stores": {n: type(m._parameters) for n, m in model.named_modules()},
    }


class Stop(BaseException):
    """As KeyboardInterrupt: not an Exception."""


@pytest.fixture
def lived_in():
    """A model in use: one layer frozen, a gradient kept, a user's hooks, one module in another mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).eval()
    model[0].requires_grad_(False)
    model[4].weight.grad = torch.ones(3, 6)
    model[3].register_forward_hook(lambda *_: None)
    model[4].weight.register_hook(lambda grad: None)
    model[3].train()
    return model


@pytest.mark.parametrize("engine", ["auto", "ghost", "autograd"])
@pytest.mark.parametrize(
    "end", ["a score", "an error before", "an error after", "an interrupt", "in the backward pass"]
)
def test_nothing_is_left_on_the_model(lived_in, engine, end):
    x = torch.randn(5, 4)
    before = state(lived_in)
    calls = []

    def objective(rows):
        calls.append(rows)
        if end == "an error before":
            raise ValueError("NaN logits")
        values = classes(lived_in, x)(rows)
        if end == "in the backward pass":
            values.register_hook(lambda _: (_ for _ in ()).throw(ZeroDivisionError("in the backward pass")))
        if end == "an error after":
            raise ValueError("NaN logits")
        if end == "an interrupt":
            raise Stop
        return values

    if end == "a score":
        assert (squared_norms(lived_in, objective, 5, engine=engine).total > 0).all()
    else:
        with pytest.raises((ValueError, Stop, ZeroDivisionError)):
            squared_norms(lived_in, objective, 5, engine=engine)
    assert calls
    assert state(lived_in) == before


def test_a_gradient_that_the_user_keeps_does_not_enter_the_score(lived_in):
    x = torch.randn(5, 4)
    with_grad = squared_norms(lived_in, classes(lived_in, x), 5, engine="autograd").total
    lived_in[4].weight.grad = None
    assert_close(squared_norms(lived_in, classes(lived_in, x), 5, engine="autograd").total, with_grad, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, r"engine: 'fast' given, one of auto, ghost, autograd wanted"),
        ({"parameters": ["head.*"]}, r"parameters: 'head\.\*' matches none of the model's, such as '0\.weight'"),
    ],
)
def test_what_is_asked_for_has_to_exist(model, inputs, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        squared_norms(model, classes(model, inputs), 5, **options)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameters"):
        squared_norms(nn.Tanh(), lambda rows: torch.zeros(1, 1), 1)


# ── What the owner has attached to the backward pass ───────────────────────────────────────────────────────────────


def on_the_gradient(m, fired):
    m[0].weight.register_hook(lambda g: fired.append(1) or g * 0)


def after_accumulation(m, fired):
    for p in m.parameters():
        p.register_post_accumulate_grad_hook(lambda p: fired.append(p.data.add_(1)))


def on_the_accumulator(m, fired):
    """As optimisers in the backward pass were written before there was a hook for it."""
    m.kept = [p.view_as(p).grad_fn.next_functions[0][0] for p in m.parameters()]
    for p, node in zip(m.parameters(), m.kept, strict=True):
        node.register_hook(lambda *_, p=p: fired.append(p.data.add_(1)))
        node.register_prehook(lambda *_: fired.append(1))


def on_a_module(m, fired):
    m[0].register_full_backward_hook(lambda _m, _in, out: fired.append(1) or tuple(g * 0 for g in _in if g is not None))
    m[2].register_full_backward_pre_hook(lambda _m, out: fired.append(1) or (2 * out[0],))


ATTACHED = [on_the_gradient, after_accumulation, on_the_accumulator, on_a_module]


@ENGINES
@pytest.mark.parametrize("attach", ATTACHED)
def test_what_the_owner_attached_is_neither_run_nor_lost(attach, engine):
    torch.manual_seed(0)
    model, x, fired = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval(), torch.randn(4, 5), []
    x = x.double()
    right = wanted(model, classes(model, x), 4)
    attach(model, fired)
    weights = [p.detach().clone() for p in model.parameters()]
    assert_same(squared_norms(model, classes(model, x), 4, engine=engine), right)
    assert not fired
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    model(x.requires_grad_()).sum().backward()
    assert fired, "it is there again afterwards"


@ENGINES
@pytest.mark.parametrize("name", ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"])
def test_a_hook_on_the_backward_pass_of_all_modules_is_neither_run_nor_lost(name, engine):
    model, x, fired = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(4, 5), []
    right = wanted(model, classes(model, x), 4)
    handle = getattr(nn.modules.module, name)(
        lambda _, *grads: fired.append(1) or tuple(None if grad is None else 2 * grad for grad in grads[0])
    )
    try:
        norms = squared_norms(model, classes(model, x), 4, engine=engine)
        assert not fired
        model(x.requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert_same(norms, right, torch.float32)
    assert fired, "it is there again afterwards"


@pytest.mark.parametrize("attach", [on_the_gradient, after_accumulation])
def test_a_recomputing_function_runs_nothing_of_the_owners_either(attach):
    model, x, fired = Recomputed("by .backward()").eval(), torch.randn(3, 5), []
    plain = Recomputed("plainly").eval()
    right = wanted(plain, classes(plain, x), 3)
    attach([model.block] if attach is on_the_gradient else model, fired)
    assert_same(squared_norms(model, classes(model, x), 3), right, torch.float32)
    assert not fired


class Recompute(torch.autograd.Function):
    """A user's own checkpointing: the function is run anew in the backward pass, its parameters no inputs of this."""

    @staticmethod
    def forward(ctx, x, function, by):
        ctx.function, ctx.by = function, by
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            out = ctx.function(x)
        if ctx.by == "by .backward()":
            torch.autograd.backward(out, grad)
            return x.grad, None, None
        parameters = list(ctx.function.__self__.block.parameters())
        norms, *rest = torch.autograd.grad(out, [x, *parameters], grad)
        for p, g in zip(parameters, rest, strict=True):
            p.grad = g if p.grad is None else p.grad + g
        return norms, None, None


class Recomputed(nn.Module):
    """One block used plainly and again inside a recomputing function."""

    def __init__(self, way, *, hidden_only=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.block, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.way, self.hidden_only = way, hidden_only

    def again(self, x):
        return torch.tanh(self.block(x))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h if self.hidden_only else self.again(h)
        return self.head(self.again(h) if self.way == "plainly" else Recompute.apply(h, self.again, self.way))


@pytest.mark.parametrize("hidden_only", [False, True])
@pytest.mark.parametrize("way", ["by .backward()", "by hand"])
@pytest.mark.parametrize("parameters", [None, ["block.*"], ["head.*", "block.bias"]])
def test_uses_inside_a_function_of_the_users_count(way, hidden_only, parameters):
    model, x = Recomputed(way, hidden_only=hidden_only).eval(), torch.randn(3, 5)
    plain = Recomputed("plainly", hidden_only=hidden_only).eval()
    model.first.weight.grad = kept = torch.ones(8, 5)
    right = squared_norms(plain, classes(plain, x), 3, engine="autograd", parameters=parameters)
    assert_same(squared_norms(model, classes(model, x), 3, parameters=parameters), right.by_parameter, torch.float32)
    with pytest.raises(NotCovered, match="RecomputeBackward"):
        squared_norms(model, classes(model, x), 3, engine="ghost", parameters=parameters)
    assert model.first.weight.grad is kept
    assert all(p.grad is None for p in model.parameters() if p is not model.first.weight)


class Swish(torch.autograd.Function):
    """A function of the user's that reaches no parameter: it costs nothing to have it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * (s + x * s * (1 - s))


def test_a_function_that_reaches_no_parameter_stays_fast():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(Swish.apply(self.first(x)))

    model, x = Net().eval(), torch.randn(3, 5)
    norms = squared_norms(model, classes(model, x), 3, engine="ghost")
    assert_same(norms, wanted(model, classes(model, x), 3), torch.float32)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a layer", "a function", "after a call"])
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_a_compiled_model_is_scored_as_it_was_written(how, engine):
    """`aot_eager` compiles nothing but takes torch.compile's whole way, donated buffers and all."""
    torch.manual_seed(0)
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(3, 5)
    right = wanted(model, classes(model, x), 3)
    compiled = model
    if how in ("wrapped", "after a call"):
        compiled = compile_(model)
        if how == "after a call":
            compiled(x).sum().backward()
            model.zero_grad()
    elif how == "in place":
        model.compile(backend="aot_eager")
    elif how == "a layer":
        model[0] = compile_(model[0])
    else:
        own = compile_(lambda rows: model(rows))
        norms = squared_norms(model, lambda rows: own(x[rows]).log_softmax(-1)[:, :2], 3, engine=engine)
        assert_same(norms, right, torch.float32)
        return
    assert_same(squared_norms(compiled, classes(compiled, x), 3, engine=engine), right, torch.float32)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("before", ["nothing", "a pass", "a pass without gradients"])
def test_parametrised_weights_kept_by_the_caller_are_computed_anew(before, engine):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(3, 5)
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    right = wanted(model, classes(model, x), 3)
    with parametrize.cached():
        with torch.set_grad_enabled(before == "a pass"):
            kept = None if before == "nothing" else (model(x), model[0].weight)[1]
        assert_same(squared_norms(model, classes(model, x), 3, engine=engine), right, torch.float32)
        assert kept is None or model[0].weight is kept
