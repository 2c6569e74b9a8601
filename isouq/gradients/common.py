"""What both engines share: the result, the choice of parameters, and leaving the model as it was."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Objective = Callable[[slice], Tensor]
"""Rows of a batch → scalars to differentiate, (example, objective): S, the tokens' log p, or the classes'."""


@dataclass(frozen=True)
class SquaredNorms:
    """What was differentiated, its squared gradient norms, and over which parameters.

    `objective` (example, objective) float64 holds the values themselves, `by_parameter` (example, objective, param)
    float64 their ‖∇θ‖², `names` the parameters, `n_parameters` how many numbers these are.
    """

    objective: Tensor
    by_parameter: Tensor
    names: tuple[str, ...]
    engine: str
    n_parameters: int

    def columns(self, which: slice) -> SquaredNorms:
        """The same for some of the objectives."""
        return replace(self, objective=self.objective[:, which], by_parameter=self.by_parameter[:, which])

    @property
    def total(self) -> Tensor:
        """The sum over parameters, (example, objective) float64."""
        return self.by_parameter.sum(-1)


def select_parameters(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The model's parameters by name, each once (a tied one under its first name), those that match `patterns` only.

    Raises ValueError for a pattern that matches nothing and for parameters that cannot carry a gradient (quantised).
    """
    every = dict(model.named_parameters())
    if not every:
        raise ValueError("model has no parameters to differentiate")
    for pattern in patterns or ():
        if not fnmatch.filter(every, pattern):
            raise ValueError(f"parameters: {pattern!r} matches none of the model's, such as {next(iter(every))!r}")
    chosen = {n: p for n, p in every.items() if patterns is None or any(fnmatch.fnmatch(n, q) for q in patterns)}
    _refuse_quantised(model, chosen)
    return chosen


def _refuse_quantised(model: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
    wrong = [f"{n} ({p.dtype})" for n, p in chosen.items() if not p.is_floating_point() or p.is_quantized]
    wrong += [
        f"{n} ({type(m).__name__})"
        for n, m in model.named_modules()
        if ".quantized" in type(m).__module__ or hasattr(m, "qweight")
    ]
    if wrong:
        raise ValueError(
            f"model has quantised parameters, whose gradient does not exist: {', '.join(wrong[:3])}"
            f"{' …' if len(wrong) > 3 else ''}; load it in float32, bfloat16 or float16"
        )


@contextmanager
def differentiable(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Let exactly `parameters` require a gradient, and put every flag back, also after an error."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    chosen = {id(p) for p in parameters.values()}
    try:
        for p, _ in flags:
            if p.is_floating_point():
                p.requires_grad_(id(p) in chosen)
        with torch.enable_grad():
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
