"""Verdicts, with the cases that set the official TriviaQA script apart from SQuAD's."""

import pytest

from isouq.studies.qa import judge


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles.", "beatles"),
        ("rock-and-roll", "rock and roll"),  # punctuation becomes a space: SQuAD would give rockandroll
        ("Sgt_Pepper`s", "sgt pepper s"),
        ("An apple a day", "apple day"),
        ("Théâtre", "théâtre"),  # accents stay
        ("theatre", "theatre"),  # articles only as whole words
        ("The", ""),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert judge.normalise_answer(text) == normal


def test_exact_match_takes_any_alias_but_no_part_of_one() -> None:
    assert judge.exact_match("the sunset boulevard!", ["Sunset Blvd", "Sunset Boulevard"])
    assert not judge.exact_match("Sunset", ["Sunset Boulevard"])
    assert not judge.exact_match("I think it is Sunset Boulevard", ["Sunset Boulevard"])


@pytest.mark.parametrize("answer", ["", "  ", "...", "The"])
def test_nothing_is_never_right(answer: str) -> None:
    assert not judge.exact_match(answer, ["The", "..."])


def test_token_f1_is_of_the_nearest_accepted_answer() -> None:
    assert judge.token_f1("the River Nile", ["Nile", "Amazon"]) == pytest.approx(2 * 1 / (2 + 1))
    assert judge.token_f1("Danube", ["Nile"]) == 0
    assert judge.token_f1("", ["Nile"]) == 0


def test_rouge_l_is_f1_of_the_longest_common_subsequence() -> None:
    """Articles are left out, so "police gunman" is common: 2 words of 3 and of 4."""
    assert judge.rouge_l("police killed the gunman", "police ended the gunman quickly") == pytest.approx(4 / 7)
    assert judge.rouge_l("x y", "y x") == pytest.approx(0.5)
    assert judge.rouge_l("x", "y") == 0
    assert judge.rouge_l("", "y") == 0


def test_a_contrast_is_above_zero_where_the_nearest_reference_is_true() -> None:
    references = ["no it is not so", "yes it is"]
    assert judge.contrast([judge.rouge_l("no it is not", other) for other in references], 1) > 0
    assert judge.contrast([judge.rouge_l("yes it is", other) for other in references], 1) < 0
