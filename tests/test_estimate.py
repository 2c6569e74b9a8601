"""The paper's definitions beside derivatives of p itself, and where floating point would betray them."""

import dataclasses

import pytest
import torch

from closeness import assert_close, assert_logs_close
from isouq import estimate
from isouq.estimate import Estimate


def gradients(theta: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.autograd.grad(value, theta, retain_graph=True)[0] for value in values])


@pytest.fixture
def answer():
    """log p of three tokens as functions of θ, and the gradient of each."""
    theta = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_p = (weights @ theta).log_softmax(-1)[:, 0]
    return theta, log_p


def square(theta: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return gradients(theta, value[None]).square().sum(1)


def test_sequence_is_the_gradient_of_the_whole_answers_probability(answer):
    theta, log_p = answer
    S = log_p.sum()
    p, aleatoric, log_epistemic = estimate.sequence(S[None].detach(), square(theta, S).log())
    assert_close(p, log_p.exp().prod()[None].detach())
    assert_close(aleatoric, (p * (1 - p)))
    assert_logs_close(log_epistemic, square(theta, S.exp()).log())


def test_geometric_is_the_gradient_of_the_tokens_geometric_mean(answer):
    theta, log_p = answer
    S = log_p.sum()
    p, aleatoric, log_epistemic = estimate.geometric(S[None].detach(), square(theta, S).log(), torch.tensor([3]))
    assert_close(p, log_p.exp().prod()[None].detach() ** (1 / 3))
    assert_close(aleatoric, (p * (1 - p)))
    assert_logs_close(log_epistemic, square(theta, log_p.mean().exp()).log())


def test_token_mean_is_the_mean_of_the_tokens_own_estimates(answer):
    """Padding after an answer's end, whatever stands there, does not count."""
    theta, log_p = answer
    p = log_p.exp()
    log_G = gradients(theta, log_p).square().sum(1).log()
    padded = [torch.cat([x.detach(), torch.tensor([0.0, 9.0])])[None] for x in (log_p, log_G)]
    exists = torch.tensor([[True, True, True, False, False]])
    found = estimate.token_mean(*padded, exists)
    assert_close(found[0], p.mean()[None].detach())
    assert_close(found[1], (p * (1 - p)).mean()[None].detach())
    assert_logs_close(found[2], gradients(theta, p).square().sum(1).mean()[None].log())


def test_one_token_means_the_same_under_all_three(answer):
    theta, log_p = answer
    log_p, log_G = log_p[:1].detach(), square(theta, log_p[0]).log()
    first = estimate.sequence(log_p, log_G)
    for other in (
        estimate.geometric(log_p, log_G, torch.tensor([1])),
        estimate.token_mean(log_p[None], log_G[None], torch.tensor([[True]])),
    ):
        for a, b in zip(first, other, strict=True):
            assert_close(a, b)


def test_aleatoric_is_exact_near_both_ends_and_at_most_a_quarter():
    """1 − p rounds to 0 from log p = −1e-17 up; p(1 − p) does not."""
    log_p = torch.tensor(
        [-1e-20, -1e-12, 0.5**0.5 - 1, torch.tensor(0.5).log().item(), -50.0, -800.0], dtype=torch.float64
    )
    found = estimate.bernoulli_variance(log_p)
    assert_close(found[:2], torch.tensor([1e-20, 1e-12], dtype=torch.float64))
    assert_close(found[4], log_p[4].exp())
    assert found[3] == pytest.approx(0.25)
    assert ((found >= 0) & (found <= 0.25)).all()
    for zero in (0.0, -0.0):
        certain = estimate.bernoulli_variance(torch.tensor([zero], dtype=torch.float64))
        assert certain == 0
        assert not certain.signbit()


LOG_P = torch.tensor([-1e-100, -1e-20, -1e-12, -0.1, -0.7, -5.0, -745.0, -5000.0], dtype=torch.float64)


def test_log_odds_there_and_back_keep_log_p_and_the_norm_of_its_gradient():
    """With θ = log p, ∇log p is 1: its squared norm comes back as (1 − p)² times that of the log odds."""
    theta = LOG_P.clone().requires_grad_()
    odds = estimate.log_odds(theta)
    (gradient,) = torch.autograd.grad(odds.sum(), theta)
    log_p, log_G = estimate.from_log_odds(odds.detach(), gradient.square())
    assert_close(log_p, LOG_P)
    assert_close(log_G.exp(), torch.ones(8))
    assert_close(odds.detach()[:3], -(-LOG_P[:3]).log())


def test_log_odds_of_a_certain_answer_are_finite_and_its_gradient_is_zero():
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    odds = estimate.log_odds(0 * theta)
    (gradient,) = torch.autograd.grad(odds, theta)
    log_p, log_G = estimate.from_log_odds(odds.detach(), gradient.square())
    assert log_p == 0
    assert log_G == -torch.inf
    assert estimate.from_log_odds(torch.tensor([800.0]).double(), torch.ones(1).double())[1] == -1600


def an_estimate(**changes) -> Estimate:
    S = torch.tensor([-1.0, -120.0, -800.0], dtype=torch.float64)
    p, aleatoric, log_epistemic = estimate.sequence(S, torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64))
    fields = {
        "log_prob": S,
        "n_tokens": torch.tensor([1, 30, 200]),
        "probability": p,
        "aleatoric": aleatoric,
        "log_epistemic": log_epistemic,
        "log_probability": S,
        "engine": "ghost",
        "n_parameters": 7,
    }
    return Estimate(**{**fields, **changes})


def test_logarithms_live_where_probabilities_are_zero():
    found = an_estimate()
    assert_close(found.epistemic[:2], found.log_epistemic[:2].exp())
    assert found.epistemic[2] == 0
    assert found.log_epistemic[2] == -1595
    assert_close(found.log_gradient, torch.tensor([3.0, 4.0, 5.0]))
    assert len(found) == 3


def test_a_gradient_of_exactly_zero_is_minus_infinity_and_no_nan():
    log_epistemic = estimate.sequence(torch.tensor([-1.0]).double(), torch.zeros(1).double().log())[2]
    assert log_epistemic == -torch.inf
    assert an_estimate(log_epistemic=log_epistemic.expand(3)).epistemic.tolist() == [0, 0, 0]


def test_log_gradient_rests_on_log_p_under_the_aggregation_where_p_underflows():
    log_p = torch.tensor([-1.0, -900.0, -1000.0], dtype=torch.float64)
    found = an_estimate(probability=log_p.exp(), log_probability=log_p, log_epistemic=2 * log_p + 3)
    assert_close(found.log_gradient, torch.full((3,), 3.0))


def test_an_estimate_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        an_estimate().engine = "autograd"
