"""Checks that the examples of a batch do not mix: a score must not depend on the rest of the batch or on earlier ones.

Nothing is remembered from one batch to the next, since whether examples mix can depend on their values, on the size of
the batch, and on what was attached to the model in between. Each batch has to pass two questions.

*Does an example have the same value alone?* The graph cannot tell: masks, routes and sizes leave no trace in it. So
either the model's class is known to keep examples apart, or every example is also passed forward alone.

*Does a gradient belong to the example that it is counted for?* Again a known class answers that. For all other models
objective i is weighted by w_i, and each squared norm must grow by exactly w_i²; if not, another example's gradient is
in it.

If an answer is no, NotCovered is raised and the examples are taken one at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from isouq.gradients.autograd import Examples
from isouq.gradients.plan import Plan
from isouq.gradients.torch_contract import POINTWISE, RESHAPES, NotCovered, forward_hooks, operation


class Slack(NamedTuple):
    """How much, relatively, rounding may change a norm scaled by a power of two, a value, and a norm."""

    scaled: float
    value: float
    norm: float
    radix: int = 16  # number of different weights that the type's range allows


SLACK = {  # the narrowest type of the parameters decides
    torch.float16: Slack(0.2, 0.05, 0.2, radix=4),
    torch.bfloat16: Slack(1e-5, 0.05, 0.2),
    torch.float32: Slack(1e-5, 5e-5, 1e-3),
    torch.float64: Slack(1e-9, 1e-9, 1e-6),
}


def is_known(model: nn.Module, plan: Plan, *, apart: bool) -> bool:
    """Whether nothing has to be compared, because the model's class is known to keep the examples of a batch apart.

    `apart` says whether the objective itself, around the model, keeps examples apart, as isouq's own do. A decoder's
    graph may hold only operations known from decoders. Of a stack, all parameters must be asked for, because their
    rules refuse a layer that mistakes the examples' axis for another.
    """
    familiar = is_decoder(model) and all(operation(node) in FAMILIAR for node in plan.graph.order)
    return plan.n_examples == 1 or (apart and (familiar or (plan.watches_all and is_stack(model))))


def compare(plan: Plan, examples: Examples, squares: Tensor) -> None:
    """Raise NotCovered unless each example's value and gradient are the same as alone.

    `squares` are those of the plan's column 0, (example, param); the backward pass must have retained the graph. The
    last example, the first to be dropped by a layer with limited room, must have the same gradient alone as well: a
    branch whose value is zero may still have a gradient.
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

    Weights are powers of two, which scale exactly; any two examples have different weights in at least one pass.
    Several columns are tried as one sum with random factors.
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
        raise NotCovered(name, "gets gradients of one example in another's: the examples of a batch mix")


# ── By class ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Tests compare every class named here with the plain loop, batch by batch. In a decoder, tokens see only earlier tokens
# of their own sequence, padding on the right changes nothing, and values are laid out (example, token, …) or, for
# routed experts, by an index that the graph holds. This is known of the class as installed. A subclass, a hook, a
# replaced forward method, a module from elsewhere (an adapter), an attention from elsewhere, positions that depend on
# the longest sequence, or training mode: each makes `is_known` False, and the examples are compared.

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
FAMILIAR = (  # the operations in the decoders' graphs; any other makes `is_known` False
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
        and all(getattr(m, "is_causal", True) for m in (config, *model.modules()))  # else it was made an encoder
    )


def is_stack(model: nn.Module) -> bool:
    """Whether the model is a stack of torch's own layers, as installed, each of which treats its rows separately."""
    # Without these a norm has no parameter or statistic; if it is the first layer, the graph does not show it.
    plain = ("elementwise_affine", "track_running_stats")
    return _as_installed(model, "torch.nn.modules.") and all(
        type(m).__name__ in STACKED and all(getattr(m, name, True) for name in plain) for m in model.modules()
    )


def _as_installed(model: nn.Module, *homes: str) -> bool:
    def untouched(module: nn.Module) -> bool:
        kind, own = type(module), vars(module)
        moved = type(own.get("_hf_hook")).__module__.startswith("accelerate.")  # only moves values between devices
        in_place = kind.__module__.startswith(homes) and kind.forward.__module__.startswith(homes)
        return in_place and ("forward" not in own or moved) and not module.training and not any(forward_hooks(module))

    return not any(forward_hooks(None)) and all(map(untouched, model.modules()))
