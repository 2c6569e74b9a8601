"""May the examples of a batch meet? What an example scores must not depend on its company, nor on what came before.

Nothing is remembered from one batch to the next, since what mixes examples can depend on their values, on the size of
the batch, and on what was attached to the model in between. Each batch is held against two questions.

*Does an example have the same value alone?* A graph cannot tell: masks, routes and sizes leave no trace in it. So the
answer is a class known to treat examples apart, or one forward pass of every example alone.

*Does a gradient belong to the example that it is counted for?* A class known to treat examples apart answers that too.
For all other models objective i is weighted by w_i, and each squared norm must grow by w_i² exactly, or another
example's gradient is in it.

Where an answer is no, NotCovered is raised and the examples go one at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from isouq.gradients.autograd import Examples
from isouq.gradients.plan import Plan
from isouq.gradients.torch_contract import POINTWISE, RESHAPES, NotCovered, forward_hooks, operation


class Slack(NamedTuple):
    """By how much, relatively, rounding may change a norm scaled by a power of two, a value, and a norm."""

    scaled: float
    value: float
    norm: float
    radix: int = 16  # how many weights the type's range allows


SLACK = {  # the narrowest type of the parameters decides
    torch.float16: Slack(0.2, 0.05, 0.2, radix=4),
    torch.bfloat16: Slack(1e-5, 0.05, 0.2),
    torch.float32: Slack(1e-5, 5e-5, 1e-3),
    torch.float64: Slack(1e-9, 1e-9, 1e-6),
}


def is_known(model: nn.Module, plan: Plan, *, apart: bool) -> bool:
    """Whether nothing has to be compared, since a class known to treat examples apart answers for this batch.

    `apart`: whether the objective itself, around the model, treats examples apart, as isouq's own do. A decoder's graph
    must be made of operations that are known of decoders. All parameters of a stack must be asked for, as their rules
    refuse a layer that takes the axis of the examples for another.
    """
    familiar = is_decoder(model) and all(operation(node) in FAMILIAR for node in plan.graph.order)
    return plan.n_examples == 1 or (apart and (familiar or (plan.watches_all and is_stack(model))))


def compare(plan: Plan, examples: Examples, squares: Tensor) -> None:
    """Raise NotCovered unless each example's value and gradient are what it has alone.

    `squares` are those of the plan's column 0, (example, param); the backward pass must have retained the graph. The
    last example, of which a full batch has no room left, also needs the same gradient alone: a branch of value zero may
    have one.
    """
    types = {tensor.dtype for tensor in plan.tracked.tensors}
    slack = next(slack for dtype, slack in SLACK.items() if dtype in types)
    for one, together in zip(examples.singly(), plan.values.detach(), strict=True):
        alone = one.values()[0].detach()  # not under no_grad: a forward pass may register hooks
        if not bool(((alone - together).abs() <= slack.value * (1 + together.abs())).all()):
            raise NotCovered("the output", "for an example changes with the others of its batch, or with its padding")
    _check_weights(plan, squares, slack)
    last = Plan(examples.singly()[-1].values(), plan.tracked, 1)
    _check_equal(last.squares(last.values[:, 0].sum(), retain=False), squares[-1:], plan, slack.norm)


def _check_weights(plan: Plan, squares: Tensor, slack: Slack) -> None:
    """Each squared norm must grow by the square of its own objective's weight.

    Weights are powers of two, which scale exactly, and differ for any two examples in one pass at least. Of several
    columns a sum with random factors is tried.
    """
    n, n_columns, radix = plan.n_examples, plan.values.shape[1], slack.radix
    column = plan.values[:, 0]
    if n_columns > 1:
        column = plan.values @ (torch.rand(n_columns, generator=torch.Generator().manual_seed(0)) + 0.5).to(column)
        squares = plan.squares(column.sum(), retain=True)
    for base in (radix**k for k in range(n) if radix**k < n):
        weights = 2.0 ** (torch.arange(n) // base % radix - radix // 2)
        scaled = plan.squares(column @ weights.to(column), retain=True)
        _check_equal(scaled / weights.double().square()[:, None], squares, plan, slack.scaled)


def _check_equal(other: Tensor, squares: Tensor, plan: Plan, slack: float) -> None:
    wrong = (other - squares).abs() > slack * (squares + 1e-4 * squares.sum(1, keepdim=True))
    if bool(wrong.any()):
        name = list(plan.tracked.parameters)[int(wrong.any(0).nonzero()[0])]
        raise NotCovered(name, "gathers gradients of one example in another's: the examples of a batch meet")


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
