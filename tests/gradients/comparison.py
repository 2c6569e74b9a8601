"""An engine beside plain autograd on a toy: the same, or refused by name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from closeness import RELATIVE, assert_close
from isouq.gradients import NotCovered, SquaredNorms, squared_norms

Objective = Callable[[slice], Tensor]


def tokens(model: nn.Module, ids: Tensor, n_answer: int = 3) -> Objective:
    """S of the last `n_answer` ids of each row."""

    def objective(rows: slice) -> Tensor:
        log_p = model(ids[rows, :-1]).log_softmax(-1).gather(2, ids[rows, 1:, None])[..., 0]
        return log_p[:, -n_answer:].sum(1, keepdim=True)

    return objective


def classes(model: nn.Module, inputs: Tensor) -> Objective:
    """log p of the first class, and of the second."""
    return lambda rows: model(inputs[rows]).log_softmax(-1)[:, :2]


def wanted(model: nn.Module, objective: Objective, n: int) -> Tensor:
    """‖∇‖² by plain autograd, one example at a time: (example, objective, param)."""
    parameters = list(model.parameters())
    rows = []
    for i in range(n):
        values = objective(slice(i, i + 1))[0]
        rows.append(torch.stack([_squares(value, parameters) for value in values]))
    return torch.stack(rows)


def _squares(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.stack([torch.zeros(()).double() if g is None else g.double().square().sum() for g in grads])


def assert_same(norms: SquaredNorms, reference: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """The totals, and each parameter's part: relative to itself and to a millionth of the total."""
    assert norms.by_parameter.shape == reference.shape
    assert_close(norms.total, reference.sum(-1), dtype)
    error = (norms.by_parameter - reference).abs() / (reference + 1e-6 * reference.sum(-1, keepdim=True))
    assert error.max() <= RELATIVE[dtype], f"{norms.names[int(error.amax((0, 1)).argmax())]}: {error.max():.1e}"


def is_exact(model: nn.Module, objective: Objective, n: int, dtype: torch.dtype = torch.float64) -> bool:
    """True where ghost takes the batch together, False where it refuses or goes one at a time; fails where a number is
    wrong, also of `auto`."""
    reference = wanted(model, objective, n)
    assert_same(squared_norms(model, objective, n), reference, dtype)
    try:
        norms = squared_norms(model, objective, n, engine="ghost")
    except NotCovered:
        return False
    assert_same(norms, reference, dtype)
    assert norms.engine in ("ghost", "ghost, one at a time")
    return norms.engine == "ghost"
