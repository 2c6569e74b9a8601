"""What `import isouq` gives: the public names with their examples, and the old names of modules that moved."""

import doctest
import importlib
import inspect
import re
import sys

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import isouq

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PUBLIC = {name: getattr(isouq, name) for name in isouq.__all__}
PUBLIC |= {f"plotting.{name}": getattr(isouq.plotting, name) for name in ("tokens", "layers")}
CALLABLE = [name for name, value in PUBLIC.items() if callable(value)]
SECTIONS = {"Returns:", "Raises:", "Example:"}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What an example takes for granted: a tiny model, its tokenizer of single letters, the folder of both."""
    folder = str(tmp_path_factory.mktemp("model"))
    letters = models.BPE({letter: i for i, letter in enumerate("? abcdefghijklmnopqrstuvwxyz")}, [])
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(letters)).save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=28, **TINY)).save_pretrained(folder)
    model, tokenizer = isouq.load_causal_lm(folder)
    return {"isouq": isouq, "torch": torch, "model": model, "tokenizer": tokenizer, "folder": folder}


@pytest.mark.parametrize("name", CALLABLE)
def test_a_public_name_says_what_it_takes_and_gives_and_its_example_runs(name, names, capsys):
    public = PUBLIC[name]
    wanted = {"Attributes:", *SECTIONS} - {"Returns:"} if inspect.isclass(public) else {"Args:", *SECTIONS}
    text = inspect.getdoc(public)
    assert wanted <= {line.strip() for line in text.splitlines()}
    if not inspect.isclass(public):
        lines = re.findall(r"^    ([\w, ]+): ", text, re.MULTILINE)
        described = {argument for line in lines for argument in line.split(", ")}
        assert described >= set(inspect.signature(public).parameters)
    [example] = doctest.DocTestFinder(recurse=False).find(public, name, globs=dict(names))
    assert example.examples
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("causal_lm", "language.scoring"),
        ("assets", "studies.assets"),
        ("distortion", "studies.isotropy.distortion"),
        ("qa", "studies.qa"),
        ("qa.judge", "studies.qa.judge"),
        ("isotropy.covariance", "studies.isotropy.covariance"),
    ],
)
def test_a_module_that_moved_is_found_under_its_old_name_with_a_warning(monkeypatch, old, new):
    old, new = f"isouq.{old}", f"isouq.{new}"
    for name in [name for name in sys.modules if old.startswith(name) and name != "isouq"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)


@pytest.mark.filterwarnings("ignore:isouq.*is now:DeprecationWarning")
def test_every_module_that_moved_is_there():
    for old, new in isouq._MOVED.items():
        module = importlib.import_module(f"isouq.{old}")
        for part in new:
            assert vars(importlib.import_module(f"isouq.{part}")).keys() <= vars(module).keys()


def test_names_of_the_books_figures_are_found_where_they_were():
    with pytest.warns(
        DeprecationWarning, match=r"isouq\.plotting\.intervals is now isouq\.studies\.plotting\.interval"
    ):
        found = isouq.plotting.intervals
    assert found is importlib.import_module("isouq.studies.plotting").intervals
    with pytest.raises(AttributeError, match="no attribute 'token'; it has tokens and layers"):
        _ = isouq.plotting.token


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(AttributeError, match=r"'isouq' has no attribute 'score'; it has .*, Estimate, .*score_tokens"):
        _ = isouq.score
