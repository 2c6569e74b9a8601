"""Everything that the gradient engines rely on in torch beyond its documented interface.

Torch documents how to walk autograd's graph, but neither the names of the operations in it nor what each of them keeps
for its backward pass. SAVED states both. tests/gradients/test_torch_contract.py builds every operation of SAVED and
checks what it keeps; `make test-torch VERSION=2.11.0` runs the tests under another torch. If a later torch changes a
name, `saved` raises NotCovered with the operation and torch's version, and engine "auto" falls back to the reference.
(`model` also puts tables of its own in place of modules' `_parameters`, as accelerate's offloading expects them there.)
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

Node = Any  # torch.autograd.graph.Node, without the attributes that depend on the operation
Grads = tuple[Any, ...]  # the gradients at a node's outputs; None where nothing depends on one

SAVED: dict[str, tuple[str, ...]] = {  # operation → the attributes of its node that are read, each with prefix _saved_
    "Mm": ("self",),  # self @ mat2
    "Addmm": ("mat1", "alpha", "beta"),  # beta · bias + alpha · mat1 @ mat2
    "GroupedMm": ("self", "offs"),  # rows of self, in groups that end at offs, times a matrix each
    "Embedding": ("indices", "padding_idx", "scale_grad_by_freq"),
    "Mul": ("self", "other"),
    "Add": ("alpha",),  # self + alpha · other
    "NativeLayerNorm": ("input", "result1", "result2"),  # results: mean, 1 / standard deviation
    "FusedRmsNorm": ("input", "result1"),  # result: 1 / root mean square
    "NativeBatchNorm": ("input", "running_mean", "running_var", "eps", "training"),
    "CudnnBatchNorm": ("input", "running_mean", "running_var", "epsilon", "training"),  # of images on a card
    "NativeGroupNorm": ("input", "result1", "result2", "group"),  # results: mean, 1 / standard deviation, by group
    "Convolution": ("input", "stride", "padding", "dilation", "transposed", "groups"),
    "Transpose": ("dim0", "dim1"),
    "Permute": ("dims",),
    "Select": ("dim", "index"),
    "Index": ("indices",),
    "View": ("self_sym_sizes",),
    "UnsafeView": ("self_sym_sizes",),
    "ReshapeAlias": ("self_sym_sizes",),
    "Squeeze": ("self_sym_sizes",),
}
RESHAPES = frozenset("View UnsafeView ReshapeAlias Unsqueeze Squeeze".split())
POINTWISE = frozenset(  # every number of the output depends on the numbers at its own place only
    "Mul Add Sub Div Neg Exp Expm1 Log Log1P Pow Sqrt Rsqrt Relu Elu Gelu Silu Tanh Sigmoid LogSigmoid Softplus"
    " LeakyRelu Hardtanh ClampBackward1 Threshold Where MaskedFill NativeDropout ToCopy Clone Alias".split()
)


class NotCovered(ValueError):
    """The ghost engine has no rule for a use of a parameter; the message names both and the way out."""

    def __init__(self, parameter: str, why: str) -> None:
        super().__init__(f"{parameter} {why}; use engine='autograd' (engine='auto' does so by itself)")
        self.parameter = parameter


def operation(node: Node) -> str:
    """The operation that a node differentiates: "Mm" for MmBackward0; overloads from 1 on keep their whole name."""
    return node.name().rsplit("::", 1)[-1].removesuffix("0").removesuffix("Backward")


def saved(node: Node, name: str) -> Any:
    """What the operation at `node` kept under `name`, which SAVED must list; integers with their sign.

    Raises NotCovered if this version of torch keeps nothing by that name.
    """
    if name not in SAVED[operation(node)]:
        raise LookupError(f"name: SAVED has no entry {operation(node)}: {name}, so no test compares it with torch")
    try:
        value = getattr(node, f"_saved_{name}")
    except AttributeError:
        why = f"goes through {node.name()}, which has no _saved_{name} in torch {torch.__version__}"
        raise NotCovered("a tensor", why) from None
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value  # torch keeps them unsigned


def saved_axes(node: Node, n_axes: int, *names: str) -> set[int]:
    """The axes, counted from the first, that the operation kept under `names`, of a value with `n_axes`."""
    return {saved(node, name) % n_axes for name in names}


def output_shape(node: Node, number: int = 0) -> tuple[int, ...]:
    """The shape of the operation's output `number`."""
    return tuple(node._input_metadata[number].shape)


def leaf_tensor(node: Node) -> Tensor | None:
    """The tensor whose gradient the node accumulates, None for all other nodes."""
    return node.variable if operation(node) == "AccumulateGrad" else None


def is_custom(node: Node) -> bool:
    """Whether the node is a Python autograd.Function, which may use parameters that the graph does not show.

    Operators registered with torch.library do not count, since they name all their inputs; nor do functions that
    declare themselves `parameter_free`.
    """
    registered = node.name().startswith("GeneratedBackwardFor_")
    free = getattr(getattr(node, "_forward_cls", None), "parameter_free", False)
    return isinstance(node, BackwardCFunction) and not registered and not free


def backward_hooks(model: nn.Module, parameters: Iterable[Tensor]) -> list[dict[int, Any]]:
    """The tables of hooks that a backward pass would run. Autograd holds these very objects, so empty them in place."""
    tables = [table for p in parameters for table in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    tables += [table for m in model.modules() for table in (m._backward_hooks, m._backward_pre_hooks)]
    tables += [torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks]  # of all modules
    return [table for table in tables if table]


def compute_anew(undo: ExitStack) -> None:
    """Parametrised weights are computed at each use, also in `torch.nn.utils.parametrize.cached()`, until `undo`."""
    undo.callback(setattr, parametrize, "_cache_enabled", parametrize._cache_enabled)
    parametrize._cache_enabled = 0


def forward_hooks(module: nn.Module | None) -> tuple[list[Any], list[Any]]:
    """The hooks on what `module` returns, and those on what it is given; for None, the hooks of all modules."""
    own, prefix = (vars(torch_module), "_global") if module is None else (vars(module), "")
    return [*own[f"{prefix}_forward_hooks"].values()], [*own[f"{prefix}_forward_pre_hooks"].values()]
