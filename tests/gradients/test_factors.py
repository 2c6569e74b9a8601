"""Each form of a gradient per example, beside the gradient written out."""

import pytest
import torch

from closeness import assert_close
from isouq.gradients import factors
from isouq.gradients.factors import Dense, NoRule, Outer, Rows

N, VOCAB, WIDTH = 3, 7, 5


def outer(n_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64, slot: int | None = None) -> Outer:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(N, n_tokens, size, generator=generator, dtype=dtype) for size in (VOCAB, WIDTH))
    return Outer(left, right, slot=slot)


def rows(n_tokens: int, seed: int = 0) -> Rows:
    """Few different tokens, so that some occur twice."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 3, (N, n_tokens), generator=generator)
    return Rows(index, torch.randn(N, n_tokens, WIDTH, generator=generator, dtype=torch.float64))


def dense(seed: int = 0) -> Dense:
    generator = torch.Generator().manual_seed(seed)
    return Dense(torch.randn(N, VOCAB, WIDTH, generator=generator, dtype=torch.float64))


def written_out(factor: factors.Factor) -> torch.Tensor:
    """(example, vocab, width), by loops over examples and tokens."""
    if isinstance(factor, Dense):
        return factor.grad
    grad = torch.zeros(N, VOCAB, WIDTH, dtype=torch.float64)
    for i in range(N):
        if isinstance(factor, Outer):
            for left, right in zip(factor.left[i].double(), factor.right[i].double(), strict=True):
                grad[i] += torch.outer(left, right)
        elif isinstance(factor, Rows):
            for place, row in zip(factor.index[i], factor.right[i], strict=True):
                grad[i, place] += row
    return grad


def squares(factor: factors.Factor) -> torch.Tensor:
    return written_out(factor).square().sum((1, 2))


@pytest.mark.parametrize(
    "factor",
    [outer(1), outer(2), outer(4), outer(40), outer(4).transposed(), rows(1), rows(6), dense()],
    ids=["outer of a token", "of 2 tokens", "of 4", "of 40", "transposed", "a row", "rows that collide", "dense"],
)
def test_squared_norm_is_that_of_the_gradient_written_out(factor):
    transposed = isinstance(factor, Outer) and factor.left.shape[2] == WIDTH
    assert_close(factor.squared_norm(), squares(factor.transposed() if transposed else factor))


@pytest.mark.parametrize(("n_tokens", "as_gram"), [(2, True), (40, False)])
def test_both_ways_to_the_norm_of_an_outer_sum_are_taken_in_this_file(monkeypatch, n_tokens, as_gram):
    calls, inner = [], Outer.inner
    monkeypatch.setattr(Outer, "inner", lambda *factors: calls.append(1) or inner(*factors))
    outer(n_tokens).squared_norm()
    assert bool(calls) == as_gram


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_tokens", [1, 2, 40])
def test_half_precision_factors_are_multiplied_in_float32(dtype, n_tokens):
    """Against float64 of the same rounded numbers the error is float32's."""
    factor = outer(n_tokens, dtype=dtype)
    assert_close(factor.squared_norm(), squares(factor), torch.float32)


@pytest.mark.parametrize(
    ("f", "g"),
    [
        (outer(4), outer(6, seed=1)),
        (outer(4), rows(6, seed=1)),
        (rows(4), rows(6, seed=1)),
        (outer(4), dense(seed=1)),
        (dense(), dense(seed=1)),
    ],
    ids=["outer, outer", "outer, rows", "rows, rows", "outer, dense", "dense, dense"],
)
def test_inner_product_of_two_forms(f, g):
    right = (written_out(f) * written_out(g)).sum((1, 2))
    assert_close(f.inner(g), right)
    assert_close(g.inner(f), right)


def test_gradients_of_different_slices_are_orthogonal():
    assert (outer(4, slot=0).inner(outer(6, slot=1)) == 0).all()
    assert_close(outer(4, slot=1).inner(outer(6, slot=1)), outer(4).inner(outer(6)))


@pytest.mark.parametrize(("f", "g"), [(rows(4), dense()), (outer(4, slot=0), dense())])
def test_forms_without_a_common_rule_are_refused(f, g):
    with pytest.raises(NoRule, match="dense"):
        f.inner(g)
