"""Each token of an answer by itself: its own p_t = p(y_t | x, y_<t), U_A = p_t(1 − p_t) and U_E = ‖∇θ p_t‖².

`token_mean` averages these. They cost a backward pass for each token of the longest answer in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from isouq import estimate
from isouq.gradients import Engine
from isouq.language.examples import BatchSize, from_pairs
from isouq.language.scoring import Scoring, answer_norms, text_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 4  # ids before an answer that decide how its first token is written, such as with a space
UNFINISHED = "\ufffd"  # what a tokenizer writes for part of a character


def score_each_token(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    chat: bool = False,
    system: str | None = None,
    engine: Engine = "auto",
    batch_size: BatchSize = "auto",
    memory: float | None = None,
    parameters: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Uncertainty of every token of every answer, each given the prompt and the tokens before it.

    Args:
        model, tokenizer, prompts, answers, chat, system: As in `score_texts`.
        engine, batch_size, memory, parameters: As in `score_tokens`.

    Returns:
        A table with one row per token, in order: example (from 0), position in the answer (from 0), token (its text),
        log_prob (log p_t in nats), aleatoric (p_t(1 − p_t)) and log_epistemic (log ‖∇θ p_t‖², in units of the parameter
        variance σ²; −inf where the gradient is exactly zero). The texts of an answer's tokens put together are the
        answer: where a character takes several tokens, the last of them has it and the others are empty. Over an
        answer's tokens the means of p_t, U_A and U_E are those of aggregation "token_mean".

    Raises:
        ValueError, TypeError: As `score_texts` and `score_tokens`.

    Example:
        With a model and its tokenizer, here one of single letters, from `load_causal_lm`:

        >>> table = isouq.score_each_token(model, tokenizer, ["is it a?"], [" yes"])
        >>> table[["example", "position"]].values.tolist()
        [[0, 0], [0, 1], [0, 2], [0, 3]]
    """
    pairs = text_pairs(tokenizer, prompts, answers, chat, system)
    how = Scoring(
        aggregations=("token_mean",), engine=engine, batch_size=batch_size, memory=memory, parameters=parameters
    )
    norms = answer_norms(model, from_pairs(pair[:2] for pair in pairs), how)
    exists = torch.arange(norms.objective.shape[1]) < torch.tensor([[len(pair.answer)] for pair in pairs])
    log_p, log_G = (values[exists] for values in estimate.from_log_odds(norms.objective, norms.total))
    example, position = exists.nonzero(as_tuple=True)
    columns = {
        "log_prob": log_p,
        "aleatoric": estimate.bernoulli_variance(log_p),
        "log_epistemic": estimate.delta_method(log_p, log_G),
    }
    texts = [text for pair in pairs for text in token_texts(tokenizer, pair.prompt, pair.answer)]
    table = pd.DataFrame({"example": example.numpy(), "position": position.numpy(), "token": texts})
    return table.assign(**{name: values.numpy() for name, values in columns.items()})


def token_texts(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
    """The text that each of the answer's ids adds to what stands before it; "" inside a character of several ids."""
    before = list(prompt)[-CONTEXT:]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    wholes = [tokenizer.decode([*before, *answer[:n]], **options) for n in range(len(answer) + 1)]
    texts, told = [], len(wholes[0])
    for whole in wholes[1:]:
        end = told if whole.endswith(UNFINISHED) else len(whole)
        texts.append(whole[told:end])
        told = end
    texts[-1] += wholes[-1][told:]
    return texts


def trace(table: pd.DataFrame) -> pd.DataFrame:
    """The course of log U_E over each answer's tokens, in a few numbers.

    Grünefeld et al. (2026, arXiv 2605.07776) predict whether a chain of thought ends well from such a profile of its
    uncertainty, with slope and linearity in it. Theirs is of U_E; ours of its logarithm, which keeps its digits.

    Args:
        table: What `score_each_token` gives, or any table with columns example, position and log_epistemic.

    Returns:
        A table with one row per example, indexed by example. n_tokens. level: the mean of log U_E over tokens. slope:
        by least squares of log U_E on the place in the answer, 0 at its first token and 1 at its last, so in nats from
        one end to the other. linearity: R², the share of log U_E's variance that this line explains. peak: the largest
        log U_E, and peak_position where it is first reached. Tokens with a gradient of exactly zero, whose log U_E is
        −inf, count in n_tokens only; slope and linearity are NaN with fewer than two others, linearity also where log
        U_E does not vary.

    Raises:
        ValueError: A column is missing, or log_epistemic has NaN.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"example": 0, "position": [0, 1, 2], "log_epistemic": [-1.0, -2.0, -6.0]})
        >>> isouq.trace(table).loc[0, ["level", "slope", "peak"]].tolist()
        [-3.0, -5.0, -1.0]
    """
    for name in ("example", "position", "log_epistemic"):
        if name not in table:
            raise ValueError(f"table: columns {', '.join(map(str, table))} given, {name!r} wanted among them")
    if table["log_epistemic"].isna().any():
        raise ValueError("table: log_epistemic has NaN, numbers wanted; leave out what could not be scored")
    rows = {key: _profile(answer.sort_values("position")) for key, answer in table.groupby("example", sort=False)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("example")


def _profile(answer: pd.DataFrame) -> dict[str, Any]:
    used = answer[answer["log_epistemic"] > -np.inf]
    y, place = used["log_epistemic"].to_numpy(), used["position"].to_numpy() / max(answer["position"].max(), 1)
    profile = {"n_tokens": len(answer), "level": y.mean() if len(y) else -np.inf, "slope": np.nan, "linearity": np.nan}
    if len(y) > 1:
        x, deviation = place - place.mean(), y - y.mean()
        profile["slope"] = x @ deviation / (x @ x)
        if np.ptp(y) > 0:
            profile["linearity"] = profile["slope"] * (x @ deviation) / (deviation @ deviation)
    peak = answer["log_epistemic"].to_numpy().argmax()
    return profile | {"peak": answer["log_epistemic"].iloc[peak], "peak_position": answer["position"].iloc[peak]}
