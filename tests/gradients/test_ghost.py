"""The fast engine against the definition, for every architecture that isouq promises to cover, and for some others."""

import functools

import pytest
import torch
import transformers

from architectures import COVERED, HELD_OUT, VOCAB, build, dtype_of, examples, upcasts_to
from closeness import assert_close, assert_logs_close
from comparison import is_exact
from isouq.estimate import AGGREGATIONS
from isouq.gradients import NotCovered
from rectangle import score_aggregations
from reference import Scores, pad, score

EXAMPLES = {"even": examples((8, 8, 8), (3, 1, 4)), "mixed": examples((9, 5, 7, 8), (3, 1, 2, 5), seed=1)}


@pytest.fixture(autouse=True)
def types_once(request):
    """Annotations are checked in the first case of each model, which is enough and half of the time."""
    given = getattr(getattr(request.node, "callspec", None), "params", {})
    if given.get("tied") or given.get("lengths") == "mixed" or given.get("n") == 6:
        request.getfixturevalue("unchecked")


@functools.cache
def model_of(name: str, tied: bool):
    with upcasts_to(dtype_of(name)):
        return build(name, tied=tied)


@functools.cache
def wanted(name: str, tied: bool, lengths: str) -> Scores:
    with upcasts_to(dtype_of(name)):
        return score(model_of(name, tied), EXAMPLES[lengths], aggregations=AGGREGATIONS)


def check(name: str, tied: bool, lengths: str, padding: str, engine: str) -> str:
    """Compare all three aggregations; returns the engine that did the work."""
    batch = pad(EXAMPLES[lengths], padding)
    dtype, reference = dtype_of(name), wanted(name, tied, lengths)
    with upcasts_to(dtype):
        estimates = score_aggregations(model_of(name, tied), *batch, aggregations=AGGREGATIONS, engine=engine)
    for aggregation, estimate in estimates.items():
        assert_close(estimate.log_prob, reference.log_prob, dtype)
        assert_logs_close(estimate.log_epistemic, reference.epistemic[aggregation].log(), dtype)
        assert estimate.n_parameters == sum(p.numel() for p in model_of(name, tied).parameters())
    return estimate.engine


@pytest.mark.parametrize(  # turns: padded left, right, left, …; ties and layout are independent, so not all four pairs
    ("tied", "lengths", "padding"), [(False, "even", "none"), (False, "mixed", "turns"), (True, "mixed", "turns")]
)
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
    assert name not in ("falcon", "bloom", "gptj", "starcoder2"), "rules that were written for others cover these"
    with pytest.raises(NotCovered) as refusal:
        check(name, tied, "mixed", "turns", "ghost")
    assert refusal.value.parameter in dict(model_of(name, tied).named_parameters())
    assert "engine='autograd'" in str(refusal.value)


# ── Classifiers of the Hub: not causal, encoders, layers used several times, images ────────────────────────────────

_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "num_labels": 3,
}
_IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 3,
}
CLASSIFIERS = {
    "BertForSequenceClassification": ("BertConfig", _BERT),
    "RobertaForSequenceClassification": ("RobertaConfig", _BERT),
    "AlbertForSequenceClassification": ("AlbertConfig", {**_BERT, "embedding_size": 8}),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "num_labels": 3},
    ),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", {**_BERT, "relative_attention": True}),
    "ViTForImageClassification": ("ViTConfig", _IMAGE),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2, "image_size": 16, "num_labels": 3},
    ),
    "ResNetForImageClassification": (
        "ResNetConfig",
        {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3},
    ),
}


@functools.cache
def classifier(name: str):
    config_name, settings = CLASSIFIERS[name]
    config = getattr(transformers, config_name)(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


def inputs_of(name: str, n: int) -> torch.Tensor:
    size = CLASSIFIERS[name][1].get("image_size", 32)
    return torch.randn(n, 3, size, size).double() if "Image" in name else torch.randint(3, VOCAB, (n, 6))


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_held_out_classifier_is_exact(name, n):
    model, x = classifier(name), inputs_of(name, n)
    with upcasts_to(torch.float64):
        assert is_exact(model, lambda rows: model(x[rows]).logits.log_softmax(-1)[:, :2], n)
