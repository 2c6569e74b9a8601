"""KFAC and EK-FAC by curvlinops: the Fishers that are small enough to store for a network of any size.

Both keep a block per layer and write it in Kronecker factors: the covariance of the layer's inputs and that of the
gradients at its outputs (Martens and Grosse 2015, arXiv 1503.05671). EK-FAC measures the eigenvalues anew in the
factors' eigenbasis (George et al. 2018, arXiv 1806.03884). The expectation over labels is exact, not sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from curvlinops import EKFACLinearOperator, FisherType, KFACInverseLinearOperator, KFACLinearOperator
from jaxtyping import Float
from numpy.typing import NDArray

from isouq.studies import require
from isouq.studies.synthetic import point
from isouq.studies.synthetic.problems import Problem

Array = NDArray[np.float64]
KINDS = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}


@dataclass(frozen=True, eq=False)
class Kronecker:
    """Σ(λ) = (λI + F)⁻¹ of a network's KFAC or EK-FAC; `order` puts θ (param,) as torch's modules have it."""

    operator: KFACLinearOperator
    order: NDArray[np.int_]

    def quadratic_form(self, g: Float[np.ndarray, "query param"], *, damping: float) -> Array:
        """gᵀΣ(λ)g (query,) at a damping λ above 0, which is added to the products of the factors' eigenvalues."""
        g = require.numbers("g", g, 2, width=len(self.order))
        damping = require.number("damping", damping, 0.0)
        inverse = KFACInverseLinearOperator(self.operator, damping=damping, use_exact_damping=True)
        columns = torch.tensor(g[:, self.order].T)
        return (columns * (inverse @ columns)).sum(0).numpy()


def fit(problem: Problem, theta: Array, inputs: Array, kind: str) -> Kronecker:
    """Return the `kind` (of KINDS) of the problem's network at θ, an average over `inputs` (example, 2)."""
    require.one_of("kind", kind, KINDS)
    module, network = point.torch_module(problem.model, theta), problem.model.network
    x = torch.tensor(require.numbers("inputs", inputs, 2))
    # Labels are not used by the exact expectation; curvlinops reads their shape.
    binary = network.n_outputs == 1
    y = torch.zeros(len(x), 1, dtype=x.dtype) if binary else torch.zeros(len(x), dtype=torch.long)
    loss = torch.nn.BCEWithLogitsLoss() if binary else torch.nn.CrossEntropyLoss()
    options = {"fisher_type": FisherType.TYPE2, "separate_weight_and_bias": False, "check_deterministic": False}
    operator = KINDS[kind](module, loss, list(module.parameters()), [(x, y)], **options)
    order = [np.append(weight.T.ravel(), bias) for weight, bias in network.layers(np.arange(len(theta)))]
    return Kronecker(operator, np.concatenate(order))
