"""The reference engine: one example at a time through an ordinary backward pass, slow and short; and the result's type.

Each parameter's gradient is squared and dropped as soon as it is complete, so the memory needed beyond the model's own
is that of its largest parameter.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isouq.gradients.graph import Graph
from isouq.gradients.model import Tracked, check_differentiable, differentiable
from isouq.gradients.torch_contract import is_custom

Objective = Callable[[slice], Tensor]
"""Rows of a batch → scalars to differentiate, (example, objective): S, the tokens' log p, or the classes'."""


class Examples(NamedTuple):
    """`n` examples and the function that gives the scalars of any slice of them."""

    objective: Objective
    n: int

    def values(self) -> Tensor:
        """The scalars to differentiate, (example, objective), freshly computed. Raises ValueError without a graph."""
        values = self.objective(slice(0, self.n))
        check_differentiable(values)
        return values

    def singly(self) -> Sequence[Examples]:
        """Each example by itself."""
        return [Examples(lambda _, i=i: self.objective(slice(i, i + 1)), 1) for i in range(self.n)]  # type: ignore[misc]


@dataclass(frozen=True)
class SquaredNorms:
    """The values that were differentiated and their squared gradient norms.

    `objective` (example, objective) float64 holds the values, `by_parameter` (example, objective, param) float64 their
    ‖∇θ‖², `names` the parameters' names, `n_parameters` how many numbers these hold.
    """

    objective: Tensor
    by_parameter: Tensor
    names: tuple[str, ...]
    engine: str
    n_parameters: int

    @classmethod
    def joined(cls, parts: Sequence[SquaredNorms], order: Tensor | slice = slice(None)) -> SquaredNorms:
        """The parts' examples in sequence, then put in `order`; zeros where a part has fewer objectives."""
        width = max(part.objective.shape[1] for part in parts)
        missing = [width - part.objective.shape[1] for part in parts]
        objective = [F.pad(part.objective, (0, n)) for part, n in zip(parts, missing, strict=True)]
        squares = [F.pad(part.by_parameter, (0, 0, 0, n)) for part, n in zip(parts, missing, strict=True)]
        engine = "+".join(sorted({part.engine for part in parts}))
        joined = {"objective": torch.cat(objective)[order], "by_parameter": torch.cat(squares)[order]}
        return replace(parts[0], engine=engine, **joined)  # type: ignore[arg-type]

    def columns(self, which: slice) -> SquaredNorms:
        """The same for some of the objectives."""
        return replace(self, objective=self.objective[:, which], by_parameter=self.by_parameter[:, which])

    @property
    def total(self) -> Tensor:
        """The sum over parameters, (example, objective) float64."""
        return self.by_parameter.sum(-1)


def squared_norms(model: nn.Module, examples: Examples, parameters: dict[str, nn.Parameter]) -> SquaredNorms:
    """‖∇θ objective[i, k]‖² for every example i and column k, over `parameters` (name → tensor)."""
    rows, objectives = [], []
    for example in examples.singly():
        with differentiable(model, parameters) as tracked:
            values = example.values()[0]
            objectives.append(values.detach().double().cpu())
            rows.append(torch.stack([_one(values, k, tracked) for k in range(len(values))]))
    n_parameters = sum(p.numel() for p in parameters.values())
    return SquaredNorms(torch.stack(objectives), torch.stack(rows), tuple(parameters), "autograd", n_parameters)


def _one(values: Tensor, k: int, tracked: Tracked) -> Tensor:
    """The squared norm of the gradient of values[k], by parameter: (param,) float64."""
    squares = {name: torch.zeros((), dtype=torch.float64) for name in tracked.parameters}
    copies = Counter(tracked.names[id(p)] for p in tracked.tensors)  # more than one where offloading tore a tie
    sums: dict[str, Tensor] = {}

    def square(p: Tensor, grad: Tensor) -> None:
        name = tracked.names[id(p)]
        if name not in squares:
            return
        grad = grad.to_dense() if grad.is_sparse else grad
        if copies[name] > 1:
            grad = sums[name] = grad + sums.get(name, 0)
        # Row by row: one float32 sum over a whole embedding would lose four digits.
        norms = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.promote_types(p.dtype, torch.float32))
        squares[name] = norms.double().square().sum().cpu()

    differentiate(values[k], tracked, square, retain=k + 1 < len(values))
    return torch.stack(list(squares.values()))


def differentiate(value: Tensor, tracked: Tracked, take: Callable[[Tensor, Tensor], None], *, retain: bool) -> None:
    """Call `take` with each parameter and its gradient as soon as it is complete, then let go of the gradient."""
    leaves = [p for p in tracked.tensors if p.requires_grad and p.is_leaf]
    graph = Graph(value)
    if any(is_custom(node) for node in graph.order):
        _accumulate(value, graph, leaves, take, retain)
        return

    def hook(p: Tensor, grad: Tensor) -> Tensor:
        take(p, grad)
        # Autograd holds what is returned until the end of the pass: a zero that takes no memory.
        return grad if grad.is_sparse else grad.new_zeros(()).expand_as(grad)

    with ExitStack() as hooks:
        for p in leaves:
            hooks.enter_context(p.register_hook(functools.partial(hook, p)))
        # Unlike backward(), this runs no hook of the owner's on an AccumulateGrad node and fills no .grad.
        torch.autograd.grad(value, leaves, retain_graph=retain, allow_unused=True)


def _accumulate(
    value: Tensor, graph: Graph, leaves: list[Tensor], take: Callable[[Tensor, Tensor], None], retain: bool
) -> None:
    """The same through .grad: a custom function (reentrant checkpointing) may deliver a gradient in parts, or refuse
    `torch.autograd.grad`."""
    with ExitStack() as undo:
        for leaf in graph.leaves.values():
            if all(leaf is not p for p in leaves):  # not a parameter: it keeps the gradient that its owner has on it
                undo.callback(setattr, leaf, "grad", leaf.grad)
                leaf.grad = None
        value.backward(retain_graph=retain)
    for p in leaves:
        if p.grad is not None:
            take(p, p.grad)
        p.grad = None


def gradient(value: Tensor, tracked: Tracked) -> Tensor:
    """The gradient of one scalar over all parameters, flattened: (param,), at least float32, on the CPU."""
    flat = {name: torch.zeros(p.numel()) for name, p in tracked.parameters.items()}

    def add(p: Tensor, grad: Tensor) -> None:
        name = tracked.names[id(p)]
        if name in flat:
            flat[name] = flat[name] + grad.to_dense().flatten().cpu()

    differentiate(value, tracked, add, retain=False)
    return torch.cat(list(flat.values()))
