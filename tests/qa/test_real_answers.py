"""The first steps on the real SmolLM2: its stop tokens, an easy question, and a choice scored in two ways."""

import pytest

from isouq.language import scoring
from isouq.language.examples import from_pairs
from isouq.language.generation import stop_token_ids
from isouq.studies import assets
from isouq.studies.qa import generation, judge, study
from isouq.studies.qa.study import Settings

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def smollm2():
    return assets.load_causal_lm("smollm2-135m-instruct")


def test_every_token_with_a_newline_stops_and_no_other(smollm2) -> None:
    model, tokenizer = smollm2
    newline, eos = stop_token_ids(tokenizer, model)
    assert set(tokenizer("\n\n\n", add_special_tokens=False)["input_ids"]) <= newline
    assert tokenizer.eos_token_id in eos
    assert not set(tokenizer(" Paris, the capital.", add_special_tokens=False)["input_ids"]) & (newline | eos)


def test_it_knows_a_capital(smollm2) -> None:
    model, tokenizer = smollm2
    shots = "The capital of Spain is Madrid\nThe capital of Japan is Tokyo\n"
    prompts = generation.encode_prompts(tokenizer, [f"{shots}The capital of {c} is" for c in ("France", "Italy")])
    stops = stop_token_ids(tokenizer, model)
    answers = generation.generate(model, tokenizer, prompts, stops=stops, max_new_tokens=8)
    assert [judge.exact_match(a.text, [city]) for a, city in zip(answers, ("Paris", "Rome"), strict=True)] == [True] * 2
    assert {answer.ended_by for answer in answers} == {"newline"}


def test_shared_candidates_equal_plain_log_probs(smollm2) -> None:
    model, tokenizer = smollm2
    content = study.load_questions("truthfulqa")
    subject = study.prepare(model, tokenizer, content, Settings(n_questions=2), choose=True)
    texts = [[*question.answers, *question.false_answers] for question in subject.questions]
    ids = [[generation.encode_answer(tokenizer, text) for text in group] for group in texts]
    shared = generation.candidate_log_probs(model, subject.prompts, ids)
    for prompt, group, found in zip(subject.prompts, ids, shared, strict=True):
        plain, n_tokens = scoring.log_probs(model, from_pairs((prompt, answer) for answer in group))
        # A float32 log-softmax over 49,152 words is itself off by up to 1e-5 per token; ours is summed in float64.
        assert ((plain - found).abs() < 2e-5 * n_tokens).all()
