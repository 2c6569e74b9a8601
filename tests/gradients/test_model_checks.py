"""What every door asks of a model: a module with numbers, causal where it writes text, the same output every time."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import isouq
from architectures import build
from comparison import classes, wanted
from rectangle import log_probs, score_aggregations
from reference import pad

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
CASE = [(torch.tensor([3, 4, 5, 6]), 2)]
LM_DOORS = {
    "score_tokens": isouq.score_tokens,
    "score_aggregations": score_aggregations,
    "log_probs": log_probs,
    "inner_products": isouq.inner_products,
}
CLASS_DOORS = {
    "score_classes": isouq.score_classes,
    "score_outputs": lambda model, x: isouq.score_outputs(model, x, noise_variance=1.0),
}


class ReadsMode(nn.Module):
    """Functional dropout, or something else, in training mode only."""

    def __init__(self, in_training, **numbers):
        super().__init__()
        self.layer, self.in_training = nn.Linear(5, 3), in_training
        vars(self).update(numbers)

    def forward(self, x):
        return self.layer(self.in_training(x) if self.training else x)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(torch.stack([F.dropout(row, 0.5, self.training) for row in x]))


class Power(nn.Linear):
    """A number that only looks like a rate."""

    def __init__(self, p):
        super().__init__(5, 3)
        self.p = p

    def forward(self, x):
        return super().forward(x**self.p)


class Attention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(5, 1, dropout=dropout, batch_first=True)

    def forward(self, x):
        return self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]


def stack(*layers):
    return nn.Sequential(nn.Linear(5, 6), *layers, nn.Linear(6, 3))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("door", CLASS_DOORS.values(), ids=CLASS_DOORS)
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: stack(nn.Dropout(0.5)), r"dropout p=0\.5 \(1\)"),
        (lambda: stack(nn.AlphaDropout(0.5)), r"dropout p=0\.5 \(1\)"),
        (lambda: stack(nn.BatchNorm1d(6)), r"BatchNorm1d \(1\)"),
        (lambda: stack(nn.RReLU()), r"RReLU \(1\)"),
        (lambda: stack(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))), "_SpectralNorm"),
        (lambda: stack(nn.utils.spectral_norm(nn.Linear(6, 6))), "SpectralNorm"),
        (lambda: Attention(0.1), r"dropout dropout=0\.1 \(attention\)"),
        (lambda: ReadsMode(F.dropout), "ReadsMode"),
        (lambda: ReadsMode(lambda x: x - x.mean(0)), "ReadsMode"),
        (lambda: ReadsMode(lambda x: x, drop_path=0.1), r"dropout drop_path=0\.1"),
        (Nested, "Nested"),
        (lambda: torch.jit.script(stack(nn.BatchNorm1d(6))), "RecursiveScriptModule"),
    ],
)
def test_a_training_mode_that_matters_is_refused_at_every_door(make, why, door):
    model = make().train()
    before = [b.clone() for b in model.buffers()]
    with pytest.raises(ValueError, match=rf"model: in training mode with {why}.*call model\.eval\(\)"):
        door(model, X)
    assert model.training
    assert all(map(torch.equal, before, model.buffers()))
    assert len(door(model.eval(), X).log_epistemic) == 3


@pytest.mark.parametrize(
    "model",
    [
        stack(nn.Tanh()),
        stack(nn.Dropout(0.0)),
        stack(nn.LayerNorm(6)),
        Attention(0.0),
        stack(nn.InstanceNorm1d(6)),
        ReadsMode(lambda x: x, drop_path=0.0),
        Power(3),
        nn.Sequential(
            nn.Unflatten(1, (1, 5)), nn.TransformerEncoderLayer(5, 1, 8, 0.0, batch_first=True), nn.Flatten()
        ),
    ],
)
def test_a_training_mode_that_changes_nothing_is_none_of_our_business(model):
    scores = isouq.score_classes(model.train(), X, torch.zeros(3).long())
    assert torch.allclose(
        isouq.score_classes(model.eval(), X, torch.zeros(3).long()).log_epistemic, scores.log_epistemic
    )


@pytest.mark.parametrize("door", LM_DOORS.values(), ids=LM_DOORS)
@pytest.mark.parametrize("part", ["the model", "one attention"])
def test_dropout_that_a_config_states_is_refused_at_every_door(door, part):
    model = build("gpt2", tied=True)
    (model if part == "the model" else model.transformer.h[0].attn).train()
    with pytest.raises(ValueError, match=r"model: in training mode with dropout .*call model\.eval\(\)"):
        door(model, *pad(CASE, "left"))
    assert len(door(model.eval(), *pad(CASE, "left"))) > 0


@pytest.mark.parametrize("engine", ["auto", "ghost", "autograd"])
def test_a_model_that_is_random_in_eval_mode_too_is_refused(engine):
    class Always(nn.Linear):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5))

    with pytest.raises(ValueError, match="model: its forward pass draws random numbers"):
        isouq.score_classes(Always(5, 3).eval(), X, engine=engine)


# ── Weights without numbers, without a gradient, or no weights ───────────────────────────────────────────────────────


def made_under_inference_mode():
    with torch.inference_mode():
        return nn.Linear(5, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lambda x: x, TypeError, r"model: function given, a torch\.nn\.Module wanted"),
        (lambda: None, TypeError, "model: NoneType given"),
        (made_under_inference_mode, ValueError, r"model: weight was made under torch\.inference_mode\(\)"),
        (lambda: nn.Linear(5, 3, device="meta"), ValueError, "model: weight is on the meta device, without numbers"),
        (lambda: stack(nn.Linear(6, 6, device="meta")), ValueError, r"model: 1\.weight is on the meta device"),
        (lambda: nn.LazyLinear(3), ValueError, "model: weight has no shape yet; run the lazy module once"),
        (lambda: nn.Softmax(1), ValueError, "model has no parameters"),
        (lambda: Holding(torch.randn(5, dtype=torch.complex64)), ValueError, r"complex parameters.*held \(torch\.comp"),
        (lambda: Holding(torch.ones(5, dtype=torch.int8)), ValueError, r"quantised parameters.*held \(torch\.int8\)"),
        (lambda: Holding(torch.ones(5, dtype=torch.int16)), ValueError, "quantised parameters"),
        (lambda: Holding(torch.ones(5, 1, dtype=torch.int32)), ValueError, "quantised parameters"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_cannot_be_scored_is_refused_in_true_words(make, error, message, unchecked):
    with pytest.raises(error, match=message):
        isouq.score_classes(make(), X)


class Holding(nn.Module):
    """A linear layer, and a parameter that picks features, or one that multiplies them."""

    def __init__(self, held):
        super().__init__()
        self.layer, self.held = nn.Linear(5, 3), nn.Parameter(held, requires_grad=held.is_complex())

    def forward(self, x):
        return self.layer((x * self.held).abs() if self.held.is_complex() else x[:, self.held])


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_parameter_of_places_takes_no_gradient_and_is_not_counted(dtype, engine):
    plain, model = nn.Linear(5, 3), Holding(torch.tensor([4, 3, 2, 1, 0]).to(dtype))
    model.layer = plain
    target = torch.tensor([0, 1, 2])
    scores = isouq.score_classes(model, X, target, engine=engine)
    right = isouq.score_classes(plain, X.flip(1), target, engine=engine)
    assert scores.n_parameters == 18
    assert torch.allclose(scores.log_epistemic, right.log_epistemic)
    with pytest.raises(ValueError, match=r"parameters: \['held'\] asked for, at least one with a gradient wanted"):
        isouq.score_classes(model, X, parameters=["held"])


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
def test_complex_parameters_that_are_not_asked_for_do_not_disturb(engine):
    model = Holding(torch.randn(5, dtype=torch.complex64))
    scores = isouq.score_classes(model, X, torch.zeros(3).long(), parameters=["layer.*"], engine=engine)
    right = wanted(model, classes(model, X), 3)[:, 0, 1:].sum(1)
    assert torch.allclose(scores.log_gradient, right.log(), atol=1e-4)
    assert model.held.grad is None


# ── Causality ────────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def bert(**settings):
    return transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, initializer_range=0.5, **settings))


def xlnet():
    config = transformers.XLNetConfig(vocab_size=100, d_model=8, n_layer=1, n_head=2, d_inner=8, initializer_range=0.5)
    return transformers.XLNetLMHeadModel(config)


def t5():
    config = transformers.T5Config(vocab_size=100, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("door", LM_DOORS.values(), ids=LM_DOORS)
@pytest.mark.parametrize("make", [bert, xlnet, t5])
def test_a_model_that_sees_what_follows_is_refused(make, door):
    with pytest.raises(ValueError, match=r"model: not causal.*a causal, decoder-only language model wanted"):
        door(make().eval(), *pad(CASE, "left"))


def llama_by_config():
    return build("llama", tied=True, is_causal=False)


def gemma_by_config():
    return build("gemma3", tied=True, use_bidirectional_attention=True)


def gpt2_by_module():
    model = build("gpt2", tied=True)
    for block in model.transformer.h:
        block.attn.is_causal = False
    return model


@pytest.mark.parametrize("door", LM_DOORS.values(), ids=LM_DOORS)
@pytest.mark.parametrize("make", [llama_by_config, gemma_by_config, gpt2_by_module])
def test_a_decoder_that_was_made_an_encoder_is_refused(make, door):
    with pytest.raises(ValueError, match=r"model: not causal.*a causal, decoder-only language model wanted"):
        door(make(), *pad(CASE, "left"))


def test_the_same_class_as_a_decoder_is_scored():
    model = bert(is_decoder=True).eval()
    log_p = model(input_ids=CASE[0][0][None]).logits[0].double().log_softmax(1)
    S = log_probs(model, *pad(CASE, "left"))[0]
    assert torch.allclose(S, log_p[1, 5] + log_p[2, 6], atol=1e-5)


class Switch(nn.Module):
    """Causal or not, by an attribute that no shape or hook betrays; no `.logits`, fewer words in the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head, self.both_ways = nn.Embedding(9, 4), nn.Linear(4, 7), False

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(x.mean(1, keepdim=True) + x if self.both_ways else x)


def test_causality_is_tried_anew_in_each_call():
    model = Switch()
    assert isouq.score_tokens(model, *pad(CASE, "left")).log_prob.isfinite().all()
    model.both_ways = True
    with pytest.raises(ValueError, match="model: not causal"):
        isouq.score_tokens(model, *pad(CASE, "left"))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 4, 9, 6], r"input_ids: \(1, 11\) torch\.int64 given, which the model does not take: index out of range"),
        ([3, 4, 8, 8], "input_ids: example 0 has an answer id above 6, the last of the logits' words"),
    ],
)
def test_ids_beyond_a_vocabulary_that_no_config_states(ids, message):
    with pytest.raises(ValueError, match=message):
        isouq.score_tokens(Switch(), *pad([(torch.tensor(ids), 2)], "left"))
