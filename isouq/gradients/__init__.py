"""Squared gradient norms per example: `squared_norms` with a fast exact engine and the reference that checks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from isouq.gradients import autograd, ghost
from isouq.gradients.checks import ExampleError
from isouq.gradients.common import Objective, SquaredNorms, select_parameters
from isouq.gradients.graph import NotCovered

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
    """‖∇θ objective[i, k]‖² per example i and column k, over all parameters or those whose names match `parameters`.

    `objective` maps a slice of the batch's rows to scalars (example, objective), freshly computed by `model`.
    engine "ghost" is exact or raises NotCovered; "autograd" goes one example at a time; "auto" is ghost, and autograd
    where ghost does not cover the model. `apart` says that whatever `objective` does around the model treats examples
    apart, so that for a model known to do so nothing has to be compared (`isolation`). `rows` are the examples' places
    in the caller's order, for errors. Raises ValueError for an unknown engine and as `select_parameters`, ExampleError
    for a gradient that is not finite.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine: {engine!r} given, one of {', '.join(get_args(Engine))} wanted")
    chosen = select_parameters(model, parameters)
    if engine != "autograd":
        try:
            return _finite(ghost.squared_norms(model, objective, n_examples, parameters=chosen, apart=apart), rows)
        except NotCovered:
            if engine == "ghost":
                raise
    return _finite(autograd.squared_norms(model, objective, n_examples, parameters=chosen), rows)


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
