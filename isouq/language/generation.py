"""Greedy generation of answers that end with the line.

An answer is the token ids that the model produced, without the token that ended it (the first whose text contains a
newline, or an end-of-sequence token). Exactly these ids are scored; log p does not include the ending token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Stops = tuple[frozenset[int], frozenset[int]]  # the ids that end an answer: newlines, ends of sequence


@dataclass(frozen=True)
class Generation:
    """A generated answer: its ids, its text without surrounding white space, what ended it (newline, eos, length)."""

    token_ids: tuple[int, ...]
    text: str
    ended_by: str


def stop_token_ids(tokenizer: Any, model: Any = None) -> Stops:
    """Return the ids of all tokens whose text contains a newline, and the end-of-sequence ids."""
    vocabulary = [[i] for i in range(len(tokenizer))]
    texts = tokenizer.batch_decode(vocabulary, clean_up_tokenization_spaces=False)
    newline = frozenset(i for i, text in enumerate(texts) if "\n" in text)
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    return newline, frozenset({*declared, tokenizer.eos_token_id} - {None}) - newline


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, stops: Stops, max_new_tokens: int
) -> list[Generation]:
    """Return the greedy continuation of each prompt (token ids), all prompts in one batch, padded on the left."""
    return continuations(model, tokenizer, *left_padded(prompts), stops=stops, max_new_tokens=max_new_tokens)


def left_padded(prompts: Sequence[Sequence[int]], shared: int = 0) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask, (prompt, token) int64; padding goes after the first `shared` tokens."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        places = [*range(shared), *range(longest - len(prompt) + shared, longest)]
        ids[row, places] = torch.tensor(prompt)
        mask[row, places] = 1
    return ids, mask


@torch.inference_mode()
def continuations(
    model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, *, stops: Stops, max_new_tokens: int, cache: Any = None
) -> list[Generation]:
    """Return the greedy continuation of each row of `ids`, whose first tokens `cache` holds; `mask` is 0 at padding.

    The model's own generation config may ask for sampling or penalties, so it is replaced during the call.
    """
    from transformers import GenerationConfig

    ends = sorted(stops[0] | stops[1])
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=0, use_cache=True
    )
    device = model.get_input_embeddings().weight.device
    own, model.generation_config = model.generation_config, greedy
    try:
        whole = model.generate(
            ids.to(device), attention_mask=mask.to(device), past_key_values=cache, generation_config=greedy
        )
    finally:
        model.generation_config = own
    return [_generation(tokenizer, row, stops) for row in whole[:, ids.shape[1] :].tolist()]


def _generation(tokenizer: Any, tokens: list[int], stops: Stops) -> Generation:
    n = next((i for i, token in enumerate(tokens) if token in stops[0] or token in stops[1]), len(tokens))
    ended_by = "length" if n == len(tokens) else "newline" if tokens[n] in stops[0] else "eos"
    return Generation(tuple(tokens[:n]), tokenizer.decode(tokens[:n], skip_special_tokens=True).strip(), ended_by)
