"""The page of recipes does what it says: its blocks run in order, on a tiny model, and give the right numbers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from closeness import assert_logs_close
from reference import squared_norm, token_log_probs

PAGE = Path(__file__).resolve().parents[1] / "book" / "recipes.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page():
    """The names that the page leaves behind."""
    letters = models.BPE({letter: i for i, letter in enumerate("? abcdefghijklmnopqrstuvwxyz")}, [])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {
        "model": LlamaForCausalLM(LlamaConfig(vocab_size=28, **sizes)).eval(),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=Tokenizer(letters)),
    }
    exec(compile("\n".join(BLOCKS), PAGE.name, "exec"), names)
    return names


def reference(model, ids, n_answer, parameters=None):
    """log ‖∇p‖² of one answer over some parameters, by a plain backward pass."""
    p = token_log_probs(model, ids, n_answer).sum().exp()
    return squared_norm(p, parameters or list(model.parameters())).log()[None]


def test_adapters_are_scored_by_themselves_and_with_the_rest(page):
    tuned, ids = page["tuned"], page["ids"][0]
    n_answer = int(page["answer_mask"].sum())
    only = [p for name, p in tuned.named_parameters() if ".lora_" in name]
    assert page["adapters"].n_parameters == sum(p.numel() for p in only)
    assert page["adapters"].engine == page["everything"].engine == "ghost"
    assert_logs_close(page["adapters"].log_epistemic, reference(tuned, ids, n_answer, only), torch.float32)
    assert_logs_close(page["everything"].log_epistemic, reference(tuned, ids, n_answer), torch.float32)
    small = [p for name, p in page["small"].named_parameters() if ".lora_" in name]
    assert_logs_close(page["qlora"].log_epistemic, reference(page["small"], ids, n_answer, small), torch.float32)


def test_experts_and_weights_that_are_away_give_the_numbers_of_a_backward_pass(page):
    ids, n_answer = page["ids"][0], int(page["answer_mask"].sum())
    assert page["experts"].engine == "ghost"
    assert_logs_close(page["experts"].log_epistemic, reference(page["mixture"], ids, n_answer), torch.float32)
    assert_logs_close(page["offloaded"].log_epistemic, reference(page["model"], ids, n_answer), torch.float32)


def test_a_quantised_model_is_refused_in_the_words_of_the_page(page):
    assert re.search(r"quantised .*q_proj\.base\.packed \(torch\.int8\).*; load it in float32", page["message"])


def test_transcripts_are_scored_by_their_own_ids(page):
    wanted = [token_log_probs(page["model"], torch.tensor([*p, *a]), len(a)).sum() for p, a in page["served"]]
    assert page["scores"].log_prob.tolist() == pytest.approx([x.item() for x in wanted], rel=1e-5)


def test_the_nearest_example_is_the_answer_itself(page):
    cosine = page["cosine"].numpy()
    assert cosine.argmax(axis=1).tolist() == [0, 1]
    np.testing.assert_allclose([cosine[0, 0], cosine[1, 1]], 1, rtol=1e-5)
    model, gradients = page["model"], []
    for rows in (page["served"][0], ([10, 10, 2], [7, 2])):
        S = token_log_probs(model, torch.tensor([*rows[0], *rows[1]]), len(rows[1])).sum()
        parts = torch.autograd.grad(S, list(model.parameters()))
        gradients.append(torch.cat([part.double().flatten() for part in parts]))
    assert cosine[0, 2] == pytest.approx(torch.cosine_similarity(*gradients, dim=0).item(), rel=1e-4)
