"""May the examples of a batch meet? What an example scores must not depend on its company, nor on what came before.

Nothing is remembered from one batch to the next, since what mixes examples can depend on their values, on the size of
the batch, and on what was attached to the model in between. Each batch is held against two questions.

*Does an example have the same value alone?* A graph cannot tell: masks, routes and sizes leave no trace in it. So the
answer is a class known to treat examples apart, or one forward pass of every example alone.

*Does a gradient belong to the example that it is counted for?* The operations of the graph prove it where each keeps
the first axis or reshapes it into equal blocks. Otherwise objective i is weighted by w_i, and each squared norm must
grow by w_i² exactly, or another example's gradient is in it.

Where an answer is no, or is not known, `Meeting` is raised and the examples go one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isouq.gradients.autograd import Examples
from isouq.gradients.graph import Graph
from isouq.gradients.plan import Plan
from isouq.gradients.torch_contract import (
    POINTWISE,
    RESHAPES,
    SAVED,
    Node,
    NotCovered,
    declares,
    forward_hooks,
    operation,
    output_shape,
    saved,
    saved_axes,
)


class Meeting(NotCovered):
    """The examples of this batch meet, or nothing shows that they do not; one at a time they are scored exactly."""


Check = Callable[[Tensor], None]
"""Raises Meeting unless gradients are those of each example alone; is given column 0's squares (example, param)."""


def examine(model: nn.Module, plan: Plan, examples: Examples, *, apart: bool) -> list[Check]:
    """Compare each example's value with the one it has alone, unless the model's class answers for it.

    `apart`: whether the objective itself, around the model, treats examples apart, as isouq's own do. Raises Meeting.
    Returns the checks to be made after the backward pass, which has to retain the plan's graph for them.
    """
    familiar = apart and is_decoder(model) and all(operation(node) in FAMILIAR for node in plan.graph.order)
    if plan.n_examples == 1 or familiar:
        return []
    separate = separates(plan.graph, plan.n_examples, plan.by_node)
    checks: list[Check] = [] if separate else [partial(_check_weights, plan)]
    if apart and separate and is_stack(model):
        return checks
    for one, together in zip(examples.singly(), plan.values.detach(), strict=True):
        alone = one.values()[0].detach()  # not under no_grad: a forward pass may register hooks
        if not bool(((alone - together).abs() <= _slack(plan).value * (1 + together.abs())).all()):
            raise Meeting("the output", "for an example changes with the others of its batch, or with its padding")
    return [*checks, partial(_check_last, plan, examples)]


def _check_last(plan: Plan, examples: Examples, squares: Tensor) -> None:
    """The last example, of which a full batch has no room left, has the same gradient alone.

    A branch whose value is zero may have one.
    """
    alone = Plan(examples.singly()[-1].values(), plan.tracked, 1)
    _check_equal(alone.squares(alone.values[:, 0].sum(), retain=False), squares[-1:], plan, _slack(plan).norm)


def _check_weights(plan: Plan, squares: Tensor) -> None:
    """Each squared norm must grow by the square of its own objective's weight.

    Weights are powers of two, which scale exactly, and differ for any two examples in one pass at least. Of several
    columns a sum with random factors is tried.
    """
    n, n_columns, radix = plan.n_examples, plan.values.shape[1], _slack(plan).radix
    column = plan.values[:, 0]
    if n_columns > 1:
        column = plan.values @ (torch.rand(n_columns, generator=torch.Generator().manual_seed(0)) + 0.5).to(column)
        squares = plan.squares(column.sum(), retain=True)
    for base in (radix**k for k in range(n) if radix**k < n):
        weights = 2.0 ** (torch.arange(n) // base % radix - radix // 2)
        scaled = plan.squares(column @ weights.to(column), retain=True)
        _check_equal(scaled / weights.double().square()[:, None], squares, plan, _slack(plan).scaled)


def _check_equal(other: Tensor, squares: Tensor, plan: Plan, slack: float) -> None:
    wrong = (other - squares).abs() > slack * (squares + 1e-4 * squares.sum(1, keepdim=True))
    if bool(wrong.any()):
        name = list(plan.tracked.parameters)[int(wrong.any(0).nonzero()[0])]
        raise Meeting(name, "gathers gradients of one example in another's: the examples of a batch meet")


@dataclass(frozen=True)
class _Slack:
    """By how much, relatively, rounding may change a norm scaled by a power of two, a value, and a norm."""

    scaled: float
    value: float
    norm: float
    radix: int = 16  # how many weights the type's range allows


_SLACK = {  # the narrowest type of the parameters decides
    torch.float16: _Slack(0.2, 0.05, 0.2, radix=4),
    torch.bfloat16: _Slack(1e-5, 0.05, 0.2),
    torch.float32: _Slack(1e-5, 5e-5, 1e-3),
    torch.float64: _Slack(1e-9, 1e-9, 1e-6),
}


def _slack(plan: Plan) -> _Slack:
    types = {tensor.dtype for tensor in plan.tracked.tensors}
    return next(slack for dtype, slack in _SLACK.items() if dtype in types)


# ── By class ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Every class named here is compared with the plain loop in tests/gradients, batch by batch. Of a decoder it is known
# that tokens see earlier tokens of their own sequence only, that padding on the right changes nothing, and that its
# values are laid out (example, token, …) or, for routed experts, by an index that the graph holds. That holds for the
# class as installed: a subclass, a hook, a forward method put in its place, a module of other origin (an adapter), an
# attention of other origin, positions that depend on the longest sequence, or training mode, and it is asked anew.

DECODERS = frozenset(
    f"{name}ForCausalLM"
    for name in "Bloom Cohere Falcon GPTBigCode GPTJ GPTNeoX Gemma2 Gemma3 Granite Llama Mistral Mixtral Mpt OPT Olmo"
    " Olmo2 Phi3 Qwen2 Qwen2Moe Qwen3 SmolLM3 Starcoder2".split()
) | {"GPT2LMHeadModel"}
STACKED = frozenset(
    "Sequential Identity Linear Conv1d Conv2d BatchNorm1d BatchNorm2d LayerNorm RMSNorm GroupNorm Flatten Dropout"
    " Dropout1d Dropout2d ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Tanh Sigmoid Softplus Softsign Hardtanh"
    " Hardswish LogSigmoid MaxPool2d AvgPool2d AdaptiveAvgPool2d".split()
)
FAMILIAR = (  # what the decoders' graphs are made of: an operation besides these, and it is asked anew
    POINTWISE
    | RESHAPES
    | frozenset(
        "AccumulateGrad Addmm Baddbmm Bmm Cat ConstantPadNd Embedding Expand FusedRmsNorm Gather GeLUFunction GroupedMm"
        " Index IndexAdd LogProb MeanBackward1 Mm MulBackward1 NativeLayerNorm Permute SafeSoftmax"
        " ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention ScaledDotProductFlashAttention"
        " ScaledDotProductFlashAttentionForCpu Select Slice Softmax Split SplitWithSizes Stack SumBackward1 T Topk"
        " Transpose".split()
    )
)


def is_decoder(model: nn.Module) -> bool:
    """Whether the model is one of transformers' DECODERS, as installed."""
    config = getattr(model, "config", None)
    return (
        type(model).__name__ in DECODERS
        and type(model).__module__.startswith("transformers.models.")
        and getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
        and _as_installed(model, "transformers.", "torch.nn.modules.")
        and not any(getattr(m, "rope_type", None) in ("dynamic", "longrope") for m in model.modules())
    )


def is_stack(model: nn.Module) -> bool:
    """Whether the model is a pile of torch's own layers, as installed, each of which takes row by row."""
    plain = ("elementwise_affine", "track_running_stats")  # without these a norm of the raw input leaves no trace
    return _as_installed(model, "torch.nn.modules.") and all(
        type(m).__name__ in STACKED and all(getattr(m, name, True) for name in plain) for m in model.modules()
    )


def _as_installed(model: nn.Module, *homes: str) -> bool:
    def untouched(module: nn.Module) -> bool:
        kind, own = type(module), vars(module)
        moved = type(own.get("_hf_hook")).__module__.startswith("accelerate.")  # moves values between devices only
        in_place = kind.__module__.startswith(homes) and kind.forward.__module__.startswith(homes)
        return in_place and ("forward" not in own or moved) and not module.training and not any(forward_hooks(module))

    return not any(forward_hooks(None)) and all(map(untouched, model.modules()))


# ── By the graph ─────────────────────────────────────────────────────────────────────────────────────────────────────


def separates(graph: Graph, n_examples: int, uses: Any = ()) -> bool:
    """Whether example i owns the i-th n-th of every gradient, by the operations of the graph alone.

    By induction from the output, whose first axis is the examples': each operation must keep the first axis, or
    reshape (row-major) to another that n divides. What the operations are fed with plays no part. `uses` are the nodes
    where parameters enter; none may be among those that act on parameters alone. False means unproven.
    """
    shared = _from_parameters_alone(graph, n_examples)
    return not any(node in shared for node in uses) and all(
        node in shared or _row_by_row(node, shared, n_examples) for node in graph.order
    )


def _from_parameters_alone(graph: Graph, n_examples: int) -> set[Node]:
    """The parameters' own nodes, and what is made of them for all examples at once."""
    shared = {node for node, _ in graph.leaves()}
    stack = list(shared)
    while stack:
        for node, _ in graph.consumers.get(stack.pop(), ()):
            look_up = operation(node) == "Embedding" and output_shape(node)[0] != n_examples
            alone = operation(node) in _ALONE and all(child in shared for child, _ in node.next_functions)
            if node not in shared and (alone or look_up):
                shared.add(node)
                stack.append(node)
    return shared


def _row_by_row(node: Node, shared: set[Node], n_examples: int) -> bool:
    name, shape = operation(node), output_shape(node)
    data = {slot: child for slot, child in enumerate(node.next_functions) if child[0] and child[0] not in shared}
    shapes = [output_shape(*child) for child in data.values()]
    if any(child[1] for child in data.values()) or any(not s or s[0] % n_examples for s in [shape, *shapes]):
        return False
    if name in RESHAPES:
        return True
    if any(s[0] != shape[0] for s in shapes):
        return False
    if name in _FIRST_ONLY:
        kept = SAVED.get(name, ())
        n_normalized = len(saved(node, "normalized_shape")) if "normalized_shape" in kept else 0
        over_batch = n_normalized >= len(shape) or ("training" in kept and saved(node, "training"))
        return set(data) <= {_FIRST_ONLY[name]} and not over_batch
    if name in _ALONG:
        return bool(shapes) and 0 not in saved_axes(node, len(shapes[0]), "dim")
    if name == "Embedding" or declares(node, "row_by_row"):
        return True
    return name in POINTWISE and all(len(s) == len(shape) for s in shapes)


_ALONE = RESHAPES | {"T", "Transpose", "Permute", "ToCopy", "Clone", "Alias", "Select"}
_ALONG = frozenset(
    "Softmax LogSoftmax Logsumexp Gather Scatter ScatterBackward1 Slice SumBackward1 MeanBackward1".split()
)
_FIRST_ONLY = {"Addmm": 1} | dict.fromkeys(  # operations on one activation, with weights; at which input it enters
    "Mm Convolution NativeBatchNorm NativeGroupNorm NativeLayerNorm FusedRmsNorm MaxPool2DWithIndices AvgPool2D"
    " AdaptiveAvgPool2D".split(),
    0,
)
