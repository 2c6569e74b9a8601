"""One forward pass over answers: log p of their tokens, with every digit, and how many sequences a pass may take."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from isouq.gradients.common import check_differentiable, differentiable, select_parameters
from isouq.sequences import Batch, limits


def token_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """log p of each answer token, (example, answer token), zero beyond an answer's end.

    The last input position predicts nothing that is scored, so it is left out; the head runs only at the positions that
    predict an answer token where the model can be asked to (`logits_to_keep`).
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        device = torch.device("cpu")
    inputs, targets, scored = batch.ids[:, :-1], batch.ids[:, 1:], batch.answer[:, 1:]
    keep = _by_fours(scored.any(0))
    options: dict[str, Any] = {"use_cache": False} if _takes(model, "use_cache") else {}
    if _takes(model, "logits_to_keep"):
        logits = model(input_ids=inputs.to(device), logits_to_keep=keep.to(device), **options).logits
    else:
        logits = model(input_ids=inputs.to(device), **options).logits
        logits = logits[:, keep.to(logits.device)] if logits.shape[:2] == inputs.shape else logits
    if logits.shape[:2] != (len(inputs), len(keep)):
        raise ValueError(f"model: logits of shape {tuple(logits.shape)} given, (example, token, vocab) wanted")
    order = _answer_order(scored[:, keep]).to(logits.device)
    exists = (torch.arange(order.shape[1])[None] < scored.sum(1)[:, None]).to(logits.device)
    wanted = targets[:, keep].to(logits.device)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    picked = LogProb.apply(wide, wanted.unsqueeze(2))
    return picked.gather(1, order).masked_fill(~exists, 0)


def _by_fours(wanted: Tensor) -> Tensor:
    """The places wanted and up to three more: on one to three rows, kernels add up the vocabulary less exactly."""
    places = wanted.nonzero().flatten()
    more = -len(places) % 4
    return torch.cat([places, (~wanted).nonzero().flatten()[-more:]]).sort().values if more else places


class LogProb(torch.autograd.Function):
    """log softmax(logits)[wanted], float64, with the sum over the vocabulary in float64.

    In float32 that sum costs every norm a digit. Of the logits' size only they themselves are saved.
    """

    parameter_free = True  # for the graph's reader: nothing but the logits is differentiated in here

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        """Logits (example, token, vocab) and ids (example, token, 1) → log p (example, token)."""
        top = logits.amax(-1, keepdim=True)
        pieces = zip(logits.flatten(0, 1).split(16), top.flatten(0, 1).split(16), strict=True)
        part = torch.empty_like(logits.flatten(0, 1)[:16])  # one for all pieces, and one in float64: glibc leaves holes
        wide = part.double()
        sums = [wide[: len(x)].copy_(torch.sub(x, t, out=part[: len(x)]).exp_()).sum(-1) for x, t in pieces]
        total = torch.cat(sums).view_as(top)
        ctx.save_for_backward(logits, wanted, top, total)
        return (logits.gather(-1, wanted) - top - total.log()).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """(δ_wanted − p)·grad, formed in one tensor."""
        logits, wanted, top, total = ctx.saved_tensors
        grad = grads[0].unsqueeze(-1)
        minus_p = (logits - top).exp_().mul_((-grad / total).to(logits.dtype))
        return minus_p.scatter_add_(-1, wanted, grad.to(logits.dtype)), None


Sequences = Sequence[tuple[Tensor, Tensor]]  # (ids, answer) of each


def pass_cost(model: nn.Module, sequences: Sequences, parameters: Sequence[str] | None) -> Callable[[Sequences], float]:
    """A function giving the bytes above the model's weights that forward and backward pass of a batch take.

    A forward pass of the longest sequence tells: the storages that its graph holds, those of the logits by themselves,
    since the head runs wherever one example of the batch has an answer. A fifth more is for what no graph shows:
    temporary copies, the trial that examples stay apart, holes in the heap.
    """
    ids, answer = max(sequences, key=lambda sequence: len(sequence[0]))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, int]] = {}  # storage → its bytes and the width of what it holds

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), x.shape[-1] if x.dim() else 1
        return x.detach()  # without the graph, which an output would otherwise hold and be held by

    with differentiable(model, select_parameters(model, parameters)), saved_tensors_hooks(pack, lambda x: x):
        values = token_log_probs(model, Batch(ids[None], answer[None], [0]))  # alive while the storages are counted
        check_differentiable(values)
        node: Any = values.grad_fn
        while not hasattr(node, "saved_tensors"):  # up to LogProb, which saves the logits
            node = node.next_functions[0][0]
        logits = node.saved_tensors[0].to("meta")  # its shape and type
    head = sum(size for size, width in kept.values() if width == logits.shape[-1])
    body = sum(size for size, _ in kept.values()) - head
    # The logits' gradient comes on top; in half precision also as a copy of that type and, for the products, one more.
    head += logits.nbytes * (1 + any(p.element_size() < logits.element_size() for p in model.parameters()))
    if not _takes(model, "logits_to_keep"):  # the head runs at every token
        body, head = body + head, 0

    def cost(batch: Sequences) -> float:
        width = max(len(tokens) for tokens, _ in batch)
        n_kept = len({place for _, answer in batch for place in answer.nonzero().flatten().tolist()})
        n_kept = min(width, n_kept + -n_kept % 4)
        return 1.2 * len(batch) * (body * width / len(ids) + head * n_kept / logits.shape[1])

    return cost


def _answer_order(scored: Tensor) -> Tensor:
    """For each example the places of its answer tokens, first ones first: (example, longest answer)."""
    return (~scored).to(torch.int8).argsort(dim=1, stable=True)[:, : int(scored.sum(1).max())]


def _takes(model: nn.Module, argument: str) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        return argument in inspect.signature(model.forward).parameters
    return False


_HARMLESS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether padding leaves the model's scores alone


def padding(model: nn.Module, batch: Batch) -> int:
    """How many tokens to append, unseen by a causal model, for matrix products whose kernels go by eights.

    At most one in 16, within the model's context, and only where a trial on one sequence shows that it changes nothing.
    """
    width, context = batch.ids.shape[1] - 1, limits(model)[1]
    n = -width % 8
    if n == 0 or 16 * n > width or (context is not None and width + n > context):
        return 0
    if model not in _HARMLESS:
        one = batch.part(slice(0, 1))
        slack = min(0.1, 1000 * torch.finfo(next(model.parameters()).dtype).eps)
        with torch.no_grad():
            exact, padded = token_log_probs(model, one), token_log_probs(model, one.padded(8))
        _HARMLESS[model] = torch.allclose(exact, padded, rtol=slack, atol=slack)
    return n if _HARMLESS[model] else 0


def check_finite(values: Tensor, batch: Batch) -> None:
    """Raise ValueError naming the first example of which a log p is NaN or infinite."""
    wrong = (~values.isfinite()).any(1).nonzero().flatten()
    if len(wrong):
        raise ValueError(f"model: NaN or infinite logits for example {batch.rows[int(wrong[0])]}, finite ones wanted")
