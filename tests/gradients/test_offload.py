"""Models whose weights accelerate keeps elsewhere and loads for each forward pass, as device_map="auto" does."""

import accelerate
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from isouq.language.examples import from_pairs
from isouq.language.scoring import Scoring, inner_products, score

PAIRS = [([5, 6, 7], [8, 9]), ([10, 11], [12]), ([13, 14, 15, 16], [17, 18, 19])]


def model_of(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, tie_word_embeddings=tied)).eval()


@pytest.fixture(params=[True, False], ids=["tied", "apart"])
def tied(request) -> bool:
    return request.param


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request, tied, tmp_path) -> LlamaForCausalLM:
    model = model_of(tied=tied)
    if request.param == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    return accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
def test_offloaded_weights_have_the_gradients_of_loaded_ones(offloaded, tied, engine):
    assert all(p.is_meta for p in offloaded.parameters())
    how = Scoring(engine=engine, breakdown=True)
    away, plain = (score(m, from_pairs(PAIRS), how)["sequence"] for m in (offloaded, model_of(tied=tied)))
    assert away.engine == engine
    assert away.n_parameters == plain.n_parameters
    assert torch.allclose(away.log_epistemic, plain.log_epistemic, atol=1e-5)
    assert away.breakdown.keys() == plain.breakdown.keys()
    for name, values in plain.breakdown.items():
        assert torch.allclose(away.breakdown[name], values, atol=1e-4), name
    assert all(p.is_meta for p in offloaded.parameters()), "the weights are away again"


def test_offloaded_weights_have_the_inner_products_of_loaded_ones(offloaded, tied):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    last = torch.tensor([[False, False, True, True]]).expand(2, 4)
    away, plain = (inner_products(m, ids, last) for m in (offloaded, model_of(tied=tied)))
    assert torch.allclose(away, plain, rtol=1e-5)
