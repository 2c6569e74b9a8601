"""What a stored number depends on: plain content and the whole model; and the modules that a notebook can reach."""

import copy

import nbformat
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from isouq import models as isouq_models
from isouq.studies import identity


def files_of(job: str) -> set[str]:
    start = identity.PACKAGE.parent.joinpath(*job.split(".")).with_suffix(".py")
    return {file.relative_to(identity.PACKAGE).as_posix() for file in identity.module_files(start)}


def test_a_job_depends_on_what_computes_and_not_on_what_starts_or_draws():
    scoring, questions = files_of("isouq.language.scoring"), files_of("isouq.studies.qa.stages")
    assert {"estimate.py", "gradients/autograd.py", "language/scoring.py", "language/forward.py"} <= scoring
    assert {"studies/qa/stages.py", "studies/qa/data.py", "studies/store.py"} | scoring <= questions
    for name in ("cli.py", "pipeline/profiles.py", "studies/plotting.py"):
        assert (identity.PACKAGE / name).is_file()
        assert name not in questions
    assert not {"studies/qa/study.py", "studies/qa/analysis.py"} & questions


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in the place of isouq."""
    package = tmp_path / "isouq"
    for name, source in {
        "__init__": "from isouq.deep import thing",
        "a": "def f():\n    from isouq import b",
        "b": "import numpy",
        "deep": "thing = 1",
        "unused": "",
        "sub/__init__": "from isouq import unused",
        "sub/c": "from . import d",
        "sub/d": "from ..b import something",
    }.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    monkeypatch.setattr(identity, "PACKAGE", package)
    return package


def test_module_files_follow_imports_and_nothing_else(package, tmp_path):
    def used(source: str) -> set[str]:
        notebook = tmp_path / "n.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), notebook)
        return {file.relative_to(package).with_suffix("").as_posix() for file in identity.module_files(notebook)}

    assert used("from isouq import a") == {"__init__", "a", "b"}, "also an import inside a function"
    assert used("import isouq.sub.c as c") == {"__init__", "sub/__init__", "sub/c", "sub/d", "b"}
    assert used("import isouq") == {"__init__", "deep"}, "a package's own names: what it imports counts"
    assert used("from isouq import thing") == {"__init__", "deep"}
    assert used("import isouq_other, numpy") == set()
    itself = {file.name for file in identity.module_files(package / "a.py")}
    assert itself == {"__init__.py", "a.py", "b.py"}, "a job that runs a module depends on it"


def language_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="b")


def one_weight(model, tokenizer):
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] += 1e-6


def a_buffer(model, tokenizer):
    model.model.rotary_emb.inv_freq[0] *= 1.01


def another_type(model, tokenizer):
    model.bfloat16()


def the_configuration(model, tokenizer):
    model.config.rms_norm_eps *= 2


def the_attention(model, tokenizer):
    model.config._attn_implementation = "eager" if model.config._attn_implementation != "eager" else "sdpa"


def the_end_of_generation(model, tokenizer):
    model.generation_config.eos_token_id = [2, 3]


def the_normaliser(model, tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def a_special_token(model, tokenizer):
    tokenizer.eos_token = "a"


def a_word(model, tokenizer):
    tokenizer.add_tokens(["c"])


CHANGES = (one_weight, a_buffer, another_type, the_configuration, the_attention)
CHANGES += (the_end_of_generation, the_normaliser, a_special_token, a_word)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_what_a_model_computes_with_is_seen(change):
    model, tokenizer = language_model()
    before = isouq_models.weights(model, tokenizer)
    change(model, tokenizer)
    assert isouq_models.weights(model, tokenizer) != before


def test_where_a_model_lies_and_how_it_was_used_is_not_seen():
    model, tokenizer = language_model()
    before = isouq_models.weights(model, tokenizer)
    model.config._name_or_path, model.config.transformers_version = "/elsewhere", "0.0"
    tokenizer.pad_token = tokenizer.eos_token
    padded = isouq_models.weights(model, tokenizer)
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=3)
    assert isouq_models.weights(model, tokenizer) == padded
    tokenizer.pad_token = None
    assert isouq_models.weights(copy.deepcopy(model), tokenizer) == before


def test_a_plain_module_has_an_identity_too():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    before = isouq_models.weights(model)
    model[1].running_mean += 1
    assert isouq_models.weights(model) != before


def test_a_number_that_is_none_has_no_digest():
    assert identity.digest({"a": [1, 2.5], "b": None}) == identity.digest({"b": None, "a": [1, 2.5]})
    with pytest.raises(ValueError, match="JSON compliant"):
        identity.digest({"a": float("nan")})
