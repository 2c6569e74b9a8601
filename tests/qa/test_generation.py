"""Batched, cached generation and choice against the plainest loop that recomputes everything."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import processors
from transformers import GenerationConfig

from isouq.language import generation as library
from isouq.studies.qa import generation

SHARED = list(range(10, 34))
PROMPTS = [SHARED + rest for rest in ([40], [41, 42, 43, 44, 45], [46, 47, 12], [1, 2, 3, 4, 5, 6, 7, 8, 9])]
UNLIKE = [[5, 6, 7], [20, 21, 22, 23, 24, 25], [9]]


@pytest.fixture(params=["llama", "gemma"])
def model(request):
    return request.getfixturevalue(request.param)


def plain_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def plain_greedy(model, prompt: list[int], stops: set[int], n: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < n:
        token = int(plain_logits(model, prompt + answer)[-1].argmax())
        if token in stops:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("prompts", [PROMPTS, UNLIKE, PROMPTS[:1]], ids=["shared", "unlike", "single"])
@pytest.mark.parametrize("room", [library, generation], ids=["library", "study"])
def test_a_batch_answers_as_each_prompt_alone(model, tokenizer, room, prompts) -> None:
    """Whether the tokens that all prompts share are read once, as a study does, or with every prompt."""
    stops = (frozenset({1, 2}), frozenset({0}))
    answers = room.generate(model, tokenizer, prompts, stops=stops, max_new_tokens=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == plain_greedy(model, prompt, {0, 1, 2}, 12)


def test_generation_stops_at_a_token_that_contains_a_newline_and_drops_it(llama, tokenizer) -> None:
    free = plain_greedy(llama, PROMPTS[0], set(), 12)
    stop = free[5]
    before = free[: free.index(stop)]
    for stops, why in (((frozenset({stop}), frozenset()), "newline"), ((frozenset(), frozenset({stop})), "eos")):
        (answer,) = generation.generate(llama, tokenizer, PROMPTS[:1], stops=stops, max_new_tokens=12)
        assert (list(answer.token_ids), answer.ended_by) == (before, why)
    (answer,) = generation.generate(llama, tokenizer, PROMPTS[:1], stops=(frozenset(), frozenset()), max_new_tokens=3)
    assert (list(answer.token_ids), answer.ended_by) == (free[:3], "length")


def test_a_models_own_sampling_and_penalties_are_left_out_and_left_alone(llama, tokenizer) -> None:
    own = llama.generation_config
    llama.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, suppress_tokens=[*range(3, 90)], max_length=2
    )
    asked = llama.generation_config
    try:
        (answer,) = library.generate(llama, tokenizer, PROMPTS[:1], stops=(frozenset(), frozenset()), max_new_tokens=9)
        assert llama.generation_config is asked
    finally:
        llama.generation_config = own
    assert list(answer.token_ids) == plain_greedy(llama, PROMPTS[0], set(), 9)


def test_an_answer_that_ends_at_once_is_empty(llama, tokenizer) -> None:
    first = plain_greedy(llama, PROMPTS[0], set(), 1)[0]
    (answer,) = generation.generate(
        llama, tokenizer, PROMPTS[:1], stops=(frozenset({first}), frozenset()), max_new_tokens=4
    )
    assert answer.text == ""
    assert answer.token_ids == ()


def test_stop_tokens_are_all_that_contain_a_newline_and_every_end_of_sequence(llama, tokenizer) -> None:
    newline, eos = library.stop_token_ids(tokenizer, llama)
    assert newline == {1, 2}
    assert eos == {0}


def test_candidates_score_as_one_plain_forward_each(model) -> None:
    many = [[i % 40 + 5, (7 * i) % 50, 3][: 1 + i % 3] for i in range(11)]  # more than one group of rows
    groups = [[[5], [6, 7, 8, 9, 10]], [[11, 12]], [[13], [14]], many]
    found = generation.candidate_log_probs(model, PROMPTS, groups)
    for prompt, answers, scores in zip(PROMPTS, groups, found, strict=True):
        for answer, score in zip(answers, scores, strict=True):
            log_p = plain_logits(model, prompt + answer).double().log_softmax(-1)
            plain = sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
            assert score.item() == pytest.approx(plain, abs=1e-4)


def test_an_empty_candidate_is_refused(llama) -> None:
    with pytest.raises(ValueError, match="none of them empty"):
        generation.candidate_log_probs(llama, PROMPTS[:1], [[[5], []]])


def test_a_prompt_is_open_for_its_answer(tokenizer) -> None:
    """A tokenizer that closes every text gives the ids of one that does not."""
    closing, start = copy.deepcopy(tokenizer), tokenizer.get_vocab()["Q"]
    wrap = processors.TemplateProcessing("Q $A <eos>", special_tokens=[("Q", start), ("<eos>", 0)])
    closing.backend_tokenizer.post_processor = wrap
    assert closing("who")["input_ids"] == [start, *tokenizer("who")["input_ids"], 0]
    [ids] = generation.encode_prompts(closing, ["who"])
    assert ids == [start, *tokenizer("who")["input_ids"]]
    assert generation.encode_answer(closing, "me") == tokenizer(" me")["input_ids"]


def plain_draw(model, prompt: list[int], numbers, stops: set[int]) -> tuple[list[int], float]:
    """One token at a time, the whole text read anew: the token whose share of [0, 1) holds the number."""
    tokens: list[int] = []
    total = 0.0
    for number in numbers:
        p = plain_logits(model, prompt + tokens)[-1].double().softmax(-1)
        token = int((p.cumsum(0) <= number).sum())
        total += p[token].log().item()
        tokens.append(token)
        if token in stops:
            break
    return tokens, total


@pytest.mark.parametrize("prompts", [PROMPTS, UNLIKE, PROMPTS[:1]], ids=["shared", "unlike", "single"])
def test_samples_of_a_batch_are_those_of_each_alone(model, tokenizer, prompts) -> None:
    numbers = np.random.default_rng(0).random((len(prompts), 6, 9))
    stops = (frozenset({1, 2}), frozenset(range(0, 140, 5)))
    found = generation.draw(model, tokenizer, prompts, numbers, stops=stops)
    ended = 0
    for i, prompt in enumerate(prompts):
        for j, one in enumerate(found[i]):
            tokens, total = plain_draw(model, prompt, numbers[i, j], stops[0] | stops[1])
            has_end = tokens[-1] in stops[0] | stops[1]
            ended += has_end
            assert list(one.token_ids) == (tokens[:-1] if has_end else tokens)
            assert one.n_steps == len(tokens)
            assert one.log_prob == pytest.approx(total, abs=1e-4)
    assert ended > 0  # some finished before the others, so that rows were dropped on the way


def test_samples_have_the_models_frequencies(llama, tokenizer) -> None:
    numbers = np.random.default_rng(1).random((1, 4000, 1))
    [samples] = generation.draw(llama, tokenizer, PROMPTS[:1], numbers, stops=(frozenset(), frozenset()))
    counts = np.bincount([one.token_ids[0] for one in samples], minlength=len(tokenizer))
    p = plain_logits(llama, PROMPTS[0])[-1].double().softmax(-1).numpy()
    common = p > 0.005
    assert (
        stats.chisquare(counts[common], 4000 * p[common] * counts[common].sum() / (4000 * p[common].sum())).pvalue
        > 0.001
    )


def test_the_next_words_log_p_is_that_of_a_plain_pass(model) -> None:
    found = generation.next_log_probs(model, PROMPTS, [7, 12])
    for prompt, row in zip(PROMPTS, found, strict=True):
        plain = plain_logits(model, prompt)[-1].double().log_softmax(-1)[[7, 12]]
        assert torch.allclose(row, plain, atol=1e-4)
