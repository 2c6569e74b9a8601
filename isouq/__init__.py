"""Exact squared gradient norms as epistemic uncertainty: an independent companion to arXiv 2603.29466.

    import isouq

    model, tokenizer = isouq.assets.load_causal_lm("smollm2-135m-instruct")
    isouq.score_texts(model, tokenizer, ["The capital of France is"], [" Paris"])

The names below are loaded when they are first used, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_HOMES = {
    "estimate": ("Estimate", "Regression"),
    "causal_lm": ("inner_products", "score_texts", "score_tokens"),
    "classifier": ("score_classes", "score_outputs"),
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    if name == "assets":
        return importlib.import_module("isouq.assets")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"isouq.{module}"), name)
    raise AttributeError(f"module 'isouq' has no attribute {name!r}; it has {', '.join(__all__)}")
