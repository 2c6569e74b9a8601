"""Classifiers and regressors: closed forms at both ends of p, what does not change a score, what is refused by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isouq
from closeness import assert_close, assert_logs_close
from isouq.gradients import ExampleError

ENGINES = pytest.mark.parametrize("engine", ["ghost", "autograd"])


def network(n_classes: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, n_classes)).eval()


INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def loop(model: nn.Module, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """p and ‖∇p‖² of one class per example, p itself differentiated, one example at a time in float64."""
    model = network(model[-1].out_features).double()
    p, squares = [], []
    for x, c in zip(inputs.double(), target, strict=True):
        p.append(model(x[None]).softmax(1)[0, c])
        squares.append(sum(g.square().sum() for g in torch.autograd.grad(p[-1], list(model.parameters()))))
    return torch.stack(p).detach(), torch.stack(squares)


@ENGINES
@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_scores_are_those_of_the_plain_loop_whatever_the_batch(engine, batch_size):
    model, target = network(), torch.tensor([0, 1, 2, 1, 0])
    p, squares = loop(model, INPUTS, target)
    scores = isouq.score_classes(model, INPUTS, target, engine=engine, batch_size=batch_size)
    assert_close(scores.probability, p, torch.float32)
    assert_close(scores.aleatoric, p * (1 - p), torch.float32)
    assert_close(scores.epistemic, squares, torch.float32)
    assert_close(scores.log_gradient.exp(), squares / p.square(), torch.float32)
    assert scores.engine == engine
    assert scores.n_parameters == 67


def test_without_a_target_the_predicted_class_is_scored_and_all_gives_every_class():
    model = network()
    every = isouq.score_classes(model, INPUTS, "all")
    predicted = model(INPUTS).argmax(1)
    for name in ("log_prob", "aleatoric", "log_epistemic", "epistemic", "log_gradient", "n_tokens"):
        column = getattr(every, name)
        assert column.shape == (5, 3)
        for target in (None, predicted):
            one = getattr(isouq.score_classes(model, INPUTS, target), name)
            assert_close(one, column[torch.arange(5), predicted])
    assert_close(every.probability.sum(1), torch.ones(5))
    assert len(every) == 5


# ── Digits: logits (gap, 0, …, 0) as the bias of a layer on x = 1, whose gradient is twice that at the logits ─────────


def at_gap(gap: float, n_classes: int) -> nn.Module:
    model = nn.Linear(1, n_classes).eval()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
        model.bias[0] = gap
    return model


@ENGINES
@pytest.mark.parametrize("n_classes", [2, 3, 40])
@pytest.mark.parametrize("gap", [-800.0, -30.0, 0.0, 5.0, 12.0, 20.0, 27.5, 40.0, 100.0, 800.0])
def test_softmax_keeps_every_digit_at_both_ends(engine, n_classes, gap):
    """p = 1 / (1 + r) with r = (n − 1)e^−gap; ∇p at the logits: p(1 − p) at the first, −p(1 − p)/(n − 1) elsewhere."""
    log_r = torch.tensor(math.log(n_classes - 1) - gap, dtype=torch.float64)
    log_variance = F.logsigmoid(-log_r) + F.logsigmoid(log_r)
    log_square = math.log(2 * (1 + 1 / (n_classes - 1)))
    for target in (torch.tensor([0]), "all"):
        scores = isouq.score_classes(at_gap(gap, n_classes), torch.ones(1, 1), target, engine=engine)
        first = (0, 0) if target == "all" else 0
        assert_logs_close(scores.log_epistemic[first], 2 * log_variance + log_square, torch.float32)
        assert_logs_close(scores.log_gradient[first], log_square + 2 * F.logsigmoid(log_r), torch.float32)
        assert_close(scores.aleatoric[first], log_variance.exp(), torch.float32)
        assert not scores.aleatoric.signbit().any()
        assert not scores.log_gradient.isnan().any()


@ENGINES
@pytest.mark.parametrize("gap", [-800.0, -20.0, 0.0, 20.0, 27.5, 800.0])
def test_sigmoid_is_a_softmax_over_zero_and_the_logit(engine, gap):
    one, two = at_gap(gap, 1), at_gap(gap, 2)
    scores = isouq.score_classes(one, torch.ones(1, 1), "all", link="sigmoid", engine=engine)
    other = isouq.score_classes(two, torch.ones(1, 1), "all", engine=engine)
    assert_close(scores.aleatoric, other.aleatoric.flip(1))
    assert_logs_close(
        scores.log_epistemic + math.log(2), other.log_epistemic.flip(1), torch.float32
    )  # one logit moves, not two
    flat = isouq.score_classes(nn.Sequential(one, nn.Flatten(0)), torch.ones(1, 1), link="sigmoid", engine=engine)
    assert_close(flat.log_prob, scores.log_prob.amax(1))


# ── Regressors ───────────────────────────────────────────────────────────────────────────────────────────────────────


@ENGINES
def test_a_regressors_outputs_are_differentiated_themselves(engine):
    model = network(2)
    scores = isouq.score_outputs(model, INPUTS, noise_variance=0.3, engine=engine, batch_size=2)
    outputs = model(INPUTS)
    parameters = list(model.parameters())
    squares = [
        [sum(g.square().sum() for g in torch.autograd.grad(v, parameters, retain_graph=True)) for v in row]
        for row in outputs
    ]
    assert_close(scores.epistemic, torch.tensor(squares), torch.float32)
    assert_close(scores.mean, outputs.detach(), torch.float32)
    assert (scores.aleatoric == 0.3).all()
    one = isouq.score_outputs(nn.Sequential(network(1), nn.Flatten(0)), INPUTS, noise_variance=0.0)
    assert one.mean.shape == one.epistemic.shape == (5, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1", None, torch.ones(3)])
def test_a_noise_variance_is_a_finite_number(value, unchecked):
    with pytest.raises(ValueError, match=r"noise_variance: .* given, a finite number of at least 0 wanted"):
        isouq.score_outputs(network(), INPUTS, noise_variance=value)


# ── Inputs by name, engines that differ, bad input ───────────────────────────────────────────────────────────────────


class Named(nn.Module):
    """Takes its inputs by name, gives `.logits`; without a shift it has a form that ghost does not cover."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x, shift):
        logits = x @ self.w if shift.any() else torch.einsum("ni,ij->nj", x, self.w.tanh())
        return type("Output", (), {"logits": logits + shift})


def test_engines_that_differ_between_batches_are_both_named():
    shift = torch.zeros(5, 3).index_fill(0, torch.tensor([4]), 1.0)
    scores = isouq.score_classes(Named().eval(), {"x": INPUTS, "shift": shift}, batch_size=4)
    assert scores.engine == "autograd+ghost"


NAN = INPUTS.clone()
NAN[3] = math.nan
MISNAMED = torch.tensor([0, 1, 2, 9, 0])


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (INPUTS.tolist(), {}, TypeError, "inputs: list given, a tensor"),
        (torch.tensor(1.0), {}, TypeError, "inputs: Tensor given, a tensor"),
        (INPUTS.to_sparse(), {}, TypeError, r"inputs: Tensor given, a tensor \(example, …\), not sparse"),
        (INPUTS[:0], {}, ValueError, "inputs: no example given"),
        ({}, {}, ValueError, r"inputs: tensors of lengths \[\] given, one length wanted"),
        ({"a": INPUTS, "b": INPUTS[1:]}, {}, ValueError, r"inputs: tensors of lengths \[5, 4\] given"),
        (INPUTS.double(), {}, ValueError, r"inputs: \(2, 4\) torch\.float64 given, which the model does not take"),
        (INPUTS[:, 1:], {}, ValueError, r"inputs: \(2, 3\) torch\.float32 given, which the model does not take"),
        (NAN, {}, ExampleError, "model: NaN or infinite output for example 3, finite ones wanted"),
        (INPUTS, {"target": MISNAMED}, ExampleError, "target: class 9 given for example 3, 0 to 2 wanted"),
        (INPUTS, {"target": [0, 1, 2, 0, 0]}, TypeError, "target: list given, a tensor"),
        (INPUTS, {"target": torch.ones(5).bool()}, ValueError, r"target: .* torch\.bool given, \(5,\) int64 wanted"),
        (INPUTS, {"target": torch.zeros(4).long()}, ValueError, r"target: shape \(4,\)"),
        (INPUTS, {"target": "first"}, ValueError, "target: 'first' given"),
        (INPUTS, {"link": "probit"}, ValueError, "link: 'probit' given"),
        (INPUTS, {"link": "sigmoid"}, ValueError, "link: 'sigmoid' given for 3 logits an example, one wanted"),
        (INPUTS, {"batch_size": 0}, ValueError, "batch_size: 0 given"),
        (INPUTS, {"parameters": []}, ValueError, r"parameters: \[\] asked for, .* None means all"),
        (INPUTS, {"parameters": "0.weight"}, TypeError, "parameters: '0.weight' given, a list"),
        (INPUTS, {"parameters": 3}, TypeError, "parameters: 3 given, a list of name patterns or None wanted"),
        (INPUTS, {"parameters": [3]}, TypeError, r"parameters: \[3\] given, a list of name patterns"),
        ({"x": INPUTS}, {}, TypeError, r"inputs: \(2, 4\) .* does not take: .*unexpected keyword argument 'x'"),
    ],
)
def test_bad_input_is_refused_by_name(inputs, options, error, message, unchecked):
    with pytest.raises(error, match=message):
        isouq.score_classes(network(), inputs, **{"batch_size": 2, **options})


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.ModuleList([nn.Linear(4, 3)]), ValueError, "missing the required .forward. function"),
        (nn.Bilinear(4, 4, 3), TypeError, "missing 1 required positional argument: 'input2'"),
    ],
)
def test_a_model_that_takes_other_arguments_is_refused_by_name(model, error, message):
    with pytest.raises(
        error, match=rf"inputs: \(5, 4\) torch\.float32 given, which the model does not take: .*{message}"
    ):
        isouq.score_classes(model, INPUTS)


@ENGINES
def test_a_model_that_changes_its_input_in_place_gets_a_copy_and_no_graph_leads_on_from_it(engine):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2).tanh())

    model, x, plain = Scaled(4, 3), INPUTS.clone().requires_grad_() * 1, nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    right = isouq.score_classes(plain, (2 * INPUTS).tanh())
    scores = isouq.score_classes(model, x, engine=engine, batch_size=2)
    assert_close(scores.log_epistemic, right.log_epistemic, torch.float32)
    assert torch.equal(x, INPUTS)
    assert scores.engine == engine


def test_a_gradient_that_is_not_finite_names_the_callers_example():
    class Root(nn.Linear):
        def forward(self, x):
            return super().forward(x).abs().sqrt()

    model = Root(2, 3, bias=False)
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0]])
    with pytest.raises(ExampleError, match="weight is NaN or infinite for example 2, finite ones wanted") as caught:
        isouq.score_classes(model, x, batch_size=2)
    assert caught.value.example == 2
    assert "for row 7, finite" in caught.value.about("row 7")


@pytest.mark.parametrize("shape", [(5, 3, 2), (1, 3), (5, 0), (5, 3)])
def test_an_output_of_another_shape_or_complex_is_refused(shape):
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum() * torch.ones(shape, dtype=torch.complex64 if shape == (5, 3) else None)

    with pytest.raises(ValueError, match=r"model: output .* of 5 examples given, a tensor \(example, class\)"):
        isouq.score_classes(Odd(4, 3), INPUTS)
