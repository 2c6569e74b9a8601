"""One rule per operation: from what autograd saved for it and the gradient at its output to the parameter's factor.

A rule is a pure function (node, slot, grads, context) → factor or factors, where `slot` is the input at which the
parameter enters. A step is the way back through an operation on the parameter alone (a transpose, a cast, 1 + w).
To cover a new layer, add one function here and one row to the table in tests/gradients/test_ghost.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isouq.gradients.factors import Dense, Factor, NoRule, Outer, Rows, gram, wide
from isouq.gradients.graph import Grads, Layout, Node, NotCovered, operation, output_shape, signed

Step = Callable[[Factor], Factor]


@dataclass
class SharedGrams:
    """x·xᵀ of activations that several weights multiply (query, key, value), kept until the last has used it."""

    users: dict[tuple[Any, ...], int] = field(default_factory=dict)
    left: dict[tuple[Any, ...], int] = field(default_factory=dict)
    known: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def start(self) -> None:
        """Forget what an earlier pass left."""
        self.known.clear()
        self.left = dict(self.users)

    @staticmethod
    def key(x: Tensor) -> tuple[Any, ...]:
        """Saved tensors are alive together, so equal storage and shape mean the same activation."""
        return x.device, x.data_ptr(), x.shape, x.stride()

    def announce(self, uses: Iterable[tuple[Node, int]]) -> None:
        """Count the users of each activation; none where saved tensors are unpacked anew, as then keys say nothing."""
        users: Counter[tuple[Any, ...]] = Counter()
        for node, slot in uses:
            x, again = saved_matrix(node, slot), saved_matrix(node, slot)
            if x is not None and again is not None:
                if x.data_ptr() != again.data_ptr():
                    return
                users[self.key(x)] += 1
        self.users = dict(users)

    def get(self, x: Tensor, split: Tensor) -> Callable[[], Tensor] | None:
        """A function giving split·splitᵀ, or None where nobody shares it."""
        key = self.key(x)
        if self.users.get(key, 1) < 2:
            return None

        self.left[key] -= 1
        last = self.left[key] == 0

        def product() -> Tensor:
            value = self.known.pop(key) if key in self.known else gram(split)
            if not last:
                self.known[key] = value
            return value

        return product


@dataclass
class Context:
    """What a rule may ask for: the parameter's name (for errors), its shape here, the layout, the shared products."""

    parameter: str
    shape: tuple[int, ...]
    layout: Layout
    grams: SharedGrams

    @property
    def n_examples(self) -> int:
        """How many examples the batch has."""
        return self.layout.n_examples

    def refuse(self, why: str) -> NotCovered:
        """The error to raise, naming the parameter."""
        return NotCovered(self.parameter, why)


def saved_matrix(node: Node, slot: int) -> Tensor | None:
    """The activation (row, feature) that a matrix multiplication at `node` takes beside its weight at `slot`."""
    name = operation(node)
    if name in ("Mm", "GroupedMm") and slot == 1:
        return node._saved_self
    if name == "Addmm" and slot == 2:
        return node._saved_mat1
    return None


def _matmul(node: Node, slot: int, grads: Grads, context: Context) -> Outer:
    """out = x @ W: the gradient of W (in, out) is xᵀ·grad per example."""
    x = saved_matrix(node, slot)
    if x is None:
        raise context.refuse(f"is the left factor of a matrix product ({node.name()})")
    owner = context.layout.owner(node, slot - 1, x, context.parameter)
    rows = context.layout.split(x, owner)
    grad = context.layout.split(grads[0], owner)
    alpha = getattr(node, "_saved_alpha", 1)
    return Outer(left=rows, right=grad if alpha == 1 else grad * alpha, left_gram=context.grams.get(x, rows))


def _addmm(node: Node, slot: int, grads: Grads, context: Context) -> Factor:
    """out = βb + αx @ W."""
    if slot == 0:
        owner = context.layout.owner(node, 1, node._saved_mat1, context.parameter)
        return Dense(context.layout.split(grads[0], owner).sum(1) * node._saved_beta)
    return _matmul(node, slot, grads, context)


def _grouped_matmul(node: Node, slot: int, grads: Grads, context: Context) -> list[Outer]:
    """out[rows of e] = x[rows of e] @ W[e], the experts of a mixture; `offs` are the ends of each expert's rows."""
    x, grad = saved_matrix(node, slot), grads[0]
    if x is None or node._saved_offs is None or x.dim() != 2:
        raise context.refuse(f"enters {node.name()} in a form that has no rule")
    owner = context.layout.owner(node, 0, x, context.parameter)
    if owner is None:
        owner = torch.arange(len(x), device=x.device) // (len(x) // context.n_examples)
    factors, start = [], 0
    for expert, end in enumerate(node._saved_offs.tolist()):
        if end > start:
            part = owner[start:end]
            split = context.layout.split
            factors.append(Outer(split(x[start:end], part), split(grad[start:end], part), slot=expert))
        start = end
    return factors


def _embedding(node: Node, slot: int, grads: Grads, context: Context) -> Rows:
    """row[index_t] += grad_t; the padding index gathers no gradient."""
    if node._saved_scale_grad_by_freq:
        raise context.refuse("is scaled by frequency, which mixes the examples of a batch")
    index = node._saved_indices.reshape(context.n_examples, -1)
    rows = grads[0].reshape(context.n_examples, -1, grads[0].shape[-1])
    padding = node._saved_padding_idx
    if 0 <= padding < 2**63:  # −1, stored unsigned, means none
        rows = rows.masked_fill((index == padding).unsqueeze(-1), 0)
    return Rows(index, rows)


def per_example_sum(node: Node, grad: Tensor, context: Context) -> Tensor:
    """Sum grad over what was broadcast from the parameter's shape, per example: (example, *shape).

    `grad` belongs to the node's output: (example, …), or (row, feature) with the rows of the examples flattened.
    """
    n, shape = context.n_examples, context.shape
    if grad.dim() == 2 and len(shape) == 1:
        owner = context.layout.owner_of_output(node, len(grad), context.parameter)
        grad = context.layout.split(grad, owner)
    if grad.dim() == 0 or grad.shape[0] != n or len(shape) > grad.dim():
        raise context.refuse(f"meets a value of shape {tuple(grad.shape)} that is not laid out by example")
    if len(shape) == grad.dim():
        if shape[0] != 1:
            raise context.refuse(f"of shape {shape} is not shared by the examples of {tuple(grad.shape)}")
        return _sum_to(grad, shape[1:]).reshape(n, *shape)
    return _sum_to(grad, shape)


def _sum_to(grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    extra = grad.dim() - 1 - len(shape)
    if extra:
        grad = grad.flatten(1, extra).sum(1)
    narrow = [i + 1 for i, size in enumerate(shape) if size == 1 and grad.shape[i + 1] != 1]
    return grad.sum(narrow, keepdim=True) if narrow else grad


def _multiply(node: Node, slot: int, grads: Grads, context: Context) -> Dense:
    """out = x ∘ w, among others the gain of an RMSNorm."""
    other = node._saved_other if slot == 0 else node._saved_self
    return Dense(per_example_sum(node, wide(grads[0]) * other, context))


def _add(node: Node, slot: int, grads: Grads, context: Context) -> Dense:
    """out = x + αw, among others a bias or a position's embedding."""
    summed = per_example_sum(node, wide(grads[0]), context)
    return Dense(summed * node._saved_alpha if slot == 1 else summed)


def _expand(node: Node, slot: int, grads: Grads, context: Context) -> Dense:
    """out = w repeated for every example, such as a class token."""
    return Dense(per_example_sum(node, wide(grads[0]), context))


def _layer_norm(node: Node, slot: int, grads: Grads, context: Context) -> Dense:
    """out = x̂ ∘ w + b with x̂ = (x − mean)·rstd."""
    grad = wide(grads[0])
    if slot == 1:
        grad = grad * ((node._saved_input - node._saved_result1) * node._saved_result2)
    return Dense(per_example_sum(node, grad, context))


def _rms_norm(node: Node, slot: int, grads: Grads, context: Context) -> Dense:
    """out = x·rstd ∘ w, torch's own fused RMSNorm."""
    return Dense(per_example_sum(node, wide(grads[0]) * (node._saved_input * node._saved_result1), context))


def _batch_norm(node: Node, slot: int, grads: Grads, context: Context) -> Dense:
    """out = (x − μ)/√(v + ε) ∘ w + b with running μ, v: only in eval mode is an example's output its own."""
    if node._saved_training:
        raise context.refuse("belongs to a batch norm in training mode, which mixes the examples; call model.eval()")
    grad, x = wide(grads[0]), node._saved_input
    if slot == 1:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = (node._saved_running_var + node._saved_eps).rsqrt().view(shape)
        grad = grad * ((x - node._saved_running_mean.view(shape)) * scale)
    return Dense(grad.flatten(2).sum(2) if grad.dim() > 2 else grad)


def _group_norm(node: Node, slot: int, grads: Grads, context: Context) -> Dense:
    """out = x̂ ∘ w + b, normalised over each group of channels."""
    grad, x = wide(grads[0]), node._saved_input
    if slot == 1:
        scale = (len(x), node._saved_group, 1)
        centred = x.reshape(len(x), node._saved_group, -1) - node._saved_result1.view(scale)
        grad = grad * (centred * node._saved_result2.view(scale)).reshape(x.shape)
    return Dense(grad.flatten(2).sum(2) if grad.dim() > 2 else grad)


def _convolution(node: Node, slot: int, grads: Grads, context: Context) -> Factor:
    """out = w ⋆ x + b: the gradient of w is that of a matrix product with the unfolded input."""
    grad, x = grads[0], node._saved_input
    if slot == 2:
        return Dense(wide(grad).flatten(2).sum(2))
    if node._saved_transposed or x.dim() not in (3, 4) or x.shape[0] != context.n_examples:
        raise context.refuse("belongs to a kind of convolution that has no rule")
    stride, padding, dilation = (tuple(getattr(node, f"_saved_{k}")) for k in ("stride", "padding", "dilation"))
    kernel = tuple(context.shape[2:])
    if x.dim() == 3:
        x, grad = x.unsqueeze(2), grad.unsqueeze(2)
        stride, padding, dilation, kernel = (1, *stride), (0, *padding), (1, *dilation), (1, *kernel)
    patches = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride).transpose(1, 2)
    out = grad.flatten(2).transpose(1, 2)
    if node._saved_groups == 1:
        return Outer(left=out, right=patches)
    return Dense(_grouped_convolution(out, patches, node._saved_groups))


def _grouped_convolution(out: Tensor, patches: Tensor, groups: int) -> Tensor:
    o = wide(out).unflatten(2, (groups, -1))
    x = wide(patches).unflatten(2, (groups, -1))
    return torch.einsum("ntgo,ntgi->ngoi", o, x).flatten(1, 2)


Rule = Callable[[Node, int, Grads, Context], Factor | list[Outer]]
RULES: dict[str, Rule] = {
    "Mm": _matmul,
    "Addmm": _addmm,
    "GroupedMm": _grouped_matmul,
    "Embedding": _embedding,
    "Mul": _multiply,
    "Add": _add,
    "Expand": _expand,
    "NativeLayerNorm": _layer_norm,
    "FusedRmsNorm": _rms_norm,
    "NativeBatchNorm": _batch_norm,
    "NativeGroupNorm": _group_norm,
    "Convolution": _convolution,
}
INPUT_FIRST = frozenset(["NativeLayerNorm", "FusedRmsNorm", "NativeBatchNorm", "NativeGroupNorm", "Convolution"])
"""Operations whose first input is the activation; a parameter there has no rule."""

# ── Steps: operations on the parameter alone, undone on the factor ─────────────────────────────────────────────


def _same(factor: Factor) -> Factor:
    return factor


def _transpose(factor: Factor) -> Factor:
    if isinstance(factor, Outer):
        return factor.transposed()
    return Dense(_dense(factor, "is transposed").transpose(-1, -2))


def _dense(factor: Factor, what: str) -> Tensor:
    if not isinstance(factor, Dense):
        raise NoRule(f"{what} before a use of which the gradient is in the form {type(factor).__name__}")
    return factor.grad


def _reshape(shape: tuple[int, ...]) -> Step:
    def back(factor: Factor) -> Factor:
        whole = isinstance(factor, Outer) and factor.slot is None
        grad = factor.dense() if whole else _dense(factor, "is reshaped")  # type: ignore[union-attr]
        return Dense(grad.reshape(len(grad), *shape))

    return back


def _look_up(index: Tensor, padding: int) -> Step:
    """Back through an embedding that was looked up once for all examples (positions)."""

    def back(factor: Factor) -> Factor:
        grad = _dense(factor, "is looked up")
        rows = grad.reshape(len(grad), index.numel(), -1)
        flat = index.reshape(1, -1).expand(len(rows), -1)
        if 0 <= padding < 2**63:
            rows = rows.masked_fill((flat == padding).unsqueeze(-1), 0)
        return Rows(flat, rows)

    return back


def _slot(expert: int) -> Step:
    def back(factor: Factor) -> Factor:
        if not isinstance(factor, Outer) or factor.slot is not None:
            raise NoRule("is sliced before a use that has no rule")
        return Outer(factor.left, factor.right, factor.left_gram, factor.right_gram, slot=expert)

    return back


def step(node: Node, slot: int, shape: tuple[int, ...], n_examples: int) -> Step | None:
    """The way back through `node` if it acts on the parameter's value (of `shape`) alone, else None."""
    name, out = operation(node), output_shape(node)
    if name in ("ToCopy", "Alias", "Clone"):
        return _same
    if name == "T" or (name == "Permute" and len(shape) == 2) or (name == "Transpose" and _last_two(node, len(shape))):
        return _transpose
    if name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"):
        return _reshape(shape)
    if name == "Add" and out == shape and node.next_functions[1 - slot][0] is None and slot == 0:
        return _same
    if name == "Embedding" and node._saved_indices.shape[0] != n_examples:
        return None if node._saved_scale_grad_by_freq else _look_up(node._saved_indices, node._saved_padding_idx)
    if name == "Select" and node._saved_dim in (0, 2**64 - len(shape)):
        return _slot(signed(node._saved_index) % shape[0])
    if name == "Index":
        index = node._saved_indices
        if len(index) == 1 and index[0] is not None and index[0].dim() == 0:
            return _slot(int(index[0]) % shape[0])
    return None


def _last_two(node: Node, n_dims: int) -> bool:
    dims = {signed(d) % n_dims for d in (node._saved_dim0, node._saved_dim1)}
    return dims == {n_dims - 2, n_dims - 1}
