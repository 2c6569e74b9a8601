"""How a study asks: prompts and answers as ids, greedy answers, drawn ones, given ones to choose from, the next word.

All prompts of a call are read together, and what they share (few-shot examples) is read once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from isouq.language import encoding
from isouq.language.generation import Generation, Stops, continuations, left_padded

CANDIDATE_ROWS = 8  # candidates per forward pass: bounds the logits, rows × tokens × vocabulary
FINISHED = 0.25  # share of finished samples from which they are dropped from a batch; dropping copies the cache


def encode_prompts(tokenizer: Any, prompts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
    """Return each prompt's ids with the special tokens that the tokenizer puts in front (Gemma: <bos>), not behind.

    `chat`: as a user's turn, up to where the model's turn begins, by the chat template.
    """
    if not chat:
        return [encoding.prompt_ids(tokenizer, prompt) for prompt in prompts]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return [list(tokenizer.apply_chat_template([{"role": "user", "content": text}], **options)) for text in prompts]


def encode_answer(tokenizer: Any, answer: str, before: str = " ") -> list[int]:
    """Return the ids of a given answer as they follow a prompt: after one space, or `before`; no special tokens.

    It is encoded apart from its prompt, so that prompt and answer never merge into one token.
    """
    return encoding.answer_ids(tokenizer, f"{before}{answer}")


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, stops: Stops, max_new_tokens: int
) -> list[Generation]:
    """Return the answers of `isouq.language.generation.generate`, reading once the tokens that all prompts share.

    Few-shot prompts share most of their tokens. The rest is padded on its left, behind the shared tokens.
    """
    shared, cache = _read_shared(model, prompts, max_new_tokens)
    ids, mask = left_padded(prompts, shared)
    return continuations(model, tokenizer, ids, mask, stops=stops, max_new_tokens=max_new_tokens, cache=cache)


class Sample(NamedTuple):
    """An answer drawn at temperature 1: its ids, its text, and its log-probability in nats.

    `log_prob` is over `n_steps` tokens: the answer's and, where the model ended it, the token that did. Without that
    one an answer that ends at once would have no probability, and those of all answers would add up to more than 1.
    """

    token_ids: tuple[int, ...]
    text: str
    log_prob: float
    n_steps: int


@torch.inference_mode()
def draw(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    numbers: Float[NDArray[np.float64], "prompt sample token"],
    *,
    stops: Stops,
) -> list[list[Sample]]:
    """Draw answers at temperature 1, those of all prompts decoded together; a prompt is read once for all of its own.

    Each token takes one of `numbers`, uniform on [0, 1): it is the one at which the cumulated probabilities pass that
    number. So a sample does not depend on what else is in the batch. The last axis is the most tokens of an answer.
    """
    n_samples, max_new_tokens = numbers.shape[1:]
    cache, logits, mask = _read_all(model, prompts, max_new_tokens)
    cache.batch_repeat_interleave(n_samples)
    logits, mask = logits.repeat_interleave(n_samples, 0), mask.repeat_interleave(n_samples, 0)
    uniform = torch.from_numpy(numbers).flatten(0, 1).to(logits.device)
    ends = torch.tensor(sorted(stops[0] | stops[1]), device=logits.device)
    rows = torch.arange(len(uniform), device=logits.device)  # of the batch, in which finished ones may still be
    done, drawn = torch.zeros_like(rows, dtype=torch.bool), [[] for _ in uniform]  # type: ignore[var-annotated]
    log_probs = torch.zeros(len(uniform), dtype=torch.float64, device=logits.device)
    for step in range(max_new_tokens):
        log_p = logits.float().log_softmax(-1)
        cumulated = log_p.double().exp_().cumsum(-1)
        tokens = torch.searchsorted(cumulated, uniform[rows, step, None] * cumulated[:, -1:], right=True)
        tokens = tokens.clamp_(max=log_p.shape[1] - 1)
        log_probs[rows[~done]] += log_p.gather(1, tokens)[~done, 0].double()
        for row, token in zip(rows[~done].tolist(), tokens[~done, 0].tolist(), strict=True):
            drawn[row].append(token)
        done |= torch.isin(tokens[:, 0], ends)
        if done.all() or step + 1 == max_new_tokens:
            break
        if done.float().mean() >= FINISHED:
            left = (~done).nonzero()[:, 0]
            cache.batch_select_indices(left)
            rows, tokens, mask, done = rows[left], tokens[left], mask[left], done[left]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        place = mask.sum(1, keepdim=True) - 1
        logits = model(tokens, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True).logits
        logits = logits[:, -1]
    samples = [_sample(tokenizer, ids, log_p, stops) for ids, log_p in zip(drawn, log_probs.tolist(), strict=True)]
    return [samples[i : i + n_samples] for i in range(0, len(samples), n_samples)]


def _sample(tokenizer: Any, tokens: list[int], log_prob: float, stops: Stops) -> Sample:
    ids = tokens[:-1] if tokens[-1] in stops[0] or tokens[-1] in stops[1] else tokens
    return Sample(tuple(ids), tokenizer.decode(ids, skip_special_tokens=True).strip(), log_prob, len(tokens))


@torch.inference_mode()
def next_log_probs(model: Any, prompts: Sequence[Sequence[int]], words: Sequence[int]) -> Float[Tensor, "prompt word"]:
    """Return log p of each of `words`, token ids, as the one that follows each prompt, float64 in nats."""
    return _read_all(model, prompts, 0)[1].double().log_softmax(-1)[:, list(words)].cpu()


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


def _read(model: Any, ids: Sequence[int], cache: Any = None, n_cached: int = 0) -> tuple[Any, Tensor]:
    """Return the cache and the next token's logits (1, 1, vocab) after one unpadded sequence that continues `cache`."""
    tokens = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    position = torch.arange(n_cached, n_cached + len(ids), device=tokens.device)[None]
    out = model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits


def _read_shared(model: Any, prompts: Sequence[Sequence[int]], n_more: int) -> tuple[int, Any]:
    """The number of tokens that all prompts share, and a cache that holds them for each prompt; 0 and None for none."""
    shared = _shared_length(prompts)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and max(map(len, prompts)) + n_more > window:
        shared = 0  # padding between the shared tokens and the rest would push the shared ones out of the window
    if not shared:
        return 0, None
    cache, _ = _read(model, prompts[0][:shared])
    cache.batch_repeat_interleave(len(prompts))
    return shared, cache


def _read_all(model: Any, prompts: Sequence[Sequence[int]], n_more: int) -> tuple[Any, Tensor, Tensor]:
    """The cache after all prompts, the next token's logits (prompt, vocab), and the mask (prompt, token) of padding."""
    shared, cache = _read_shared(model, prompts, n_more)
    ids, mask = (x.to(model.get_input_embeddings().weight.device) for x in left_padded(prompts, shared))
    place = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    out = model(
        input_ids=ids[:, shared:],
        attention_mask=mask,
        position_ids=place,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.past_key_values, out.logits[:, -1], mask


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all prompts share, leaving each at least one of its own."""
    shortest = min(map(len, prompts))
    for i in range(shortest - 1):
        if len({prompt[i] for prompt in prompts}) > 1:
            return i
    return shortest - 1
