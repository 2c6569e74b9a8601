"""A card computes what the processor does: every promised architecture, and a classifier."""

from typing import Any

import pytest
import torch
from torch import nn

import isouq
from architectures import COVERED, FLOAT32, build, upcasts_to
from isouq.estimate import AGGREGATIONS
from isouq.language.examples import from_pairs
from isouq.language.scoring import Scoring, gram, score

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")
PAIRS = [([5, 6, 7], [8, 9]), ([10, 11], [12]), ([13, 14, 15, 16], [17, 18, 19])]


def close(there: Any, here: Any, digits: float) -> bool:
    return torch.allclose(there.cpu(), here, rtol=digits, atol=digits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("name", COVERED)
def test_language_models_score_as_on_the_processor(name: str, tied: bool) -> None:
    model, digits = build(name, tied=tied), 1e-3 if name in FLOAT32 else 1e-8
    how, examples = Scoring(aggregations=AGGREGATIONS, breakdown=True), from_pairs(PAIRS)
    with upcasts_to(next(model.parameters()).dtype):
        here, products_here = score(model, examples, how), gram(model, examples).rows
        model.cuda()
        there, products = score(model, examples, how), gram(model, examples).rows
    for aggregation, estimate in here.items():
        assert there[aggregation].engine == estimate.engine
        for value in ("log_prob", "probability", "aleatoric", "log_epistemic"):
            assert close(getattr(there[aggregation], value), getattr(estimate, value), digits), value
        shares = there[aggregation].by_layer()["log_epistemic"] - estimate.by_layer()["log_epistemic"]
        assert shares.abs().max() < 10 * digits
    assert close(products, products_here, digits)


def test_classifiers_score_as_on_the_processor() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)]
    model, images = nn.Sequential(*layers).double().eval(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    here = isouq.score_classes(model, images)
    there = isouq.score_classes(model.cuda(), images.cuda())
    assert there.engine == here.engine == "ghost"
    assert close(there.log_epistemic, here.log_epistemic, 1e-8)
