"""The estimates as methods of lm-polygraph (0.7), by its own interface; importing this module imports lm-polygraph.

    from isouq.integrations import polygraph

    manager = UEManager(
        dataset, model, [polygraph.Epistemic(), polygraph.Aleatoric()],
        available_stat_calculators=[*register_default_stat_calculators("Whitebox"), polygraph.container()], ...
    )

The statistic is computed once a batch for all estimators, from the ids that lm-polygraph generated, without the token
that ended an answer, which no score of ours has. High means uncertain, as everywhere there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lm_polygraph.estimators import Estimator
from lm_polygraph.stat_calculators import StatCalculator
from lm_polygraph.utils.factory_stat_calculator import StatCalculatorContainer
from numpy.typing import NDArray

from isouq.estimate import Aggregation
from isouq.language import scoring
from isouq.language.examples import from_pairs

STATISTIC = "isouq_scores"
AGGREGATIONS: tuple[Aggregation, ...] = ("sequence", "geometric")  # those that one backward pass gives
FIELDS = {"epistemic": "log_epistemic", "aleatoric": "aleatoric", "log_gradient": "log_gradient"}  # of an `Estimate`
Scores = dict[str, list[float]]


class GradientNormCalculator(StatCalculator):
    """Answers as generated → `isouq_scores`: for each aggregation and score, a value for each answer."""

    @staticmethod
    def meta_info() -> tuple[list[str], list[str]]:
        """Return the statistics given and those needed."""
        return [STATISTIC], ["greedy_tokens"]

    def __call__(
        self, dependencies: dict[str, Any], texts: list[str], model: Any, max_new_tokens: int = 100, **_: Any
    ) -> dict[str, Scores]:
        """Score a batch's answers. An answer without a token has no score, and is infinitely uncertain.

        Raises ValueError for a model that is not a decoder, or is not on this machine.
        """
        if getattr(model, "model_type", None) != "CausalLM":
            raise ValueError(f"model: {type(model).__name__} given, a WhiteboxModel of a causal language model wanted")
        encoded = model.tokenize(texts)
        padded = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
        prompts = [ids[mask].tolist() for ids, mask in padded]
        end = model.tokenizer.eos_token_id
        answers = [ids[:-1] if ids and ids[-1] == end else list(ids) for ids in dependencies["greedy_tokens"]]
        rows = [row for row, answer in enumerate(answers) if answer]
        examples = from_pairs((prompts[row], answers[row]) for row in rows)
        how = scoring.Scoring(aggregations=AGGREGATIONS)
        estimates = scoring.score(model.model, examples, how) if rows else {}
        scores: Scores = {f"{name}_{a}": [math.inf] * len(answers) for name in FIELDS for a in AGGREGATIONS}
        for aggregation, estimate in estimates.items():
            for name, field in FIELDS.items():
                for row, value in zip(rows, getattr(estimate, field).tolist(), strict=True):
                    scores[f"{name}_{aggregation}"][row] = value
        return {STATISTIC: scores}


class _Score(Estimator):
    """One of the scores of `GradientNormCalculator`; `aggregation` is "sequence" or "geometric"."""

    score: str

    def __init__(self, aggregation: str = "sequence") -> None:
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation: {aggregation!r} given, one of {', '.join(AGGREGATIONS)} wanted")
        super().__init__([STATISTIC], "sequence")
        self.aggregation = aggregation

    def __str__(self) -> str:
        """Return the name under which lm-polygraph reports it."""
        return f"Isouq{type(self).__name__}_{self.aggregation}"

    def __call__(self, stats: dict[str, Any]) -> NDArray[np.float64]:
        """Return the uncertainty of each answer."""
        return np.array(stats[STATISTIC][f"{self.score}_{self.aggregation}"])


class Epistemic(_Score):
    """log U_E = log ‖∇θ p‖², in units of the log of the parameter variance."""

    score = "epistemic"


class Aleatoric(_Score):
    """U_A = p(1 − p)."""

    score = "aleatoric"


class LogGradient(_Score):
    """log U_E without its factor p²: log G, G = ‖∇θ log p‖², under "sequence"."""

    score = "log_gradient"


def container() -> StatCalculatorContainer:
    """Return what `UEManager` takes among its `available_stat_calculators`."""
    stats, needed = GradientNormCalculator.meta_info()
    return StatCalculatorContainer(
        name=GradientNormCalculator.__name__,
        obj=GradientNormCalculator,
        builder=__name__,
        stats=stats,
        dependencies=needed,
    )


def load_stat_calculator(_config: Any, _environment: Any) -> GradientNormCalculator:
    """Build the calculator; lm-polygraph calls this by its name."""
    return GradientNormCalculator()


def saved(path: str | Path) -> pd.DataFrame:
    """Read the questions and answers that `UEManager.save` wrote, as columns prompt and answer for `isouq score`.

    The file is a pickle, which may run code when it is read: read only files of your own. Raises ValueError for a file
    of another kind.
    """
    content = torch.load(path, weights_only=False)
    stats = content.get("stats", {}) if isinstance(content, dict) else {}
    if not {"input_texts", "greedy_texts"} <= stats.keys():
        raise ValueError(f"{path}: no file of UEManager.save, with input_texts and greedy_texts among its stats")
    return pd.DataFrame({"prompt": stats["input_texts"], "answer": stats["greedy_texts"]})
