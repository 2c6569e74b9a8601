"""One rule per operation: from what autograd kept for it and the gradient at its output to the parameter's factor.

A rule is a pure function (use, grads) → factor or factors. A step is the way back through an operation on the
parameter alone (a transpose, a cast, 1 + w). To cover a new layer, add one function here, the attributes it reads to
`torch_contract.SAVED`, and one row to the table in tests/gradients/test_ghost.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isouq.gradients.factors import Dense, Factor, NoRule, Outer, Rows, wide
from isouq.gradients.graph import DATA_INPUT, Layout
from isouq.gradients.torch_contract import RESHAPES, Grads, Node, operation, output_shape, saved, saved_axes

Step = Callable[[Factor], Factor]


@dataclass(frozen=True, eq=False)
class Use:
    """One use of one parameter: `node` takes it at input `slot`, after the parameter-only `steps` (last one first).

    `shape` is that of the value at `slot`; `layout` is the batch's.
    """

    parameter: str
    node: Node
    slot: int
    steps: tuple[Step, ...]
    shape: tuple[int, ...]
    layout: Layout

    @property
    def rule(self) -> Rule | None:
        """The rule of the operation, None where there is none for a parameter at this input."""
        name = operation(self.node)
        return None if self.slot == 0 and name in INPUT_FIRST else RULES.get(name)

    @property
    def n_examples(self) -> int:
        """How many examples the batch has."""
        return self.layout.n_examples

    def saved(self, name: str) -> Any:
        """What the operation kept under `name`."""
        return saved(self.node, name)

    def factors(self, grads: Grads) -> list[Factor]:
        """The parameter's gradient through this use, from the gradient at the node's output. Raises NoRule."""
        assert self.rule is not None
        result = self.rule(self, grads)
        factors = result if isinstance(result, list) else [result]
        for back in self.steps:
            factors = [back(factor) for factor in factors]
        if any(len(factor) != self.n_examples for factor in factors):
            raise NoRule(f"meets a value in {self.node.name()} that is not laid out by example")
        return factors


# ── Matrix products and look-ups ─────────────────────────────────────────────────────────────────────────────────────


def _matmul(use: Use, grads: Grads) -> Factor:
    """out = x @ W, or βb + αx @ W: the gradient of W (in, out) is α xᵀ·grad per example."""
    name, layout, grad = operation(use.node), use.layout, grads[0]
    if use.slot == DATA_INPUT[name]:
        raise NoRule(f"is the left factor of a matrix product ({use.node.name()})")
    owner = layout.owner(use.node, DATA_INPUT[name], len(grad))
    if use.slot < DATA_INPUT[name]:
        if use.shape != tuple(grad.shape[1:]):
            raise NoRule(f"of shape {use.shape} is no bias of {grad.shape[1]} features ({use.node.name()})")
        return Dense(layout.split(grad, owner).sum(1) * use.saved("beta"))
    x, alpha = (use.saved("mat1"), use.saved("alpha")) if name == "Addmm" else (use.saved("self"), 1)
    return Outer(layout.split(x, owner), layout.split(grad if alpha == 1 else grad * alpha, owner))


def _grouped_matmul(use: Use, grads: Grads) -> list[Factor]:
    """out[rows of e] = x[rows of e] @ W[e], the experts of a mixture; `offs` are the ends of the experts' rows."""
    x, grad, split = use.saved("self"), grads[0], use.layout.split
    if use.slot == 0 or use.saved("offs") is None or x.dim() != 2:
        raise NoRule(f"enters {use.node.name()} in a form that has no rule")
    owner = use.layout.owner(use.node, 0, len(x))
    if owner is None:
        owner = torch.arange(len(x), device=x.device) // (len(x) // use.n_examples)
    factors: list[Factor] = []
    start = 0
    for expert, end in enumerate(use.saved("offs").tolist()):
        if end > start:
            rows = slice(start, end)
            factors.append(Outer(split(x[rows], owner[rows]), split(grad[rows], owner[rows]), slot=expert))
        start = end
    return factors


def _embedding(use: Use, grads: Grads) -> Rows:
    """row[index_t] += grad_t."""
    if use.saved("scale_grad_by_freq"):
        raise NoRule("is scaled by frequency, which mixes the examples of a batch")
    index = use.saved("indices").reshape(use.n_examples, -1)
    right = grads[0].reshape(use.n_examples, -1, grads[0].shape[-1])
    return Rows(index, right).without(use.saved("padding_idx"))


# ── Broadcasting: gains, shifts, norms ───────────────────────────────────────────────────────────────────────────────


def per_example_sum(use: Use, grad: Tensor) -> Dense:
    """Sum grad over the axes along which the parameter was broadcast, per example: (example, *shape).

    `grad` belongs to the node's output: (example, …), or (row, feature) with the rows of the examples flattened.
    """
    n, shape = use.n_examples, use.shape
    if grad.dim() == 2 and len(shape) == 1:
        grad = use.layout.split(grad, use.layout.owner(use.node, None, len(grad)))
    if grad.dim() == 0 or grad.shape[0] != n or len(shape) > grad.dim():
        raise NoRule(f"meets a value of shape {tuple(grad.shape)} that is not laid out by example")
    if len(shape) == grad.dim() and shape[0] != 1:
        raise NoRule(f"of shape {shape} is not shared by the examples of {tuple(grad.shape)}")
    shared = (1,) * (grad.dim() - len(shape)) + shape  # the axis of the examples is the first
    return Dense(grad.sum_to_size(n, *shared[1:]).reshape(n, *shape))


def _per_channel_sum(grad: Tensor) -> Dense:
    """Sum (example, channel, …) over all places."""
    return Dense(grad.flatten(2).sum(2) if grad.dim() > 2 else grad)


def _multiply(use: Use, grads: Grads) -> Dense:
    """out = x ∘ w, such as the gain of an RMSNorm."""
    return per_example_sum(use, wide(grads[0]) * use.saved("other" if use.slot == 0 else "self"))


def _add(use: Use, grads: Grads) -> Dense:
    """out = x + αw, such as a bias or a position's embedding; or w repeated for every example, as a class token is."""
    summed = per_example_sum(use, wide(grads[0]))
    return Dense(summed.grad * use.saved("alpha")) if use.slot == 1 else summed


def _layer_norm(use: Use, grads: Grads) -> Dense:
    """out = x̂ ∘ w + b with x̂ = (x − mean)·rstd."""
    grad = wide(grads[0])
    if use.slot == 1:
        grad = grad * ((use.saved("input") - use.saved("result1")) * use.saved("result2"))
    return per_example_sum(use, grad)


def _rms_norm(use: Use, grads: Grads) -> Dense:
    """out = x·rstd ∘ w, torch's own fused RMSNorm."""
    return per_example_sum(use, wide(grads[0]) * (use.saved("input") * use.saved("result1")))


def _batch_norm(use: Use, grads: Grads) -> Dense:
    """out = (x − μ)/√(v + ε) ∘ w + b with running μ, v: only in eval mode are examples independent."""
    if use.saved("training"):
        raise NoRule("belongs to a batch norm in training mode, which mixes the examples; call model.eval()")
    grad = wide(grads[0])
    if use.slot == 1:
        x, mean, variance = (wide(use.saved(name)) for name in ("input", "running_mean", "running_var"))
        eps = use.saved("epsilon" if operation(use.node) == "CudnnBatchNorm" else "eps")
        grad = grad * F.batch_norm(x, mean, variance, eps=eps)
    return _per_channel_sum(grad)


def _group_norm(use: Use, grads: Grads) -> Dense:
    """out = x̂ ∘ w + b, normalised over each group of channels."""
    grad, x = wide(grads[0]), use.saved("input")
    if use.slot == 1:
        by_group = (len(x), use.saved("group"), 1)
        centred = x.reshape(len(x), use.saved("group"), -1) - use.saved("result1").view(by_group)
        grad = grad * (centred * use.saved("result2").view(by_group)).reshape(x.shape)
    return _per_channel_sum(grad)


def _convolution(use: Use, grads: Grads) -> Factor:
    """out = w ⋆ x + b: the gradient of w is that of a matrix product with the unfolded input."""
    grad, x = grads[0], use.saved("input")
    if use.slot == 2:
        return _per_channel_sum(wide(grad))
    if use.saved("transposed") or x.dim() not in (3, 4) or x.shape[0] != use.n_examples:
        raise NoRule("belongs to a kind of convolution that has no rule")
    stride, padding, dilation = (tuple(use.saved(name)) for name in ("stride", "padding", "dilation"))
    kernel = tuple(use.shape[2:])
    if x.dim() == 3:  # a sequence is an image of one row
        x, grad = x.unsqueeze(2), grad.unsqueeze(2)
        stride, padding, dilation, kernel = (1, *stride), (0, *padding), (1, *dilation), (1, *kernel)
    patches = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride).transpose(1, 2)
    out = grad.flatten(2).transpose(1, 2)
    groups = use.saved("groups")
    if groups == 1:
        return Outer(left=out, right=patches)
    out, patches = (wide(side).unflatten(2, (groups, -1)) for side in (out, patches))
    return Dense(torch.einsum("ntgo,ntgi->ngoi", out, patches).flatten(1, 2))


Rule = Callable[[Use, Grads], Factor | list[Factor]]
RULES: dict[str, Rule] = {
    "Mm": _matmul,
    "Addmm": _matmul,
    "GroupedMm": _grouped_matmul,
    "Embedding": _embedding,
    "Mul": _multiply,
    "Add": _add,
    "Expand": _add,
    "NativeLayerNorm": _layer_norm,
    "FusedRmsNorm": _rms_norm,
    **dict.fromkeys(("NativeBatchNorm", "CudnnBatchNorm"), _batch_norm),
    "NativeGroupNorm": _group_norm,
    "Convolution": _convolution,
}
INPUT_FIRST = frozenset(
    "NativeLayerNorm FusedRmsNorm NativeBatchNorm CudnnBatchNorm NativeGroupNorm Convolution".split()
)
"""Operations whose first input is the activation; a parameter there has no rule."""


# ── Steps: operations on the parameter alone, undone on the factor ─────────────────────────────────────────────────


def step(node: Node, slot: int, shape: tuple[int, ...], n_examples: int) -> Step | None:
    """The way back through `node` if it acts on the parameter's value (of `shape`) alone, None otherwise."""
    name, n_axes = operation(node), len(shape)
    alone = name == "Add" and slot == 0 and node.next_functions[1][0] is None and output_shape(node) == shape  # 1 + w
    if name in ("ToCopy", "Alias", "Clone") or alone:
        return lambda factor: factor
    last_two = name == "Transpose" and saved_axes(node, n_axes, "dim0", "dim1") == {n_axes - 2, n_axes - 1}
    swapped = name == "Permute" and n_axes == 2 and saved(node, "dims")[0] % 2 == 1  # -1 and 1 are the last axis
    if name == "T" or swapped or last_two:
        return lambda factor: factor.transposed()
    if name in RESHAPES:
        return lambda factor: Dense(factor.dense("is reshaped before a use with").grad.reshape(len(factor), *shape))
    if name == "Embedding":
        return _look_up(node, n_examples)
    index = None
    if name == "Select" and saved_axes(node, n_axes, "dim") == {0}:
        index = saved(node, "index")
    if name == "Index" and [None if i is None else i.dim() for i in saved(node, "indices")] == [0]:
        index = int(saved(node, "indices")[0])
    return None if index is None else lambda factor: factor.of_slice(index % shape[0])


def _look_up(node: Node, n_examples: int) -> Step | None:
    """Back through an embedding that was looked up once for all examples (positions)."""
    index, padding = saved(node, "indices"), saved(node, "padding_idx")
    if index.shape[:1] == (n_examples,) or saved(node, "scale_grad_by_freq"):
        return None

    def back(factor: Factor) -> Rows:
        rows = factor.dense("is looked up before a use with").grad.reshape(len(factor), index.numel(), -1)
        return Rows(index.reshape(1, -1).expand(len(rows), -1), rows).without(padding)

    return back
