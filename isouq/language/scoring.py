"""Causal language models: model + token ids + answer mask → `Estimate`; texts → a table.

The token at position t is predicted from position t − 1. Scores are of the given ids, never of re-tokenised text. The
model is used as it is, over all its parameters; nothing is left on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from isouq import estimate
from isouq.estimate import AGGREGATIONS, Aggregation, Estimate
from isouq.gradients import Engine, Objective, SquaredNorms, squared_norms
from isouq.gradients.checks import check_model, repeatable
from isouq.gradients.common import select_parameters
from isouq.gradients.products import Checkpoint, Gram
from isouq.gradients.products import inner_products as gradient_products
from isouq.gradients.room import room
from isouq.language import encoding
from isouq.language.examples import Batch, batches, pad
from isouq.language.forward import check_finite, checked, padding, pass_cost, token_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score_tokens(
    model: nn.Module,
    input_ids: Tensor,
    answer_mask: Tensor,
    attention_mask: Tensor | None = None,
    *,
    aggregation: Aggregation = "sequence",
    engine: Engine = "auto",
    batch_size: int | Literal["auto"] = "auto",
    memory: float | None = None,
    parameters: Sequence[str] | None = None,
    breakdown: bool = False,
) -> Estimate:
    """Epistemic and aleatoric uncertainty of each answer from one forward and one activation-gradient pass (C1).

    Args:
        model: any Hugging Face causal LM, or a module whose output has `.logits` (example, token, vocab).
        input_ids: (example, token) int64, prompt and answer, padded on either side.
        answer_mask: (example, token) bool, True at the answer's tokens.
        attention_mask: (example, token), 0 at padding; without it every position counts.
        aggregation: what p of an answer of several tokens means: "sequence", "geometric" or "token_mean".
        engine: "ghost" (exact or refuses), "autograd" (the reference), "auto" (ghost, else autograd).
        batch_size: sequences a pass; "auto" takes as many as `memory` holds. It does not change the scores.
        memory: bytes above the model's weights at the peak of the call, for batch_size "auto". One example that needs
            more is an error before any is scored. None: 2e9, or what the example that needs most takes.
        parameters: name patterns such as "model.layers.29.*" to restrict the norm to; None for all.
        breakdown: whether to keep log U_E by parameter.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is wanted.
    """
    options: dict[str, Any] = {"engine": engine, "batch_size": batch_size, "memory": memory}
    options |= {"parameters": parameters, "breakdown": breakdown}
    return score_aggregations(model, input_ids, answer_mask, attention_mask, aggregations=(aggregation,), **options)[
        aggregation
    ]


def score_aggregations(
    model: nn.Module,
    input_ids: Tensor,
    answer_mask: Tensor,
    attention_mask: Tensor | None = None,
    *,
    aggregations: Sequence[Aggregation] = ("sequence", "geometric"),
    engine: Engine = "auto",
    batch_size: int | Literal["auto"] = "auto",
    memory: float | None = None,
    parameters: Sequence[str] | None = None,
    breakdown: bool = False,
) -> dict[Aggregation, Estimate]:
    """`score_tokens` for several aggregations at once; they share the forward pass, the first two the backward too."""
    for name in aggregations or (None,):
        if name not in AGGREGATIONS:
            raise ValueError(f"aggregation: {name!r} given, one of {', '.join(AGGREGATIONS)} wanted")
    check_model(model)
    select_parameters(model, parameters)  # refused here, before a forward pass tries the model
    sequences = checked(model, input_ids, answer_mask, attention_mask)
    pieces: dict[Aggregation, list[Estimate]] = {name: [] for name in aggregations}
    order: list[int] = []
    fit: dict[str, Any] = {}
    if batch_size == "auto" and (len(sequences) > 1 or memory is not None):
        fit = {"cost": pass_cost(model, sequences, parameters), "room": 2e9 if memory is None else memory}
        gradients = max(p.nbytes for p in model.parameters()) * 3.0 * (engine == "autograd")
        most = max(fit["cost"]([one]) for one in sequences)
        room(math.inf if memory is None else memory, gradients, most, "a pass of one example")
    for batch in batches(sequences, batch_size, by_answer="token_mean" in aggregations, **fit):
        order += batch.rows
        whole, tokens = _differentiate(model, batch, aggregations, engine, parameters)
        subset = "all" if parameters is None else ", ".join(parameters)
        for name in aggregations:
            norms = tokens if name == "token_mean" else whole
            assert norms is not None
            pieces[name].append(_estimate(name, batch, norms, subset=subset, breakdown=breakdown))
    back = torch.tensor(order).argsort()
    return {name: _join(parts, back) for name, parts in pieces.items()}


def log_probs(
    model: nn.Module,
    input_ids: Tensor,
    answer_mask: Tensor,
    attention_mask: Tensor | None = None,
    *,
    batch_size: int | Literal["auto"] = "auto",
) -> tuple[Tensor, Tensor]:
    """S, the answers' log-probabilities in nats, and their numbers of tokens, from forward passes alone.

    Returns (example,) float64 and (example,) int64. Raises as `score_tokens`.
    """
    sequences = checked(model, input_ids, answer_mask, attention_mask)
    totals = torch.zeros(len(sequences), dtype=torch.float64)
    counts = torch.tensor([int(answer.sum()) for _, answer in sequences])
    with torch.no_grad(), repeatable():
        for batch in batches(sequences, batch_size):
            values = token_log_probs(model, batch)
            check_finite(values, batch)
            totals[batch.rows] = values.double().sum(1).cpu()
    return totals, counts


def inner_products(
    model: nn.Module,
    input_ids: Tensor,
    answer_mask: Tensor,
    attention_mask: Tensor | None = None,
    *,
    others: tuple[Tensor, Tensor, Tensor | None] | None = None,
    engine: Engine = "auto",
    memory: float = 4e9,
    progress: bool = False,
) -> Tensor:
    """⟨∇θ S_i, ∇θ S_j⟩ over all parameters: (example, example), or (example, other) where `others` are given; float64.

    `others` is (input_ids, answer_mask, attention_mask) of a second set. `memory` bounds the bytes above the model's
    weights at the peak of the call; less memory means more passes, and too little is an error that says how much is
    needed, before the work starts. No gradient of the whole model is ever formed, but by engine "autograd". Raises as
    `score_tokens`.
    """
    options: dict[str, Any] = {"engine": engine, "memory": memory, "progress": progress}
    found = gram(model, (input_ids, answer_mask, attention_mask), others, **options)
    return found.rows if others is None else found.between


def gram(
    model: nn.Module,
    rows: tuple[Tensor, Tensor, Tensor | None],
    others: tuple[Tensor, Tensor, Tensor | None] | None = None,
    *,
    engine: Engine = "auto",
    memory: float = 4e9,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Gram:
    """All of `inner_products` at once: rows with rows, rows with others, and the others' ‖∇S‖², in the given order.

    `rows` and `others` are (input_ids, answer_mask, attention_mask). Products among the others, as a rule the larger
    set, are not taken. `memory` as in `inner_products`. With a `checkpoint` of this very run (same
    model, examples, memory, code), a run that was killed goes on where it was.
    """
    sets = [checked(model, *rows), [] if others is None else checked(model, *others)]
    cost, in_pass = pass_cost(model, [*sets[0], *sets[1]], None), 0.0
    work: list[list[tuple[Objective, int]]] = [[], []]
    order: list[list[int]] = [[], []]
    for place, sequences in enumerate(sets):
        chosen = batches(sequences, "auto", cost=cost, room=memory / 8)  # most is for what passes leave
        sizes = [(cost([sequences[row] for row in batch.rows]), batch) for batch in chosen]
        for size, batch in sorted(
            sizes, key=lambda x: x[0] / len(x[1].rows), reverse=True
        ):  # the first tells what fits
            in_pass = max(in_pass, size)
            order[place] += batch.rows
            work[place].append((functools.partial(_whole_log_prob, model, batch), len(batch.rows)))
    options: dict[str, Any] = {"engine": engine, "memory": memory, "in_pass": in_pass, "progress": progress}
    found = gradient_products(model, *work, **options, checkpoint=checkpoint)
    row, other = (torch.tensor(places, dtype=torch.int64).argsort() for places in order)
    return Gram(found.rows[row][:, row], found.between[row][:, other], found.squares[other])


def score_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    aggregation: Aggregation = "sequence",
    engine: Engine = "auto",
    batch_size: int | Literal["auto"] = 8,
) -> pd.DataFrame:
    """Score each answer as the continuation of its prompt: a table with a row per pair, in order.

    A pair is tokenised as one text and split where the answer begins; special tokens go before the prompt only. Give
    the answer its leading space where the text has one. Where a token of that text has characters of both (a prompt
    that ends with a space does it), prompt and answer are tokenised apart, and column `straddles` is True.

    Returns columns prompt, answer, n_tokens, log_prob (nats), probability, aleatoric, epistemic, log_epistemic,
    straddles. Raises ValueError for lists of different length, an empty answer, or a text longer than the model's
    context; TypeError for what is no text.
    """
    if isinstance(prompts, str) or isinstance(answers, str):
        raise TypeError("prompts and answers: a string given, lists of strings wanted")
    if len(prompts) != len(answers):
        raise ValueError(f"answers: {len(answers)} given for {len(prompts)} prompts, as many wanted")
    pairs = [encoding.pair(tokenizer, *texts, i) for i, texts in enumerate(zip(prompts, answers, strict=True))]
    scores = score_ids(model, pairs, aggregation=aggregation, engine=engine, batch_size=batch_size)
    columns = ("n_tokens", "log_prob", "probability", "aleatoric", "epistemic", "log_epistemic")
    table = {name: getattr(scores, name).numpy() for name in columns}
    straddles = [pair.straddles for pair in pairs]
    return pd.DataFrame({"prompt": list(prompts), "answer": list(answers), **table, "straddles": straddles})


def score_ids(model: nn.Module, pairs: Sequence[Sequence[Any]], **options: Any) -> Estimate:
    """`score_tokens` for prompt ids and answer ids, the first two of each pair; `options` are its keyword arguments."""
    return score_tokens(model, *pad([pair[0] for pair in pairs], [pair[1] for pair in pairs]), **options)


def encode(tokenizer: PreTrainedTokenizerBase, place: int, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of its answer, as `encoding.pair` finds them; `place` names the pair in errors."""
    return encoding.pair(tokenizer, prompt, answer, place)[:2]


def _differentiate(
    model: nn.Module,
    batch: Batch,
    aggregations: Sequence[Aggregation],
    engine: Engine,
    parameters: Sequence[str] | None,
) -> tuple[SquaredNorms | None, SquaredNorms | None]:
    """Values and squared gradient norms of S, and of each answer token's log p, where `aggregations` ask for them."""
    whole = any(name != "token_mean" for name in aggregations)
    tokens = "token_mean" in aggregations
    longest = int(batch.answer.sum(1).max())
    extra = padding(model, batch)

    def objective(rows: slice) -> Tensor:
        part = batch.part(rows)
        part = part if len(part.rows) < len(batch.rows) else part.padded(extra)
        values = token_log_probs(model, part)
        check_finite(values, part)
        values = nn.functional.pad(values, (0, longest - values.shape[1]))
        return estimate.log_odds(torch.cat([values.sum(1, keepdim=True)] * whole + [values] * tokens, dim=1))

    options: dict[str, Any] = {"engine": engine, "parameters": parameters, "rows": batch.rows}
    norms = squared_norms(model, objective, len(batch.ids), apart=True, **options)
    first = norms.columns(slice(0, 1)) if whole else None
    return first, norms.columns(slice(int(whole), None)) if tokens else None


def _whole_log_prob(model: nn.Module, batch: Batch, rows: slice) -> Tensor:
    part = batch.part(rows)
    values = token_log_probs(model, part)
    check_finite(values, part)
    return values.sum(1, keepdim=True)


def _estimate(name: Aggregation, batch: Batch, norms: SquaredNorms, *, subset: str, breakdown: bool) -> Estimate:
    """One batch's Estimate, from log odds; for `token_mean` the norms' columns are tokens."""
    n_tokens = batch.answer.sum(1)
    exists = torch.arange(norms.objective.shape[1])[None] < n_tokens[:, None]
    log_p = estimate.from_log_odds(norms.objective, norms.total)[0].masked_fill(~exists, 0)

    def aggregate(squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_G = estimate.from_log_odds(norms.objective, squares)[1]
        if name == "token_mean":
            return estimate.token_mean(log_p, log_G, exists)
        if name == "geometric":
            return estimate.geometric(log_p[:, 0], log_G[:, 0], n_tokens)
        return estimate.sequence(log_p[:, 0], log_G[:, 0])

    S = log_p.sum(1)
    log_mean = log_p.masked_fill(~exists, -torch.inf).logsumexp(1) - n_tokens.double().log()
    probability, aleatoric, log_epistemic = aggregate(norms.total)
    parts = {p: aggregate(norms.by_parameter[..., i])[2] for i, p in enumerate(norms.names)} if breakdown else None
    return Estimate(
        log_prob=S,
        n_tokens=n_tokens,
        probability=probability,
        aleatoric=aleatoric,
        log_epistemic=log_epistemic,
        engine=norms.engine,
        n_parameters=norms.n_parameters,
        parameters=subset,
        breakdown=parts,
        log_probability={"sequence": S, "geometric": S / n_tokens, "token_mean": log_mean}[name],
    )


def _join(parts: Sequence[Estimate], order: Tensor) -> Estimate:
    """The batches' estimates as one, its examples in `order`."""
    columns = ("log_prob", "n_tokens", "probability", "aleatoric", "log_epistemic", "log_probability")
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts])[order] for name in columns}
    by_name = parts[0].breakdown
    if by_name is not None:
        by_name = {name: torch.cat([part.breakdown[name] for part in parts])[order] for name in by_name}  # type: ignore[index]
    engines = sorted({part.engine for part in parts})
    return replace(parts[0], **joined, breakdown=by_name, engine="+".join(engines))
