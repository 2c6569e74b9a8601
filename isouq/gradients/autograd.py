"""The reference engine: one example at a time through an ordinary backward pass. Slow, short, and never wrong.

Each parameter's gradient is squared and dropped as soon as it is complete, so the peak of memory above the model's
is its largest parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isouq.gradients.common import Objective, SquaredNorms, differentiable


def squared_norms(
    model: nn.Module, objective: Objective, n_examples: int, *, parameters: dict[str, nn.Parameter]
) -> SquaredNorms:
    """‖∇θ objective[i, k]‖² for every example i and column k, over `parameters` (name → tensor)."""
    rows, found = [], []
    with differentiable(model, parameters):
        for i in range(n_examples):
            values = objective(slice(i, i + 1))[0]
            found.append(values.detach().double().cpu())
            rows.append(torch.stack([_one(values, k, parameters) for k in range(len(values))]))
    return SquaredNorms(
        torch.stack(found),
        torch.stack(rows),
        tuple(parameters),
        "autograd",
        sum(p.numel() for p in parameters.values()),
    )


def _one(values: Tensor, k: int, parameters: dict[str, nn.Parameter]) -> Tensor:
    """The squared norm of the gradient of values[k], by parameter: (param,) float64."""
    squares = torch.zeros(len(parameters), dtype=torch.float64)
    saved = {name: p.grad for name, p in parameters.items()}

    def square(place: int):
        def hook(p: Tensor) -> None:
            norm = torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.dtype, torch.float32))
            squares[place] = norm.double().square()
            p.grad = None

        return hook

    for p in parameters.values():
        p.grad = None
    handles = [p.register_post_accumulate_grad_hook(square(i)) for i, p in enumerate(parameters.values())]
    try:
        if values.requires_grad:
            values[k].backward(retain_graph=k + 1 < len(values))
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.grad = saved[name]
    return squares


def gradient(value: Tensor, parameters: dict[str, nn.Parameter]) -> Tensor:
    """The gradient of one scalar over all `parameters`, flattened: (param,), at least float32, on the CPU."""
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters.values()))
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    parts = zip(parameters.values(), grads, strict=True)
    flat = [(torch.zeros_like(p) if g is None else g).flatten().cpu() for p, g in parts]
    return torch.cat([part if part.dtype == torch.float64 else part.float() for part in flat])
