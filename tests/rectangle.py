"""What the library does with examples, for tests that have them as a padded rectangle: ids, answer mask, attention."""

from typing import Any

from isouq.language import scoring
from isouq.language.examples import from_rectangle
from isouq.language.scoring import inner_products, score_tokens  # noqa: F401, doors for rectangles already


def score_aggregations(model: Any, *rectangle: Any, **how: Any) -> Any:
    return scoring.score(model, from_rectangle(*rectangle), scoring.Scoring(**how))


def log_probs(model: Any, *rectangle: Any, **options: Any) -> Any:
    return scoring.log_probs(model, from_rectangle(*rectangle), **options)


def gram(model: Any, rows: Any, others: Any = None, **options: Any) -> Any:
    return scoring.gram(model, from_rectangle(*rows), from_rectangle(*others) if others else [], **options)
