"""Exact squared gradient norms as epistemic uncertainty: an independent companion to arXiv 2603.29466.

import isouq

model, tokenizer = isouq.assets.load_causal_lm("smollm2-135m-instruct")
isouq.score_texts(model, tokenizer, ["The capital of France is"], [" Paris"])
"""

from isouq import assets
from isouq.causal_lm import inner_products, score_texts, score_tokens
from isouq.classifier import score_classes, score_outputs
from isouq.estimate import Estimate, Regression

__version__ = "0.1.0"
__all__ = [
    "Estimate",
    "Regression",
    "assets",
    "inner_products",
    "score_classes",
    "score_outputs",
    "score_texts",
    "score_tokens",
]
