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
