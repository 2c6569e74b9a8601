"""Made-up scores with labels: an answer's log-probability tells whether it is right, and log G tells a little more."""

import numpy as np
import pandas as pd


def made_up(n: int = 200, *, seed: int = 0, aggregation: str = "sequence") -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(1, 6, n)
    log_prob = -rng.gamma(1.0, size=n) * n_tokens / 2
    log_gradient = 2 + rng.normal(size=n) - 0.3 * log_prob
    log_p = log_prob / (n_tokens if aggregation == "geometric" else 1)
    right = rng.random(n) < 1 / (1 + np.exp(-(2.0 + log_prob - 0.5 * (log_gradient - 2))))
    return pd.DataFrame(
        {
            "prompt": "Is it?",
            "answer": " yes",
            "n_tokens": n_tokens,
            "log_prob": log_prob,
            "probability": np.exp(log_p),
            "aleatoric": -np.exp(log_p) * np.expm1(log_p),
            "epistemic": np.exp(2 * log_p + log_gradient),
            "log_epistemic": 2 * log_p + log_gradient,
            "straddles": False,
            "error": None,
            "right": right,
        }
    )
