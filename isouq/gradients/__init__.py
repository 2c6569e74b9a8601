"""Squared gradient norms per example: `squared_norms`, with a fast exact engine and the reference that checks it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import nn

from isouq.gradients import autograd, isolation
from isouq.gradients.autograd import Examples, Objective, SquaredNorms
from isouq.gradients.model import ExampleError, select_parameters
from isouq.gradients.plan import planned
from isouq.gradients.torch_contract import NotCovered

Engine = Literal["auto", "ghost", "autograd"]

__all__ = ["Engine", "ExampleError", "NotCovered", "Objective", "SquaredNorms", "squared_norms"]


def squared_norms(
    model: nn.Module,
    objective: Objective,
    n_examples: int,
    *,
    engine: Engine = "auto",
    parameters: Sequence[str] | None = None,
    apart: bool = False,
    rows: Sequence[int] | None = None,
) -> SquaredNorms:
    """‖∇θ objective[i, k]‖² of every example i and column k; `model` is left as it was.

    `objective` takes a slice of the batch's `n_examples` rows and gives scalars (example, objective), freshly computed
    by `model`. `apart`: what it does around the model keeps examples apart; if the model's class is known to do so too,
    no example has to be compared with itself alone (`isolation`). Engine "ghost" is exact or raises NotCovered,
    "autograd" takes one example at a time, "auto" falls back to it where "ghost" refuses. `parameters` are name
    patterns, None for all. `rows`: the examples' places in the caller's order, for errors.

    Raises ValueError for an unknown engine and as `select_parameters`; NotCovered, which names the use of a parameter
    that has no rule; ExampleError for a gradient that is NaN or infinite.

    >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    >>> squared_norms(model, lambda rows: model(x[rows]), 2).total.flatten().tolist()  # ∇(w·x) = x
    [25.0, 5.0]
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine: {engine!r} given, one of {', '.join(get_args(Engine))} wanted")
    chosen, examples = select_parameters(model, parameters), Examples(objective, n_examples)
    if engine != "autograd":
        try:
            return _finite(_ghost(model, examples, chosen, apart), rows)
        except NotCovered:
            if engine == "ghost":
                raise
    return _finite(autograd.squared_norms(model, examples, chosen), rows)


def _ghost(model: nn.Module, examples: Examples, parameters: dict[str, nn.Parameter], apart: bool) -> SquaredNorms:
    """The fast engine: the whole batch at once, or one example at a time if that is refused (examples that mix)."""
    try:
        return _together(model, examples, parameters, apart)
    except NotCovered:
        if examples.n == 1:
            raise
    singles = [_together(model, single, parameters, apart) for single in examples.singly()]
    return replace(SquaredNorms.joined(singles), engine="ghost, one at a time")


def _together(model: nn.Module, examples: Examples, parameters: dict[str, nn.Parameter], apart: bool) -> SquaredNorms:
    """One forward pass, and one activation-gradient pass for each column of the objective."""
    with planned(model, examples, parameters) as plan:
        known = isolation.is_known(model, plan, apart=apart)
        last = plan.values.shape[1] - 1
        columns = [plan.squares(plan.values[:, k].sum(), retain=k < last or not known) for k in range(last + 1)]
        if not known:
            isolation.compare(plan, examples, columns[0])
        values = plan.values.detach().double().cpu()
    n_parameters = sum(p.numel() for p in parameters.values())
    return SquaredNorms(values, torch.stack(columns, 1), tuple(parameters), "ghost", n_parameters)


def _finite(norms: SquaredNorms, rows: Sequence[int] | None) -> SquaredNorms:
    wrong = (~norms.by_parameter.isfinite()).nonzero()
    if len(wrong):
        example, _, place = wrong[0].tolist()
        raise ExampleError(
            f"model: the gradient of {norms.names[place]} is NaN or infinite for {{}}, finite ones wanted; a model in "
            "float16 overflows where bfloat16 and float32 do not",
            example if rows is None else rows[example],
        )
    return norms
