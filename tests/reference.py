"""The estimate once more, straight from its definition and not through isouq: ∇θ p itself, one example at a time.

It differentiates p, not log p, in float64, from all logits of an unpadded sequence, and keeps whole gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scores:
    log_prob: Tensor
    epistemic: dict[str, Tensor]  # by aggregation


def token_log_probs(model: nn.Module, ids: Tensor, n_answer: int) -> Tensor:
    """log p of the last `n_answer` tokens of one sequence, in float64."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    places = range(len(ids) - n_answer, len(ids))
    return torch.stack([logits[t - 1].log_softmax(-1)[ids[t]] for t in places])


def squared_norm(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return sum((g.double().square().sum() for g in grads if g is not None), torch.zeros((), dtype=torch.float64))


MEANINGS = {  # aggregation → the probabilities whose ‖∇p‖² are averaged
    "sequence": lambda log_p: [log_p.sum().exp()],
    "geometric": lambda log_p: [log_p.mean().exp()],
    "token_mean": lambda log_p: log_p.exp(),
}


def score(
    model: nn.Module,
    examples: Sequence[tuple[Tensor, int]],
    parameters: Sequence[nn.Parameter] | None = None,
    aggregations: Sequence[str] = ("sequence",),
) -> Scores:
    """‖∇p‖² under some meanings of p; `examples` are (ids, number of answer tokens at their end)."""
    parameters = list(model.parameters()) if parameters is None else parameters
    S, found = [], {name: [] for name in aggregations}
    for ids, n_answer in examples:
        log_p = token_log_probs(model, ids, n_answer)
        S.append(log_p.sum().detach())
        for name, squares in found.items():
            squares.append(torch.stack([squared_norm(p, parameters) for p in MEANINGS[name](log_p)]).mean())
    return Scores(torch.stack(S), {name: torch.stack(squares) for name, squares in found.items()})


def pad(examples: Sequence[tuple[Tensor, int]], side: str, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, answer_mask, attention_mask) of the examples, padded on the "left", the "right" or by "turns"."""
    width = width or max(len(ids) for ids, _ in examples)
    out = torch.zeros(3, len(examples), width, dtype=torch.int64)
    for i, (ids, n_answer) in enumerate(examples):
        left = side == "left" or (side == "turns" and i % 2 == 0)
        start = width - len(ids) if left else 0
        out[0, i, start : start + len(ids)] = ids
        out[1, i, start + len(ids) - n_answer : start + len(ids)] = 1
        out[2, i, start : start + len(ids)] = 1
    return out[0], out[1].bool(), out[2]
