"""How a study asks: prompts and answers as ids, and greedy answers to prompts that share their examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from isouq.language import encoding
from isouq.language.generation import Generation, Stops, continuations, left_padded


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
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, stops: Stops, max_new_tokens: int
) -> list[Generation]:
    """Return the answers of `isouq.language.generation.generate`, reading once the tokens that all prompts share.

    Few-shot prompts share most of their tokens. The rest is padded on its left, behind the shared tokens.
    """
    shared, cache = shared_length(prompts), None
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and max(map(len, prompts)) + max_new_tokens > window:
        shared = 0  # padding between the shared tokens and the rest would push the shared ones out of the window
    if shared:
        cache, _ = read(model, prompts[0][:shared])
        cache.batch_repeat_interleave(len(prompts))
    ids, mask = left_padded(prompts, shared)
    return continuations(model, tokenizer, ids, mask, stops=stops, max_new_tokens=max_new_tokens, cache=cache)


def read(model: Any, ids: Sequence[int], cache: Any = None, n_cached: int = 0) -> tuple[Any, torch.Tensor]:
    """Return the cache and the next token's logits (1, 1, vocab) after one unpadded sequence that continues `cache`."""
    tokens = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    position = torch.arange(n_cached, n_cached + len(ids), device=tokens.device)[None]
    out = model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share, leaving each at least one of its own."""
    shortest = min(map(len, prompts))
    for i in range(shortest - 1):
        if len({prompt[i] for prompt in prompts}) > 1:
            return i
    return shortest - 1
