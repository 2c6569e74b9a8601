"""The two real language models: the fast engine beside the reference, and both beside float64."""

import gguf
import pytest
import torch

from architectures import upcasts_to
from closeness import assert_logs_close
from isouq.estimate import AGGREGATIONS
from isouq.language import encoding
from isouq.language.examples import from_pairs
from isouq.language.scoring import Scoring, score
from isouq.studies import assets

PAIRS = [("The capital of France is", " Paris."), ("Q: Who wrote Hamlet?\nA:", " William Shakespeare")]
N_PARAMETERS = {"smollm2-135m-instruct": 134_515_008, "gemma-3-270m": 268_098_176}
SOURCE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module", params=N_PARAMETERS)
def loaded(request):
    return (request.param, *assets.load_causal_lm(request.param))


def examples_of(tokenizer):
    return from_pairs(encoding.pair(tokenizer, *texts)[:2] for texts in PAIRS)


def relative(log_a, log_b):
    return (log_a - log_b).expm1().abs().max().item()


def test_ghost_equals_autograd(loaded):
    """U_E = e^{2S} G carries twice the rounding of S, which differs from one processor to another, besides G's own."""
    name, model, tokenizer = loaded
    examples = examples_of(tokenizer)
    ghost, autograd = (
        score(model, examples, Scoring(aggregations=AGGREGATIONS, engine=engine)) for engine in ("ghost", "autograd")
    )
    for aggregation in AGGREGATIONS:
        assert ghost[aggregation].engine == "ghost"
        rounding = relative(ghost[aggregation].log_prob, autograd[aggregation].log_prob)
        assert rounding <= 1e-5
        error = relative(ghost[aggregation].log_epistemic, autograd[aggregation].log_epistemic)
        assert error <= 1e-5 + 2 * rounding
        n = sum(p.numel() for p in model.parameters())
        assert ghost[aggregation].n_parameters == autograd[aggregation].n_parameters == n == N_PARAMETERS[name]


def test_float32_and_float64(loaded):
    """In float64 the engines agree; float32 differs from it by its own rounding, in both engines alike.

    G = ‖∇S‖² is compared, the gradient itself; U_E = e^{2S} G also carries twice the rounding of S.
    """
    _, model, tokenizer = loaded
    examples = examples_of(tokenizer)
    found = {}
    try:
        for dtype in (torch.float32, torch.float64):
            with upcasts_to(dtype):
                for engine in ("ghost", "autograd"):
                    scores = score(model.to(dtype), examples, Scoring(engine=engine))
                    found[dtype, engine] = scores["sequence"].log_gradient
    finally:
        model.float()
    assert_logs_close(found[torch.float64, "ghost"], found[torch.float64, "autograd"])
    assert relative(found[torch.float32, "ghost"], found[torch.float32, "autograd"]) <= 1e-5
    for engine in ("ghost", "autograd"):
        assert relative(found[torch.float32, engine], found[torch.float64, "autograd"]) <= 1e-5


def test_a_matrix_that_a_file_holds_twice_is_one_again():
    """Qwen's file has the tied matrix twice, quantised twice; the model's is the copy of more bits, bit for bit."""
    name = "qwen-coder-0-5b-instruct"
    model, _ = assets.load_causal_lm(name)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == 494_032_768
    stored = {t.name: t for t in gguf.GGUFReader(assets.path(name).parent / "source" / SOURCE).tensors}
    head, embedding = (
        torch.from_numpy(gguf.quants.dequantize(stored[key].data, stored[key].tensor_type))
        for key in ("output.weight", "token_embd.weight")
    )
    assert torch.equal(model.lm_head.weight, head)
    assert 0.01 < (head - embedding).norm() / head.norm() < 0.1
    assert stored["output.weight"].n_bytes > stored["token_embd.weight"].n_bytes
