"""The choice among given answers: log p of every candidate, with the work that candidates share done once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from isouq.studies.qa.generation import read, shared_length

CANDIDATE_ROWS = 8  # candidates per forward pass: bounds the logits, rows × tokens × vocabulary


@torch.inference_mode()
def candidate_log_probs(
    model: Any, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]
) -> list[Float[Tensor, " candidate"]]:
    """Return log p (nats, the sum over tokens) of every candidate answer of every prompt.

    Equal to one forward pass per candidate, but shared work is done once: the tokens that all prompts have
    in common, then each prompt, then its candidates together, padded on the right.
    """
    shared = shared_length(prompts)
    common = read(model, prompts[0][:shared])[0] if shared else None
    results = []
    for prompt, answers in zip(prompts, candidates, strict=True):
        if not answers or not all(answers):
            raise ValueError("candidates: every prompt needs at least one candidate, none of them empty")
        cache, logits = read(model, prompt[shared:], copy.deepcopy(common), shared)
        groups = [answers[i : i + CANDIDATE_ROWS] for i in range(0, len(answers), CANDIDATE_ROWS)]
        parts = [_sum_log_probs(model, copy.deepcopy(cache), logits, group, len(prompt)) for group in groups]
        results.append(torch.cat(parts))
    return results


def _sum_log_probs(
    model: Any, cache: Any, first_logits: Tensor, answers: Sequence[Sequence[int]], n_prompt: int
) -> Float[Tensor, " candidate"]:
    """Return log p of answers to one cached prompt whose next-token logits (1, 1, vocab) are given."""
    ids = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True).to(first_logits.device)
    n_rows, n_tokens = ids.shape
    lengths = torch.tensor(list(map(len, answers)), device=ids.device)
    mask = torch.arange(n_tokens, device=ids.device) < lengths[:, None]
    logits = first_logits.expand(n_rows, 1, -1)
    if n_tokens > 1:
        cache.batch_repeat_interleave(n_rows)
        later = model(
            input_ids=ids[:, :-1],
            attention_mask=torch.cat([mask.new_ones(n_rows, n_prompt), mask[:, :-1]], 1).long(),
            position_ids=torch.arange(n_prompt, n_prompt + n_tokens - 1, device=ids.device).expand(n_rows, -1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=n_tokens - 1,
        ).logits
        logits = torch.cat([logits, later], 1)
    chosen = logits.gather(-1, ids[..., None])[..., 0].double() - logits.double().logsumexp(-1)
    return (chosen * mask).sum(-1).cpu()
