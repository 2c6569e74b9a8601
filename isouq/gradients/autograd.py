"""The reference engine: one example at a time through an ordinary backward pass. Slow, short, and never wrong.

Each parameter's gradient is squared and dropped as soon as it is complete, so the peak of memory above the model's is
its largest parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from isouq.gradients.common import Objective, SquaredNorms, Tracked, check_differentiable, differentiable
from isouq.gradients.graph import Graph, is_custom


def squared_norms(
    model: nn.Module, objective: Objective, n_examples: int, *, parameters: dict[str, nn.Parameter]
) -> SquaredNorms:
    """‖∇θ objective[i, k]‖² for every example i and column k, over `parameters` (name → tensor)."""
    rows, found = [], []
    for i in range(n_examples):
        with differentiable(model, parameters) as tracked:
            values = objective(slice(i, i + 1))[0]
            check_differentiable(values)
            found.append(values.detach().double().cpu())
            rows.append(torch.stack([_one(values, k, tracked) for k in range(len(values))]))
    n_parameters = sum(p.numel() for p in parameters.values())
    return SquaredNorms(torch.stack(found), torch.stack(rows), tuple(parameters), "autograd", n_parameters)


def _one(values: Tensor, k: int, tracked: Tracked) -> Tensor:
    """The squared norm of the gradient of values[k], by parameter: (param,) float64."""
    squares = {name: torch.zeros((), dtype=torch.float64) for name in tracked.parameters}
    copies = Counter(tracked.names[id(p)] for p in tracked.tensors)  # more than one where offloading tore a tie
    sums: dict[str, Tensor] = {}

    def square(p: Tensor) -> None:
        name, grad = tracked.names[id(p)], p.grad
        p.grad = None
        if name not in squares or grad is None:
            return
        grad = grad.to_dense() if grad.is_sparse else grad
        if copies[name] > 1:
            grad = sums[name] = grad + sums.get(name, 0)
        # Row by row: one float32 sum over a whole embedding would lose four digits.
        norms = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.promote_types(p.dtype, torch.float32))
        squares[name] = norms.double().square().sum().cpu()

    leaves = [p for p in tracked.tensors if p.requires_grad and p.is_leaf]
    with _gradients_set_aside(values, tracked) as graph:
        # A custom function (reentrant checkpointing) may bring a gradient in parts: then all are kept to the end.
        in_parts = any(is_custom(node) for node in graph.order)
        handles = [] if in_parts else [p.register_post_accumulate_grad_hook(square) for p in leaves]
        try:
            values[k].backward(retain_graph=k + 1 < len(values))
        finally:
            for handle in handles:
                handle.remove()
        for p in leaves if in_parts else ():
            square(p)
    return torch.stack(list(squares.values()))


@contextmanager
def _gradients_set_aside(values: Tensor, tracked: Tracked) -> Iterator[Graph]:
    """No .grad on anything that `values` depend on; what was there is put back, also after an error."""
    graph = Graph(values)
    outside = [leaf for _, leaf in graph.leaves() if id(leaf) not in tracked.names]
    kept = [(p, p.grad) for p in [*tracked.tensors, *outside]]
    for p, _ in kept:
        p.grad = None
    try:
        yield graph
    finally:
        for p, grad in kept:
            p.grad = grad


def gradient(value: Tensor, tracked: Tracked) -> Tensor:
    """The gradient of one scalar over all parameters, flattened: (param,), at least float32, on the CPU."""
    check_differentiable(value)
    flat = {name: torch.zeros(p.numel()) for name, p in tracked.parameters.items()}
    with _gradients_set_aside(value, tracked):
        value.backward()  # not autograd.grad, which reentrant checkpointing refuses
        for p in tracked.tensors:
            name = tracked.names[id(p)]
            if name in flat and p.grad is not None:
                flat[name] = flat[name] + p.grad.to_dense().flatten().cpu()
    return torch.cat(list(flat.values()))
