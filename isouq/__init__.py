"""Exact squared gradient norms as epistemic uncertainty: an independent companion to arXiv 2603.29466.

import isouq

model, tokenizer = isouq.assets.load_causal_lm("smollm2-135m-instruct")
isouq.score_texts(model, tokenizer, ["The capital of France is"], [" Paris"])
"""

from isouq import assets
from isouq.causal_lm import score_texts, score_tokens
from isouq.estimate import Estimate

__version__ = "0.1.0"
__all__ = ["Estimate", "assets", "score_texts", "score_tokens"]
