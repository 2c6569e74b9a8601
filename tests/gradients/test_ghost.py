"""The fast engine against the definition, for every architecture that isouq promises to cover, and for some others."""

import functools

import pytest
from architectures import COVERED, HELD_OUT, build, dtype_of, examples, upcasts_to
from closeness import assert_close, assert_logs_close
from reference import Scores, pad, score

from isouq.causal_lm import score_aggregations
from isouq.estimate import AGGREGATIONS
from isouq.gradients import NotCovered

EXAMPLES = {
    "even": examples((8, 8, 8), (3, 1, 4)),
    "mixed": examples((9, 5, 7, 8), (3, 1, 2, 5), seed=1),
}


@functools.cache
def model_of(name: str, tied: bool):
    with upcasts_to(dtype_of(name)):
        return build(name, tied=tied)


@functools.cache
def wanted(name: str, tied: bool, lengths: str) -> Scores:
    with upcasts_to(dtype_of(name)):
        return score(model_of(name, tied), EXAMPLES[lengths])


def check(name: str, tied: bool, lengths: str, padding: str, engine: str) -> str:
    """Compare all three aggregations; returns the engine that did the work."""
    batch = pad(EXAMPLES[lengths], padding)
    dtype, reference = dtype_of(name), wanted(name, tied, lengths)
    with upcasts_to(dtype):
        found = score_aggregations(model_of(name, tied), *batch, aggregations=AGGREGATIONS, engine=engine)
    for aggregation, estimate in found.items():
        assert_close(estimate.log_prob, reference.log_prob, dtype)
        assert_logs_close(estimate.log_epistemic, reference.epistemic[aggregation].log(), dtype)
        assert estimate.n_parameters == sum(p.numel() for p in model_of(name, tied).parameters())
    return estimate.engine


@pytest.mark.parametrize(("lengths", "padding"), [("even", "none"), ("mixed", "left"), ("mixed", "right")])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", COVERED)
def test_covered_architecture_is_exact(name, tied, lengths, padding):
    model = model_of(name, tied)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert check(name, tied, lengths, padding, "ghost") == "ghost"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_architecture_is_exact_or_refused(name, tied):
    """`auto` is always right; `ghost` is right or names the parameter that it does not cover."""
    engine = check(name, tied, "mixed", "turns", "auto")
    if engine == "ghost":
        return
    with pytest.raises(NotCovered) as refusal:
        check(name, tied, "mixed", "turns", "ghost")
    assert refusal.value.parameter in dict(model_of(name, tied).named_parameters())
    assert "engine='autograd'" in str(refusal.value)


def test_some_held_out_architectures_are_covered():
    """Otherwise the test above would say nothing about the rules."""
    exact = [name for name in ("falcon", "bloom", "gptj", "starcoder2") if check(name, True, "even", "none", "ghost")]
    assert len(exact) == 4
