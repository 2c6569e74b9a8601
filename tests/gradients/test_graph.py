"""What autograd's graph proves by itself: that the examples of a batch cannot meet."""

import pytest
import torch
from torch import nn

from isouq.gradients import squared_norms
from isouq.gradients.graph import Graph

N, WIDTH = 6, 6  # equal on purpose: an axis of features may be taken for that of the examples


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


class Between(nn.Module):
    """Something done to the (example, feature) values between two layers."""

    def __init__(self, what):
        super().__init__()
        self.first, self.what, self.last = nn.Linear(WIDTH, WIDTH), what, nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.last(self.what(self.first(x).tanh())).log_softmax(1)


APART = {
    "nothing": lambda h: h,
    "layer norm": nn.LayerNorm(WIDTH),
    "softmax over features": lambda h: h.softmax(1),
    "mean over features": lambda h: h - h.mean(1, keepdim=True),
    "tokens flattened into rows": lambda h: nn.functional.linear(h.view(2 * N, 3), torch.eye(3)).view(N, WIDTH),
    "a mask": lambda h: h * torch.eye(N),
}
TOGETHER = {
    "transposed": lambda h: h.T,
    "batch mean": lambda h: h - h.mean(0),
    "batch mean kept": lambda h: h - h.mean(0, keepdim=True),
    "softmax over examples": lambda h: h.softmax(0),
    "rolled": lambda h: h.roll(1, 0),
    "picked": lambda h: h[torch.randperm(N)],
    "gathered": lambda h: h.gather(0, torch.randint(N, (N, WIDTH))),
    "attention over examples": lambda h: (h @ h.T) @ h,
    "multiplied from the left": lambda h: torch.eye(N) @ h,
    "batch norm": nn.BatchNorm1d(WIDTH).train(),
    "outer sum": lambda h: (h[:, None] + h[None]).sum(1),
    "sorted": lambda h: h.sort(0).values,
    "cumulated": lambda h: h.cumsum(0),
}


@pytest.mark.parametrize("name", APART)
def test_row_by_row_operations_prove_that_examples_stay_apart(name):
    assert Graph(Between(APART[name])(torch.randn(N, WIDTH))).separates(N)


def test_a_convolutional_network_is_proved_too():
    assert Graph(convolutional()(torch.randn(N, 2, 6, 6))).separates(N)


@pytest.mark.parametrize("name", TOGETHER)
def test_nothing_is_proved_where_examples_meet_or_change_places(name):
    assert not Graph(Between(TOGETHER[name])(torch.randn(N, WIDTH))).separates(N)


@pytest.mark.parametrize("name", APART)
def test_what_is_proved_is_so(name):
    """The gradient of example i's output is zero at every other row of the input."""
    x = torch.randn(N, WIDTH, requires_grad=True)
    for i in range(N):
        (grad,) = torch.autograd.grad(Between(APART[name])(x)[i].sum(), x)
        assert not grad[torch.arange(N) != i].any()


@pytest.mark.parametrize(("what", "passes"), [("nothing", 1), ("batch mean", None)])
def test_a_proved_network_costs_one_forward_pass_a_batch_once_it_has_been_tried(what, passes):
    model, count = Between({**APART, **TOGETHER}[what]), []
    model.register_forward_hook(lambda *_: count.append(1))
    x = torch.randn(N, WIDTH)
    for _ in range(3):
        count.clear()
        engine = squared_norms(model, lambda rows: model(x[rows])[:, :1], N).engine
    assert engine == ("ghost" if passes else "autograd")
    if passes:
        assert len(count) == passes
