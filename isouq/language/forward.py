"""Everything asked of a language model: log p of answers, what it accepts, what a pass costs, which padding helps."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from isouq.gradients.isolation import is_decoder
from isouq.gradients.model import ExampleError, check_differentiable, differentiable, repeatable, run, select_parameters
from isouq.language.examples import Batch, Example


def token_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """log p of each answer token, (example, answer token), zero beyond an answer's end.

    The last input position predicts nothing that is scored, so it is left out.
    """
    inputs, targets, scored = batch.ids[:, :-1], batch.ids[:, 1:], batch.answer[:, 1:]
    keep = _by_fours(scored.any(0))
    logits = _logits(model, inputs, keep)
    unknown = (batch.answer & (batch.ids >= logits.shape[2])).any(1).nonzero()
    if len(unknown):
        n_words, row = logits.shape[2], batch.rows[int(unknown[0])]
        raise ExampleError(f"input_ids: {{}} has an answer id above {n_words - 1}, the last of the logits' words", row)
    n_answer = scored.sum(1)
    # Positions of each example's answer tokens first, then any others, as many as the longest answer has.
    order = (~scored[:, keep]).to(torch.int8).argsort(dim=1, stable=True)[:, : int(n_answer.max())].to(logits.device)
    exists = (torch.arange(order.shape[1])[None] < n_answer[:, None]).to(logits.device)
    wanted = targets[:, keep].to(logits.device).clamp(max=logits.shape[2] - 1)  # only ids of prompts can be above
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_p = LogProb.apply(wide, wanted.unsqueeze(2))
    return log_p.gather(1, order).masked_fill(~exists, 0)


def _logits(model: nn.Module, inputs: Tensor, keep: Tensor) -> Tensor:
    """Logits (example, kept position, vocab); the head runs at these only if the model takes `logits_to_keep`."""
    device = next(model.parameters(), torch.empty(0)).device
    if device.type == "meta":  # offloaded
        device = torch.device("cpu")
    options: dict[str, Any] = {"use_cache": False} if _takes(model, "use_cache") else {}
    if _takes(model, "logits_to_keep", "Tensor"):
        options["logits_to_keep"] = keep.to(device)
    output = run(model, "input_ids", input_ids=inputs.to(device, copy=True), **options)
    logits = getattr(output, "logits", output)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else (type(logits).__name__,)
    if "logits_to_keep" not in options and shape[:2] == inputs.shape:
        logits, shape = logits[:, keep.to(logits.device)], (len(inputs), len(keep), *shape[2:])
    if len(shape) != 3 or shape[:2] != (len(inputs), len(keep)):
        raise ValueError(f"model: logits of shape {shape} given, (example, token, vocab) wanted")
    return logits


def finite_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """`token_log_probs`. Raises ExampleError for the first example with a NaN or infinite one."""
    values = token_log_probs(model, batch)
    wrong = (~values.isfinite()).any(1).nonzero().flatten()
    if len(wrong):
        raise ExampleError("model: NaN or infinite logits for {}, finite ones wanted", batch.rows[int(wrong[0])])
    return values


def _by_fours(wanted: Tensor) -> Tensor:
    """The positions wanted, filled up to a multiple of four: kernels for fewer rows sum the vocabulary less exactly."""
    places = wanted.nonzero().flatten()
    more = -len(places) % 4
    return torch.cat([places, (~wanted).nonzero().flatten()[-more:]]).sort().values if more else places


class LogProb(torch.autograd.Function):
    """log softmax(logits)[wanted] in float64, with every digit of p and of 1 − p.

    Everything is computed from the log odds, the wanted logit less the log-sum-exp of the others, so nothing is
    subtracted from 1. The logits are the only tensor of their size that is saved.
    """

    parameter_free = True  # tells torch_contract.is_custom that only the logits are differentiated in here

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        """Logits (example, token, vocab) and ids (example, token, 1) → log p (example, token)."""
        lowest, tops, sums = torch.finfo(logits.dtype).min, [], []
        part = torch.empty_like(logits.flatten(0, 1)[:16])  # reused by all pieces, as is `wide`: the heap keeps holes
        wide = part.double()
        for piece, word in zip(logits.flatten(0, 1).split(16), wanted.flatten(0, 1).split(16), strict=True):
            others = part[: len(piece)].copy_(piece).scatter_(-1, word, -torch.inf)
            tops.append(others.amax(-1, keepdim=True).clamp(min=lowest))  # finite where all others are ruled out
            # In float32 this sum over the vocabulary would cost every norm a digit.
            sums.append(wide[: len(piece)].copy_(others.sub_(tops[-1]).exp_()).sum(-1, keepdim=True))
        top, total = torch.cat(tops).view_as(wanted), torch.cat(sums).view_as(wanted)
        own = logits.gather(-1, wanted).double()
        odds = own.masked_fill(own == torch.inf, torch.nan) - top - total.log()
        ctx.save_for_backward(logits, wanted, top, total, odds)
        return nn.functional.logsigmoid(odds).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """(δ_wanted − p)·grad, formed in one tensor; the wanted entry is 1 − p, and the others add up to minus that."""
        logits, wanted, top, total, odds = ctx.saved_tensors
        rest = grads[0].unsqueeze(-1) * torch.sigmoid(-odds)
        minus_p = (logits - top).exp_().mul_((-rest / total.clamp(min=1)).to(logits.dtype))
        return minus_p.scatter_(-1, wanted, rest.to(logits.dtype)), None


def pass_cost(
    model: nn.Module, examples: Sequence[Example], parameters: Sequence[str] | None = None
) -> Callable[[Sequence[Example]], float]:
    """A function giving the bytes above the model's weights of a forward and backward pass over a batch of examples.

    It scales the bytes of a pass over the longest example, and adds a fifth for what no graph shows: temporary copies,
    the comparison of examples with themselves alone, holes in the heap.
    """
    longest = max(range(len(examples)), key=lambda i: len(examples[i]))
    body, head, n_positions = _pass_bytes(model, Batch.of(examples, [longest]), parameters)

    def cost(batch: Sequence[Example]) -> float:
        width = max(map(len, batch))
        n_kept = len({place for example in batch for place in example.answer.nonzero().flatten().tolist()})
        n_kept = min(width, n_kept + -n_kept % 4)
        return 1.2 * len(batch) * (body * width / len(examples[longest]) + head * n_kept / n_positions)

    return cost


def _pass_bytes(model: nn.Module, batch: Batch, parameters: Sequence[str] | None) -> tuple[float, float, int]:
    """Bytes that a pass holds for the body and for the logits, and the number of positions that have logits.

    Logits count separately, since the head runs at every position where any example of a batch has an answer.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, int]] = {}  # storage → its bytes and the width of what it holds

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), x.shape[-1] if x.dim() else 1
        return x.detach()  # an output saved with its graph would keep itself alive

    with differentiable(model, select_parameters(model, parameters)), saved_tensors_hooks(pack, lambda x: x):
        values = token_log_probs(model, batch)  # named, so that the graph lives while its storages are counted
        check_differentiable(values)
        node: Any = values.grad_fn
        while not hasattr(node, "saved_tensors"):  # up to LogProb, which saves the logits
            node = node.next_functions[0][0]
        logits = node.saved_tensors[0].to("meta")  # its shape and type
    head = float(sum(size for size, width in kept.values() if width == logits.shape[-1]))
    body = sum(size for size, _ in kept.values()) - head
    # Add the logits' gradient; in half precision also its copy of that type and one more for the products.
    head += logits.nbytes * (1 + any(p.element_size() < logits.element_size() for p in model.parameters()))
    if not _takes(model, "logits_to_keep", "Tensor"):  # the head runs at every token
        body, head = body + head, 0.0
    return body, head, logits.shape[1]


def _takes(model: nn.Module, argument: str, kind: str = "") -> bool:
    """Whether the model's forward method has the argument, with this word in its annotation."""
    with contextlib.suppress(TypeError, ValueError, KeyError):
        return kind in str(inspect.signature(model.forward).parameters[argument].annotation)
    return False


def limits(model: nn.Module) -> tuple[int | None, int | None]:
    """The size of the model's vocabulary and of its context in tokens, where its config states them (−1: no limit)."""
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    sizes = (getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings"))
    vocabulary, context = (size if isinstance(size, int) and size > 0 else None for size in sizes)
    return vocabulary, context


def check_examples(model: nn.Module, examples: Sequence[Example]) -> None:
    """Refuse ids outside the model's vocabulary, texts longer than its context, and a model that is not causal.

    Raises ValueError, naming the argument, what was given and what is wanted.
    """
    if not examples:
        raise ValueError("input_ids: no example given, at least one wanted")
    vocabulary, context = limits(model)
    for i, example in enumerate(examples):
        low, high = int(example.ids.min()), int(example.ids.max())
        if vocabulary is not None and (low < 0 or high >= vocabulary):
            wrong = low if low < 0 else high
            raise ExampleError(f"input_ids: {{}} has id {wrong}, ids from 0 to {vocabulary - 1} wanted", i)
        if context is not None and len(example) - 1 > context:  # the last token is predicted and not read
            given = f"input_ids: {{}} has {len(example)} tokens"
            raise ExampleError(f"{given}, at most the model's context of {context} wanted", i)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not _is_causal(model, examples[0].ids):
        raise ValueError(
            "model: not causal, as tokens that follow change the log p of those before (an encoder sees them all); a "
            "causal, decoder-only language model wanted"
        )


def _is_causal(model: nn.Module, ids: Tensor) -> bool:
    """Whether log p of a text's tokens is the same whatever follows them; a known decoder is not tried."""
    context = limits(model)[1] or 10**9
    n_after = min(8, context // 2)
    if n_after == 0 or is_decoder(model):
        return True
    text = ids[: min(16, context - n_after + 1)]
    batch = Batch(text[None], torch.arange(len(text))[None] > 0, [0]).padded(n_after)
    other = Batch(batch.ids.clone(), batch.answer, [0])
    other.ids[:, len(text) :] = ids.max().clamp(min=1)
    slack = 0.1 if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()) else 1e-5
    with torch.no_grad(), repeatable():
        one, two = (token_log_probs(model, part) for part in (batch, other))  # of one shape, since kernels round by it
    return torch.allclose(one, two, rtol=slack, atol=slack, equal_nan=True)


def padding(model: nn.Module, batch: Batch) -> int:
    """How many padding tokens to append to make the length a multiple of eight, for faster matrix products.

    At most one in 16, within the model's context, and only if the model is a decoder known not to see padding.
    """
    width, context = batch.ids.shape[1] - 1, limits(model)[1]
    n = -width % 8
    fits = 16 * n <= width and (context is None or width + n <= context)
    return n if fits and is_decoder(model) else 0
