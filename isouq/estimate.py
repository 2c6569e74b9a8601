"""The paper's definitions (arXiv 2603.29466), one function per equation, and `Estimate`, which holds the results.

Notation: S = Σ_t log p(y_t | x, y_<t) over the L answer tokens, G = ‖∇θ S‖². Everything here works on logarithms:
in float32 ‖∇θ p‖² underflows to 0 long before log p = −106.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Aggregation = Literal["sequence", "geometric", "token_mean"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
_BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")  # how decoders name their blocks
_KINDS = {"attn": "attention", "attention": "attention", "mlp": "mlp", "norm": "norm", "ln_": "norm"}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Uncertainty of a batch of predictions: tensors (example,) float64 on the CPU, or (example, class).

    Attributes:
        log_prob: S, the log-probability of the whole answer (or of the class), in nats.
        n_tokens: L, the answer's number of tokens, int64 (1 for a class).
        probability: p under the aggregation: e^S, e^{S/L}, or the mean of the tokens' probabilities.
        aleatoric: U_A = p(1 − p), the variance of the indicator "the answer is y" (for `token_mean` the mean over
            tokens), between 0 and ¼.
        log_epistemic: log U_E, where U_E = ‖∇θ p‖² in units of the isotropic parameter variance σ².
            −inf where the gradient is exactly zero.
        epistemic: U_E itself, for display; it underflows to 0 for log U_E below −745. Rank on `log_epistemic`.
        log_probability: log p under the aggregation in nats, which stays finite where `probability` underflows to 0.
        engine: The engine that computed the gradients, "ghost" or "autograd".
        n_parameters: The number of parameters in the squared norm.
        parameters: Their name patterns, "all" unless a subset was asked for.
        breakdown: log U_E of each parameter, by name; their exponentials add up to `epistemic`. None unless asked for.

    Raises:
        dataclasses.FrozenInstanceError: A field is assigned to.

    Example:
        >>> scores = isouq.score_classes(torch.nn.Linear(2, 3), torch.zeros(4, 2))
        >>> len(scores), torch.equal(scores.epistemic, scores.log_epistemic.exp())
        (4, True)
    """

    log_prob: Float[Tensor, "*example"]
    n_tokens: Int[Tensor, "*example"]
    probability: Float[Tensor, "*example"]
    aleatoric: Float[Tensor, "*example"]
    log_epistemic: Float[Tensor, "*example"]
    log_probability: Float[Tensor, "*example"]
    engine: str
    n_parameters: int
    parameters: str = "all"
    breakdown: dict[str, Tensor] | None = None

    @property
    def epistemic(self) -> Float[Tensor, "*example"]:
        """U_E = exp(log U_E)."""
        return self.log_epistemic.exp()

    @property
    def log_gradient(self) -> Float[Tensor, "*example"]:
        """The delta method's variance of log p, as a logarithm: log U_E − 2 log p; for `sequence` log G itself."""
        return self.log_epistemic - 2 * self.log_probability

    def by_layer(self) -> pd.DataFrame:
        """log U_E by block and kind of parameter, from `breakdown`: example, layer, kind, log_epistemic.

        kind is attention, mlp, norm or other, by the parameter's name; outside blocks, where layer is missing, norm or
        embedding, which a tied head shares. Over an example's rows U_E adds up to `epistemic`. Raises ValueError where
        the estimate has no breakdown by parameter of one prediction per example.
        """
        if self.breakdown is None or self.log_epistemic.dim() > 1:
            way_out = "score answers with breakdown=True, of one aggregation"
            raise ValueError(f"breakdown: none by example given, log U_E of each parameter wanted; {way_out}")
        groups: dict[tuple[int | None, str], list[Tensor]] = {}
        for name, values in self.breakdown.items():
            block = _BLOCK.search(name)
            kind = next((kind for part, kind in _KINDS.items() if part in name), "other" if block else "embedding")
            groups.setdefault((int(block[1]) if block else None, kind), []).append(values)
        logs = torch.stack([torch.stack(values).logsumexp(0) for values in groups.values()], dim=1)
        layers, kinds = zip(*groups, strict=True)
        columns = {
            "example": torch.arange(len(self)).repeat_interleave(len(groups)).numpy(),
            "layer": pd.array(layers * len(self), dtype="Int64"),
            "kind": kinds * len(self),
            "log_epistemic": logs.flatten().numpy(),
        }
        return pd.DataFrame(columns)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.log_prob)


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Uncertainty of a regressor: tensors (example, output) float64 on the CPU.

    Attributes:
        mean: The predicted outputs f(x, θ*), in their own unit.
        aleatoric: The noise's variance, as given, in the square of that unit.
        log_epistemic: log U_E = log‖∇θ f‖², where U_E is in the same unit per unit of the parameter variance σ².
        epistemic: U_E itself.
        engine: The engine that computed the gradients, "ghost" or "autograd".
        n_parameters: The number of parameters in the squared norm.

    Raises:
        dataclasses.FrozenInstanceError: A field is assigned to.

    Example:
        >>> scores = isouq.score_outputs(torch.nn.Linear(1, 1), torch.tensor([[2.0]]), noise_variance=0.1)
        >>> round(scores.epistemic.item(), 6), scores.n_parameters  # ‖∇(wx + b)‖² = x² + 1
        (5.0, 2)
    """

    mean: Float[Tensor, "example output"]
    aleatoric: Float[Tensor, "example output"]
    log_epistemic: Float[Tensor, "example output"]
    engine: str
    n_parameters: int

    @property
    def epistemic(self) -> Float[Tensor, "example output"]:
        """‖∇θ f‖²."""
        return self.log_epistemic.exp()


def bernoulli_variance(log_p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Aleatoric uncertainty U_A = p(1 − p) of a point prediction, from log p (paper, law of total variance).

    Computed as e^{log p}·abs(expm1(log p)), which is exact as p approaches 1, and 0 rather than −0 at p = 1.
    """
    return log_p.exp() * torch.expm1(log_p).abs()


def log_odds(log_p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log p − log(1 − p), from log p in float64: it is differentiated in place of log p.

    ∇log p = (1 − p)·∇log odds. As p approaches 1, ∇log p leaves float32's range and ∇log odds does not.
    """
    return log_p - torch.expm1(log_p).neg().clamp(min=torch.finfo(log_p.dtype).tiny).log()


def from_log_odds(
    odds: Float[Tensor, "*shape"], squares: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """log p, and log G = log‖∇θ log p‖² from the squared norms of the log odds' gradients."""
    log_p = F.logsigmoid(odds).masked_fill(odds > 708, 0)  # there 1 − p is below float64's range
    return log_p, squares.log() + 2 * F.logsigmoid(-odds)


def delta_method(log_p: Float[Tensor, "*shape"], log_G: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log U_E = log‖∇θ p‖² = 2 log p + log‖∇θ log p‖² (paper, delta method with Cov[θ] = σ²I, σ² = 1)."""
    return 2 * log_p + log_G


def sequence(S: Float[Tensor, "*example"], log_G: Float[Tensor, "*example"]) -> tuple[Tensor, Tensor, Tensor]:
    """(p, U_A, log U_E) for p = e^S, the probability of the whole answer: U_E = e^{2S} G."""
    return S.exp(), bernoulli_variance(S), delta_method(S, log_G)


def geometric(
    S: Float[Tensor, " example"], log_G: Float[Tensor, " example"], n_tokens: Int[Tensor, " example"]
) -> tuple[Tensor, Tensor, Tensor]:
    """(p, U_A, log U_E) for p = e^{S/L}, the geometric mean of the tokens' probabilities: U_E = e^{2S/L} G / L²."""
    log_p = S / n_tokens
    return log_p.exp(), bernoulli_variance(log_p), delta_method(log_p, log_G - 2 * n_tokens.double().log())


def token_mean(
    log_p: Float[Tensor, "example token"], log_G: Float[Tensor, "example token"], answer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(p, U_A, log U_E) as means over tokens: U_E = (1/L) Σ_t ‖∇θ p_t‖², U_A = (1/L) Σ_t p_t(1 − p_t).

    `answer` (example, token) is True where a token exists; p is the tokens' mean probability.
    """
    n_tokens = answer.sum(1)
    gone = ~answer
    probability = log_p.exp().masked_fill(gone, 0).sum(1) / n_tokens
    aleatoric = bernoulli_variance(log_p).masked_fill(gone, 0).sum(1) / n_tokens
    per_token = delta_method(log_p, log_G).masked_fill(gone, -torch.inf)
    return probability, aleatoric, torch.logsumexp(per_token, 1) - n_tokens.double().log()
