"""Whether an answer is right: TriviaQA's official normalisation, then an exact match."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

# As in mandarjoshi90/triviaqa, evaluation/triviaqa_evaluation.py (v1.0): spaces take their place.
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Return the text as the official TriviaQA script compares it.

    In its order: underscores to spaces, lower case, punctuation to spaces, articles out, one space each.
    """
    lowered = text.replace("_", " ").lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def exact_match(answer: str, accepted: Iterable[str]) -> bool:
    """Return whether the answer equals one of the accepted ones after normalisation.

    An answer with nothing left after normalisation (empty, or only punctuation and articles) is never
    right.
    """
    normalised = normalise_answer(answer)
    return normalised != "" and any(normalised == normalise_answer(other) for other in accepted)
