"""What a model answers: greedy generation that ends with the line, and the choice among given answers.

Conventions, the same everywhere in `qa`. An answer is the token ids that the model produced, without the
token that ended it (the first whose text contains a newline, or an end-of-sequence token); exactly these
ids are stored and scored. What the ending token costs is not part of log p, also not for reference answers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from isouq.language import encoding

CANDIDATE_ROWS = 8  # candidates per forward pass: bounds the logits, rows × tokens × vocabulary


@dataclass(frozen=True)
class Generation:
    """An answer as generated: its ids, its text, and what ended it (newline, eos, or length)."""

    token_ids: tuple[int, ...]
    text: str
    ended_by: str

    @property
    def empty(self) -> bool:
        """Whether nothing was said: no token, or only white space."""
        return self.text == ""


def stop_token_ids(tokenizer: Any, model: Any = None) -> tuple[frozenset[int], frozenset[int]]:
    """Return the ids of all tokens whose text contains a newline, and the end-of-sequence ids."""
    vocabulary = [[i] for i in range(len(tokenizer))]
    texts = tokenizer.batch_decode(vocabulary, clean_up_tokenization_spaces=False)
    newline = frozenset(i for i, text in enumerate(texts) if "\n" in text)
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    return newline, frozenset({*declared, tokenizer.eos_token_id} - {None}) - newline


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Return each prompt's ids with the special tokens that the tokenizer puts in front (Gemma: <bos>), not behind."""
    return [encoding.prompt_ids(tokenizer, prompt) for prompt in prompts]


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """Return the ids of a given answer as they follow a prompt: one leading space, no special tokens.

    It is encoded apart from its prompt, so that prompt and answer never merge into one token.
    """
    return encoding.answer_ids(tokenizer, f" {answer}")


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stops: tuple[frozenset[int], frozenset[int]],
    max_new_tokens: int,
) -> list[Generation]:
    """Return the greedy continuation of each prompt (token ids), all prompts in one batch.

    The tokens that all prompts share (the few-shot examples) run once; the rest is padded on the left,
    masked, and placed by explicit position ids, so that a row's answer does not depend on the others.
    """
    cache, logits, mask = _read_prompts(model, prompts, max_new_tokens)
    rows: list[list[int]] = [[] for _ in prompts]
    ended_by = ["length"] * len(prompts)
    running = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        chosen = logits[:, -1].argmax(-1)
        for row in sorted(running):
            token = int(chosen[row])
            if token in stops[0] or token in stops[1]:
                ended_by[row] = "newline" if token in stops[0] else "eos"
                running.discard(row)
            else:
                rows[row].append(token)
        if not running:
            break
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = _forward(model, chosen[:, None], mask, cache)
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    return [Generation(tuple(row), *rest) for row, *rest in zip(rows, texts, ended_by, strict=True)]


@torch.inference_mode()
def candidate_log_probs(
    model: Any, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]
) -> list[Float[Tensor, " candidate"]]:
    """Return log p (nats, the sum over tokens) of every candidate answer of every prompt.

    Equal to one forward pass per candidate, but shared work is done once: the tokens that all prompts have
    in common, then each prompt, then its candidates together, padded on the right.
    """
    shared = _shared_length(prompts)
    common = _read(model, prompts[0][:shared])[0] if shared else None
    results = []
    for prompt, answers in zip(prompts, candidates, strict=True):
        if not answers or not all(answers):
            raise ValueError("candidates: every prompt needs at least one candidate, none of them empty")
        cache, logits = _read(model, prompt[shared:], copy.deepcopy(common), shared)
        groups = [answers[i : i + CANDIDATE_ROWS] for i in range(0, len(answers), CANDIDATE_ROWS)]
        parts = [_sum_log_probs(model, copy.deepcopy(cache), logits, group, len(prompt)) for group in groups]
        results.append(torch.cat(parts))
    return results


def _sum_log_probs(
    model: Any, cache: Any, first_logits: Tensor, answers: Sequence[Sequence[int]], n_prompt: int
) -> Float[Tensor, " candidate"]:
    """Return log p of answers to one cached prompt whose next-token logits (1, 1, vocab) are given."""
    n_rows, n_tokens = len(answers), max(map(len, answers))
    ids = torch.zeros(n_rows, n_tokens, dtype=torch.long, device=first_logits.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(answer)
        mask[row, : len(answer)] = True
    logits = first_logits.expand(n_rows, 1, -1)
    if n_tokens > 1:
        cache.batch_repeat_interleave(n_rows)
        seen = torch.cat([mask.new_ones(n_rows, n_prompt), mask[:, :-1]], 1)
        later = _forward(model, ids[:, :-1], seen.long(), cache, keep=n_tokens - 1)
        logits = torch.cat([logits, later], 1)
    chosen = logits.gather(-1, ids[..., None])[..., 0].double() - logits.double().logsumexp(-1)
    return (chosen * mask).sum(-1).cpu()


def _read_prompts(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[Any, Tensor, Tensor]:
    """Return the cache, the next-token logits and the attention mask after all prompts, left-padded."""
    longest = max(map(len, prompts))
    shared = _shared_length(prompts)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and longest + max_new_tokens > window:
        shared = 0  # padding between the shared part and the rest would push the shared part out of the window
    rest = longest - shared
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(len(prompts), rest, dtype=torch.long, device=device)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    mask[:, :shared] = 1
    for row, prompt in enumerate(prompts):
        ids[row, rest - len(prompt) + shared :] = torch.tensor(prompt[shared:])
        mask[row, longest - len(prompt) + shared :] = 1
    cache = None
    if shared:
        cache, _ = _read(model, prompts[0][:shared])
        cache.batch_repeat_interleave(len(prompts))
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, -rest:]
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.past_key_values, out.logits, mask


def _read(model: Any, ids: Sequence[int], cache: Any = None, n_cached: int = 0) -> tuple[Any, Tensor]:
    """Return the cache and the next-token logits after one unpadded sequence that continues `cache`."""
    tokens = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    position = torch.arange(n_cached, n_cached + len(ids), device=tokens.device)[None]
    out = model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits


def _forward(model: Any, ids: Tensor, mask: Tensor, cache: Any, keep: int = 1) -> Tensor:
    """Return the last `keep` logits of tokens that continue `cache`; `mask` covers cached and new tokens."""
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    ).logits


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share, leaving each at least one of its own."""
    shortest = min(map(len, prompts))
    for i in range(shortest - 1):
        if len({prompt[i] for prompt in prompts}) > 1:
            return i
    return shortest - 1
