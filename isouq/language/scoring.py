"""Causal language models: answers as token ids or texts → `Estimate`, table, or inner products of gradients.

The token at position t is predicted from position t − 1. Scores are of the given ids, never of re-tokenised text. The
model is used as it is, over all its parameters; nothing is left on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor, nn

from isouq import estimate
from isouq.estimate import AGGREGATIONS, Aggregation, Estimate
from isouq.gradients import Engine, Objective, SquaredNorms, squared_norms
from isouq.gradients.model import check_model, repeatable, select_parameters
from isouq.gradients.products import Gram, room
from isouq.gradients.products import inner_products as gradient_products
from isouq.language import encoding
from isouq.language.chat import Prompting
from isouq.language.examples import Batch, BatchSize, Example, batches, from_pairs, from_rectangle
from isouq.language.forward import check_examples, finite_log_probs, padding, pass_cost

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORES = ("n_tokens", "log_prob", "probability", "aleatoric", "epistemic", "log_epistemic")  # columns of a table


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How answers are scored: the keyword arguments of `score_tokens`, with any number of aggregations."""

    aggregations: tuple[Aggregation, ...] = ("sequence",)
    engine: Engine = "auto"
    batch_size: BatchSize = "auto"
    memory: float | None = None
    parameters: Sequence[str] | None = None
    breakdown: bool = False

    def __post_init__(self) -> None:
        for name in self.aggregations or (None,):
            if name not in AGGREGATIONS:
                raise ValueError(f"aggregation: {name!r} given, one of {', '.join(AGGREGATIONS)} wanted")


def aggregations_of(aggregation: Aggregation | Literal["all"]) -> tuple[Aggregation, ...]:
    """The aggregations that a name stands for."""
    return AGGREGATIONS if aggregation == "all" else (aggregation,)


def columns(aggregations: Sequence[Aggregation]) -> dict[str, tuple[Aggregation, str]]:
    """A table's columns of scores: the aggregation and the field of `Estimate` that each holds.

    Where there are several, all but "sequence" have theirs as a suffix; n_tokens and log_prob are the same for all.

    >>> list(columns(("sequence", "geometric")))[5:]
    ['log_epistemic', 'probability_geometric', 'aleatoric_geometric', 'epistemic_geometric', 'log_epistemic_geometric']
    """
    shared = {field: (aggregations[0], field) for field in SCORES[:2]}
    suffixes = {name: f"_{name}" if len(aggregations) > 1 and name != "sequence" else "" for name in aggregations}
    return shared | {f"{field}{suffixes[name]}": (name, field) for name in aggregations for field in SCORES[2:]}


def table(estimates: Mapping[Aggregation, Estimate]) -> dict[str, Tensor]:
    """The columns of scores, (example,) each, of what `score` returns."""
    return {name: getattr(estimates[of], field) for name, (of, field) in columns(list(estimates)).items()}


def score_tokens(
    model: nn.Module,
    input_ids: Tensor,
    answer_mask: Tensor,
    attention_mask: Tensor | None = None,
    *,
    aggregation: Aggregation = "sequence",
    engine: Engine = "auto",
    batch_size: BatchSize = "auto",
    memory: float | None = None,
    parameters: Sequence[str] | None = None,
    breakdown: bool = False,
) -> Estimate:
    """Epistemic and aleatoric uncertainty of each answer, from one forward and one activation-gradient pass (C1).

    Args:
        model: Any Hugging Face causal LM, or a module whose output has `.logits` (example, token, vocab).
        input_ids: Prompt and answer, (example, token) int64, padded on either side.
        answer_mask: (example, token) bool, True at the answer's tokens, which need not be next to one another.
        attention_mask: (example, token), 0 at padding. Without it every position counts.
        aggregation: What p of an answer of several tokens means: "sequence", "geometric" or "token_mean".
        engine: "ghost" (exact, or refuses), "autograd" (the reference) or "auto" (ghost, else autograd).
        batch_size: Examples a pass; "auto" takes as many as `memory` holds. It does not change the scores.
        memory: Bytes above the model's weights at the peak of the call, for batch_size "auto". One example that needs
            more is an error before any is scored. None means 2e9, or what the largest example takes.
        parameters: Name patterns such as "model.layers.29.*" to which the norm is restricted; None for all.
        breakdown: Whether to keep log U_E by parameter.

    Returns:
        An `Estimate` whose tensors are (example,) float64: log-probabilities in nats, U_A as a variance of
        probability, and U_E in units of the parameter variance σ².

    Raises:
        ValueError, TypeError: An argument is wrong, or the model is not causal, is in a training mode that changes its
            output, or is not finite. The message names the argument, what was given and what is wanted.

    Example:
        With a model from `load_causal_lm`:

        >>> ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
        >>> answer_mask = torch.tensor([[False, False, True, True], [False, False, False, True]])
        >>> scores = isouq.score_tokens(model, ids, answer_mask)
        >>> scores.log_epistemic.shape, scores.n_tokens.tolist(), scores.engine
        (torch.Size([2]), [2, 1], 'ghost')
    """
    how = Scoring(
        aggregations=(aggregation,),
        engine=engine,
        batch_size=batch_size,
        memory=memory,
        parameters=parameters,
        breakdown=breakdown,
    )
    return score(model, from_rectangle(input_ids, answer_mask, attention_mask), how)[aggregation]


def score_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    chat: bool = False,
    system: str | None = None,
    aggregation: Aggregation | Literal["all"] = "sequence",
    engine: Engine = "auto",
    batch_size: BatchSize = 8,
) -> pd.DataFrame:
    """Score each answer as the continuation of its prompt, or as the model's turn after it.

    A pair is tokenised as one text and split where the answer begins; special tokens go before the prompt only, once
    where its text begins with one. Give the answer its leading space where the text has one; in a chat it has none.

    Args:
        model: Any Hugging Face causal LM.
        tokenizer: The model's tokenizer.
        prompts: One text per example.
        answers: One text per prompt, of at least one token.
        chat: Whether prompts are a user's turns, by the tokenizer's own chat template.
        system: In a chat, the text of a system message before each prompt.
        aggregation: As in `score_tokens`, or "all".
        engine, batch_size: As in `score_tokens`.

    Returns:
        A table with one row per pair, in order. Columns: prompt, answer, n_tokens, log_prob (nats), probability,
        aleatoric, epistemic and log_epistemic (U_E in units of the parameter variance σ²), and straddles: True where
        one token of the text has characters of both prompt and answer, which are then tokenised apart. A prompt that
        ends with a space often does that. With aggregation "all", the four of "geometric" and "token_mean" follow
        under names that end with _geometric and _token_mean.

    Raises:
        ValueError: The lists differ in length, an answer is empty, a text exceeds the model's context, or a chat is
            asked for and the tokenizer has no chat template.
        TypeError: A prompt or an answer is not a string.

    Example:
        With a model and its tokenizer, here one of single letters, from `load_causal_lm`:

        >>> table = isouq.score_texts(model, tokenizer, ["is it a?", "is it b?"], [" yes", " no"])
        >>> table[["answer", "n_tokens"]].values.tolist()
        [[' yes', 4], [' no', 3]]
    """
    pairs = text_pairs(tokenizer, prompts, answers, chat, system)
    how = Scoring(aggregations=aggregations_of(aggregation), engine=engine, batch_size=batch_size)
    scores = table(score(model, from_pairs(pair[:2] for pair in pairs), how))
    straddles = [pair.straddles for pair in pairs]
    texts = {"prompt": list(prompts), "answer": list(answers)}
    return pd.DataFrame({**texts, **{name: x.numpy() for name, x in scores.items()}, "straddles": straddles})


def text_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    chat: bool = False,
    system: str | None = None,
) -> list[encoding.Pair]:
    """The ids of each prompt with its answer. Raises as `score_texts`."""
    if isinstance(prompts, str) or isinstance(answers, str):
        raise TypeError("prompts and answers: a string given, lists of strings wanted")
    if len(prompts) != len(answers):
        raise ValueError(f"answers: {len(answers)} given for {len(prompts)} prompts, as many wanted")
    ask = Prompting(tokenizer, chat, system)
    return [ask.pair(*texts, i) for i, texts in enumerate(zip(prompts, answers, strict=True))]


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
    """Inner products ⟨∇θ S_i, ∇θ S_j⟩ of the gradients of the answers' log-probabilities, over all parameters.

    No gradient of the whole model is ever formed, except by engine "autograd".

    Args:
        model, input_ids, answer_mask, attention_mask, engine: As in `score_tokens`.
        others: Ids and masks of a second set of examples.
        memory: Bytes above the model's weights at the peak of the call. Less memory means more passes.
        progress: Whether to show a progress bar.

    Returns:
        (example, example) float64 in nats² per unit of σ², or (example, other) where `others` are given.

    Raises:
        ValueError, TypeError: As `score_tokens`; also where `memory` is too small, before the work starts.

    Example:
        With a model from `load_causal_lm`:

        >>> ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
        >>> last = torch.tensor([[False, False, False, True]]).expand(2, 4)
        >>> products = isouq.inner_products(model, ids, last)
        >>> products.shape, torch.allclose(products, products.T)
        (torch.Size([2, 2]), True)
    """
    rows = from_rectangle(input_ids, answer_mask, attention_mask)
    if others is not None and not (isinstance(others, tuple | list) and len(others) in (2, 3)):
        raise TypeError(f"others: {type(others).__name__} given, a tuple of ids and one or two masks wanted")
    columns = [] if others is None else from_rectangle(*others)
    products = gram(model, rows, columns, engine=engine, memory=memory, progress=progress)
    return products.rows if others is None else products.between


def score(model: nn.Module, examples: Sequence[Example], how: Scoring) -> dict[Aggregation, Estimate]:
    """An `Estimate` for each aggregation; they share the forward pass, and "sequence" and "geometric" the backward too.

    Raises as `score_tokens`.
    """
    norms = answer_norms(model, examples, how)
    n_tokens = torch.tensor([example.n_answer for example in examples])
    return {name: _estimate(name, n_tokens, norms, how) for name in how.aggregations}


def answer_norms(model: nn.Module, examples: Sequence[Example], how: Scoring) -> SquaredNorms:
    """The squared norms that the aggregations need, of log odds: see `_squared_norms`. Raises as `score_tokens`."""
    check_model(model)
    select_parameters(model, how.parameters)  # refused here, before a forward pass tries the model
    check_examples(model, examples)
    parts, order = [], []
    for batch in _batches(model, examples, how):
        parts.append(_squared_norms(model, batch, how))
        order += batch.rows
    return SquaredNorms.joined(parts, torch.tensor(order).argsort())


def log_probs(
    model: nn.Module, examples: Sequence[Example], *, batch_size: BatchSize = "auto"
) -> tuple[Tensor, Tensor]:
    """S, the answers' log-probabilities in nats, and their numbers of tokens, from forward passes alone.

    Returns (example,) float64 and (example,) int64. Raises as `score_tokens`.
    """
    check_model(model)
    check_examples(model, examples)
    totals = torch.zeros(len(examples), dtype=torch.float64)
    with torch.no_grad(), repeatable():
        for batch in batches(examples, batch_size):
            totals[batch.rows] = finite_log_probs(model, batch).double().sum(1).cpu()
    return totals, torch.tensor([example.n_answer for example in examples])


def gram(
    model: nn.Module,
    rows: Sequence[Example],
    others: Sequence[Example] = (),
    *,
    engine: Engine = "auto",
    memory: float = 4e9,
    progress: bool = False,
    checkpoint: Any = None,
) -> Gram:
    """All of `inner_products` at once: rows with rows, rows with others, and the others' ‖∇S‖², in the given order.

    Products among the others, usually the larger set, are not taken. `memory` as in `inner_products`. With a
    `checkpoint` of this very run (same model, examples, memory, code), a run that was killed resumes.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine: {engine!r} given, one of {', '.join(get_args(Engine))} wanted")
    room(memory, 0.0, 0.0, "nothing")
    check_model(model)
    for examples in (rows, others) if others else (rows,):
        check_examples(model, examples)
    cost = pass_cost(model, [*rows, *others])
    work, sizes, order = zip(*(_gram_work(model, x, cost, memory) for x in (rows, others)), strict=True)
    products = gradient_products(
        model, *work, engine=engine, memory=memory, in_pass=max(sizes), progress=progress, checkpoint=checkpoint
    )
    row, other = order
    return Gram(products.rows[row][:, row], products.between[row][:, other], products.squares[other])


def _gram_work(
    model: nn.Module, examples: Sequence[Example], cost: Callable[[Sequence[Example]], float], memory: float
) -> tuple[list[tuple[Objective, int]], float, Tensor]:
    """One set's batches as (objective, size), the bytes of the largest pass, and the order back to the caller's.

    A pass gets an eighth of the memory: most is for the factors that passes leave.
    """

    def size(batch: Batch) -> float:
        return cost([examples[row] for row in batch.rows])

    def log_prob(batch: Batch, rows: slice) -> Tensor:
        return finite_log_probs(model, batch.part(rows)).sum(1, keepdim=True)

    work = list(batches(examples, "auto", cost=cost, room=memory / 8))
    work.sort(key=lambda batch: size(batch) / len(batch.rows), reverse=True)  # the first batch tells what fits
    objectives: list[tuple[Objective, int]] = [(functools.partial(log_prob, batch), len(batch.rows)) for batch in work]
    order = torch.tensor([row for batch in work for row in batch.rows], dtype=torch.int64).argsort()
    return objectives, max(map(size, work), default=0.0), order


def _batches(model: nn.Module, examples: Sequence[Example], how: Scoring) -> Iterator[Batch]:
    """Batches that fit `how.memory`, where the caller leaves their size open."""
    by_answer = "token_mean" in how.aggregations
    if how.batch_size != "auto" or (len(examples) == 1 and how.memory is None):
        return batches(examples, how.batch_size, by_answer=by_answer)
    cost = pass_cost(model, examples, how.parameters)
    gradients = 3.0 * max(p.nbytes for p in model.parameters()) * (how.engine == "autograd")
    most = max(cost([example]) for example in examples)
    room(math.inf if how.memory is None else how.memory, gradients, most, "a pass of one example")
    memory = 2e9 if how.memory is None else how.memory
    return batches(examples, "auto", cost=cost, room=memory, by_answer=by_answer)


def _squared_norms(model: nn.Module, batch: Batch, how: Scoring) -> SquaredNorms:
    """Of the log odds that are differentiated: in the first column of whole answers, in the others of their tokens."""
    tokens, whole = "token_mean" in how.aggregations, any(name != "token_mean" for name in how.aggregations)
    longest = int(batch.answer.sum(1).max())
    extra = padding(model, batch)

    def objective(rows: slice) -> Tensor:
        part = batch.part(rows)
        values = finite_log_probs(model, part if len(part.rows) < len(batch.rows) else part.padded(extra))
        values = nn.functional.pad(values, (0, longest - values.shape[1]))
        return estimate.log_odds(torch.cat([values.sum(1, keepdim=True)] * whole + [values] * tokens, dim=1))

    asked: dict[str, Any] = {"engine": how.engine, "parameters": how.parameters}
    return squared_norms(model, objective, len(batch.ids), apart=True, rows=batch.rows, **asked)


def _estimate(name: Aggregation, n_tokens: Tensor, norms: SquaredNorms, how: Scoring) -> Estimate:
    norms = norms.columns(slice(-int(n_tokens.max()), None) if name == "token_mean" else slice(0, 1))
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
    by_name = {p: aggregate(norms.by_parameter[..., i])[2] for i, p in enumerate(norms.names) if how.breakdown}
    return Estimate(
        log_prob=S,
        n_tokens=n_tokens,
        probability=probability,
        aleatoric=aleatoric,
        log_epistemic=log_epistemic,
        engine=norms.engine,
        n_parameters=norms.n_parameters,
        parameters="all" if how.parameters is None else ", ".join(how.parameters),
        breakdown=by_name if how.breakdown else None,
        log_probability={"sequence": S, "geometric": S / n_tokens, "token_mean": log_mean}[name],
    )
