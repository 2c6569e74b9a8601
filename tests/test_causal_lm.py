"""Scores of token ids and of texts: closed forms, what does not change a score, and what is refused by name."""

import math

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

import isouq
from architectures import VOCAB, build, examples, upcasts_to
from closeness import assert_close, assert_logs_close
from isouq.estimate import AGGREGATIONS
from isouq.gradients import squared_norms
from isouq.language import forward, scoring
from rectangle import log_probs, score_aggregations
from reference import pad, score

CASE = examples((9, 5, 12, 7), (3, 1, 4, 2))


@pytest.fixture(scope="module")
def llama():
    return build("llama", tied=True)


@pytest.fixture(autouse=True)
def float64():
    with upcasts_to(torch.float64):
        yield


# ── Closed form ────────────────────────────────────────────────────────────────────────────────────────────────


class Bigram(nn.Module):
    """logits = W[previous token]: no Hugging Face model, no config, no logits_to_keep."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB, dtype=torch.float64)

    def forward(self, input_ids):
        return type("Output", (), {"logits": self.table(input_ids)})


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_bigram_model_in_closed_form(engine, aggregation):
    """∇ log p_t is e_{y_t} − p_t in the row of the token before: rows of different tokens are orthogonal."""
    torch.manual_seed(0)
    model = Bigram()
    ids = torch.tensor([[5, 6, 7, 6, 7]])  # 6 is followed by 7 twice: those two gradients are the same
    answer = torch.tensor([[False, False, True, False, True]])
    found = isouq.score_tokens(model, ids, answer, engine=engine, aggregation=aggregation)
    p = model.table.weight[6].softmax(-1).detach()
    residual = (nn.functional.one_hot(torch.tensor(7), VOCAB) - p).square().sum()
    log_p = p[7].log()
    wanted = {
        "sequence": (2 * log_p, 2 * (2 * log_p) + (4 * residual).log()),
        "geometric": (log_p, 2 * log_p + residual.log()),
        "token_mean": (log_p, 2 * log_p + residual.log()),
    }[aggregation]
    assert_close(found.log_prob, 2 * log_p[None])
    assert_close(found.probability, wanted[0].exp()[None])
    assert_close(found.log_epistemic, wanted[1][None])
    assert found.n_tokens.tolist() == [2]
    assert found.n_parameters == VOCAB**2
    assert found.engine == engine


# ── What is added for speed and for digits ──────────────────────────────────────────────────────────────────────


def fed(score_it) -> list[int]:
    """The widths that the model is given, without a hook on it: with one its class would not answer for it."""
    widths, run = [], forward.run

    def noted(model, argument, **inputs):
        widths.append(inputs["input_ids"].shape[1])
        return run(model, argument, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "run", noted)
        score_it()
    return widths


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("n_examples", [1, 2])
def test_a_width_is_filled_up_to_eights_without_a_trace_in_the_score(name, n_examples):
    model, case = build(name, tied=True), examples((48, 41)[:n_examples], (3, 2)[:n_examples])
    found = []
    widths = fed(lambda: found.append(isouq.score_tokens(model, *pad(case, "left"), batch_size=2)))
    assert 48 in widths  # where 47 are needed
    assert_logs_close(found[0].log_epistemic, score(model, case).epistemic["sequence"].log())


def test_a_width_is_filled_up_only_within_the_context_and_where_it_costs_little():
    model = build("llama", tied=True)
    model.config.max_position_embeddings = 61
    for length, width in [(62, 61), (57, 56), (47, 48), (46, 45), (34, 33), (25, 24)]:
        ids = examples((length,), (2,))
        assert fed(lambda ids=ids: isouq.score_tokens(model, *pad(ids, "left")))[-1] == width


@pytest.mark.parametrize(("n_answer", "rows"), [(1, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_the_head_runs_on_multiples_of_four_positions(llama, n_answer, rows):
    seen = []
    handle = llama.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    case = examples((9,), (n_answer,))
    found = isouq.score_tokens(llama, *pad(case, "none"))
    handle.remove()
    assert seen[-1] == rows
    assert len(seen) <= 4  # three more where the model was tried for causality
    assert_logs_close(found.log_epistemic, score(llama, case).epistemic["sequence"].log())


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_log_p_and_its_gradient_keep_their_digits_in_float32(scale):
    """Against float64 throughout; float32's own softmax loses a digit more on so many words."""
    logits = scale * torch.randn(2, 3, 100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 5] = -math.inf  # a word that the model rules out
    wanted = torch.tensor([[[7], [8], [9]], [[0], [1], [2]]])
    exact, narrow = logits.float().double().requires_grad_(), logits.float().requires_grad_()
    truth = exact.log_softmax(-1).gather(2, wanted).squeeze(2)
    found = forward.LogProb.apply(narrow, wanted)
    torch.testing.assert_close(found, truth, rtol=3e-7, atol=1e-6)
    truth.sum().backward()
    found.sum().backward()
    error = (narrow.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 2e-7


# ── The result ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_estimate_has_a_float64_row_per_example_in_the_callers_order(llama):
    found = isouq.score_tokens(llama, *pad(CASE, "left"), batch_size=2)
    for name in ("log_prob", "probability", "aleatoric", "log_epistemic", "epistemic"):
        column = getattr(found, name)
        assert column.dtype == torch.float64
        assert column.shape == (4,)
        assert not column.requires_grad
    assert found.n_tokens.tolist() == [3, 1, 4, 2]
    assert_close(found.log_prob, score(llama, CASE).log_prob)
    assert_close(found.aleatoric, found.probability * (1 - found.probability))
    assert found.parameters == "all"
    assert found.breakdown is None


def test_a_batch_is_as_large_as_the_memory_for_its_activations_and_no_score_depends_on_it(llama, monkeypatch):
    sizes = []
    monkeypatch.setattr(scoring, "squared_norms", lambda m, o, n, **k: sizes.append(n) or squared_norms(m, o, n, **k))
    case = [CASE[2]] * 6
    one = 1.2 * _activation_bytes(llama, case[0])  # as the pass' cost allows for what its graph does not show
    found = [isouq.score_tokens(llama, *pad(case, "left"), memory=k * one) for k in (1.01, 2.01, 100)]
    assert sizes == [1] * 6 + [2] * 3 + [6]
    for engine in ("auto", "autograd"):
        with pytest.raises(ValueError, match=r"memory: .* given, but a pass of one example takes .*; give .* or more"):
            isouq.score_tokens(llama, *pad(case[:1], "left"), memory=0.9 * one, engine=engine)
    with pytest.raises(ValueError, match="a pass of one example"):  # the gradients of the largest parameter come on top
        isouq.score_tokens(llama, *pad(case, "left"), memory=1.01 * one, engine="autograd")
    assert len(sizes) == 10, "nothing was scored before the error"
    for other in found[1:]:
        assert_close(other.log_epistemic, found[0].log_epistemic)


def _activation_bytes(model, example):
    """What the graph of one example's forward pass holds, read off the graph itself."""
    ids, answer, _mask = pad([example], "left")
    for p in model.parameters():
        p.requires_grad_()
    weights = {p.data_ptr() for p in model.parameters()}
    keep = answer[0].nonzero().flatten() - 1
    logits = model(input_ids=ids[:, :-1], logits_to_keep=keep, use_cache=False).logits
    node = [
        logits.log_softmax(-1).gather(2, ids[:, keep + 1, None]).squeeze(2).gather(1, torch.arange(len(keep))[None])
    ]
    stack, seen, saved = [node[0].grad_fn], set(), {}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [child for child, _ in node.next_functions]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, torch.Tensor) and value.data_ptr() not in weights:
                saved[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return float(sum(saved.values()) + logits.nbytes)  # the logits' gradient comes on top


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_breakdown_adds_up_to_the_whole(llama, engine, aggregation):
    options = {"aggregation": aggregation, "engine": engine, "batch_size": 3}
    found = isouq.score_tokens(llama, *pad(CASE, "left"), breakdown=True, **options)
    assert list(found.breakdown) == [name for name, _ in llama.named_parameters()]
    assert_close(torch.stack(list(found.breakdown.values())).logsumexp(0), found.log_epistemic)


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_subset_of_parameters_is_the_reference_restricted(llama, engine, aggregation):
    patterns = ["model.layers.1.*", "model.norm.weight"]
    options = {"aggregation": aggregation, "engine": engine, "parameters": patterns}
    found = isouq.score_tokens(llama, *pad(CASE, "left"), **options)
    chosen = [*llama.model.layers[1].parameters(), llama.model.norm.weight]
    assert_logs_close(found.log_epistemic, score(llama, CASE, chosen, [aggregation]).epistemic[aggregation].log())
    assert found.n_parameters == sum(p.numel() for p in chosen)
    assert found.parameters == "model.layers.1.*, model.norm.weight"


def test_an_answer_with_a_gap(llama):
    """The unmarked tokens between are context, not answer."""
    ids = CASE[2][0][None]
    marked = torch.zeros(1, 12, dtype=torch.bool)
    marked[0, [3, 4, 9]] = True
    found = score_aggregations(llama, ids, marked, aggregations=AGGREGATIONS)
    log_p = llama(input_ids=ids).logits[0].log_softmax(-1)
    tokens = torch.stack([log_p[t - 1, ids[0, t]] for t in (3, 4, 9)])
    parameters = list(llama.parameters())

    def square(value):
        return sum(g.square().sum() for g in torch.autograd.grad(value, parameters, retain_graph=True))

    assert_close(found["sequence"].log_prob, tokens.sum()[None].detach())
    assert_logs_close(found["sequence"].log_epistemic, square(tokens.sum().exp()).log()[None])
    assert_logs_close(found["geometric"].log_epistemic, square(tokens.mean().exp()).log()[None])
    mean = torch.stack([square(p) for p in tokens.exp()]).mean()
    assert_logs_close(found["token_mean"].log_epistemic, mean.log()[None])


@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
def test_log_probs_are_those_of_the_scores_without_a_gradient(llama, batch_size):
    S, n_tokens = log_probs(llama, *pad(CASE, "turns"), batch_size=batch_size)
    found = isouq.score_tokens(llama, *pad(CASE, "turns"))
    assert_close(S, found.log_prob)
    assert n_tokens.equal(found.n_tokens)
    assert not S.requires_grad


def test_training_mode_without_dropout_scores_as_eval_mode_does(llama):
    right = isouq.score_tokens(llama, *pad(CASE, "left")).log_epistemic
    model = build("llama", tied=True).train()
    assert_logs_close(isouq.score_tokens(model, *pad(CASE, "left")).log_epistemic, right)
    assert model.training


# ── 9th trap: the generated ids are scored, never text tokenised again ─────────────────────────────────────────


def a_tokenizer(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Letters, of which "a" followed by "b" merges to one token."""
    words = ["<unk>", "<s>", "</s>", *"abcdxyz ", "ab"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("a", "b")], unk_token="<unk>"))
    if template:
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


A, B, C, X, AB = 3, 4, 5, 7, 11


def ids_scored(monkeypatch, model, tokenizer, prompts, answers) -> list[tuple[list[int], list[int]]]:
    """The prompt's and the answer's ids that score_texts scores, for each pair."""
    seen, plain = [], scoring.score

    def spy(model, examples, how):
        seen.extend((x.ids[~x.answer].tolist(), x.ids[x.answer].tolist()) for x in examples)
        return plain(model, examples, how)

    monkeypatch.setattr(scoring, "score", spy)
    isouq.score_texts(model, tokenizer, prompts, answers)
    return seen


def test_9_an_answer_is_not_merged_into_its_prompt(llama, monkeypatch):
    tokenizer = a_tokenizer()
    assert tokenizer("xab")["input_ids"] == [X, AB]
    assert ids_scored(monkeypatch, llama, tokenizer, ["xa"], ["b"]) == [([X, A], [B])]
    assert ids_scored(monkeypatch, llama, tokenizer, ["x"], ["ab"]) == [([X], [AB])]


@pytest.mark.parametrize(
    ("template", "prompt_ids"),
    [(None, [X, A]), ("<s> $A", [1, X, A]), ("<s> $A </s>", [1, X, A]), ("$A </s>", [X, A])],
    ids=["no special tokens", "a start token", "both", "an end token"],
)
def test_9_special_tokens_go_before_the_prompt_and_nowhere_else(llama, monkeypatch, template, prompt_ids):
    """A tokeniser that closes every text would put its end between prompt and answer."""
    assert ids_scored(monkeypatch, llama, a_tokenizer(template), ["xa"], ["bc"]) == [(prompt_ids, [B, C])]


def test_9_an_end_of_text_that_the_caller_writes_is_scored(llama, monkeypatch):
    assert ids_scored(monkeypatch, llama, a_tokenizer(), ["x</s>"], ["b</s>"]) == [([X, 2], [B, 2])]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_9_texts_score_as_their_ids(llama, aggregation):
    prompts, answers = ["xa", "xyz abd", "x"], ["b", "cd", "abab"]
    tokenizer = a_tokenizer("<s> $A")
    table = isouq.score_texts(llama, tokenizer, prompts, answers, aggregation=aggregation, batch_size=2)
    case = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        case.append((torch.tensor(tokenizer(prompt)["input_ids"] + ids), len(ids)))
    found = isouq.score_tokens(llama, *pad(case, "left"), aggregation=aggregation)
    assert isinstance(table, pd.DataFrame)
    columns = ["n_tokens", "log_prob", "probability", "aleatoric", "epistemic", "log_epistemic"]
    assert table.columns.tolist() == ["prompt", "answer", *columns, "straddles"]
    assert table["straddles"].tolist() == [True, False, False]  # "a" and "b" are one token in "xab"
    assert table["prompt"].tolist() == prompts
    assert table["answer"].tolist() == answers
    for name in columns:
        assert_close(torch.tensor(table[name].to_numpy()), getattr(found, name))


# ── Bad input (what needs no model is in test_sequences.py) ────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompts", "answers", "error", "message"),
    [
        (["x", "x"], ["b"], ValueError, "answers: 1 given for 2 prompts, as many wanted"),
        (["x", "x"], ["b", ""], ValueError, "answers: number 1 is empty"),
        (["x", ""], ["b", "b"], ValueError, "prompts: number 1 is empty"),
        ("x", ["b"], TypeError, "prompts and answers: a string given, lists of strings wanted"),
        (["x"], "b", TypeError, "prompts and answers: a string given, lists of strings wanted"),
        ([], [], ValueError, "no example"),
        (["x", "x"], ["b", None], TypeError, "answers: number 1 is None, a text wanted"),
        (["x" * 64], ["bb"], ValueError, "example 0 has 66 tokens, at most the model's context of 64"),
    ],
)
def test_bad_texts_are_refused(llama, prompts, answers, error, message, unchecked):
    with pytest.raises(error, match=message):
        isouq.score_texts(llama, a_tokenizer(), prompts, answers)


def test_an_empty_prompt_is_fine_where_there_is_a_start_token(llama):
    assert len(isouq.score_texts(llama, a_tokenizer("<s> $A"), [""], ["b"])) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "mean"}, r"aggregation: 'mean' given, one of sequence, geometric, token_mean wanted"),
        ({"engine": "fast"}, r"engine: 'fast' given, one of auto, ghost, autograd wanted"),
        ({"batch_size": 0}, r"batch_size: 0 given, a positive integer or 'auto' wanted"),
        ({"memory": 0}, r"memory: 0 given, a number of bytes above 0 wanted"),
        ({"memory": "much"}, r"memory: much given, a number of bytes above 0 wanted"),
        ({"parameters": ["nothing.*"]}, r"parameters: 'nothing\.\*' matches none of the model's"),
        ({"parameters": ["lm_head.weight"]}, r"parameters: 'lm_head\.weight' matches none"),  # tied: it has one name
    ],
)
def test_bad_options_are_refused(llama, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        isouq.score_tokens(llama, *pad(CASE, "left"), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "fast"}, ValueError, r"engine: 'fast' given, one of auto, ghost, autograd wanted"),
        ({"memory": "much"}, ValueError, r"memory: much given, a number of bytes above 0 wanted"),
        ({"others": torch.ones(2, 3)}, TypeError, r"others: Tensor given, a tuple of ids and one or two masks wanted"),
        ({"others": (torch.ones(2, 3),)}, TypeError, r"others: tuple given, a tuple of ids and one or two masks"),
    ],
)
def test_bad_options_of_inner_products_are_refused(llama, options, error, message, unchecked):
    with pytest.raises(error, match=message):
        isouq.inner_products(llama, *pad(CASE, "left"), **options)


def test_asking_for_no_aggregation_is_refused(llama):
    with pytest.raises(ValueError, match="aggregation"):
        score_aggregations(llama, *pad(CASE, "left"), aggregations=())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("engine", ["auto", "ghost", "autograd"])
def test_logits_that_are_not_finite_are_refused_and_name_the_example(engine, value):
    """Only the sequence with the poisoned token is at fault, wherever batching has put it."""
    model = build("llama", tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = value
    case = [*CASE, (torch.tensor([7, 96, 7]), 1)]
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    with pytest.raises(ValueError, match="model: NaN or infinite logits for example 4, finite ones wanted"):
        isouq.score_tokens(model, *pad(case, "left"), engine=engine)
    with pytest.raises(ValueError, match="model: NaN or infinite logits for example 4, finite ones wanted"):
        log_probs(model, *pad(case, "left"))
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before


def test_a_model_without_input_ids_is_refused_by_name():
    with pytest.raises(TypeError, match=r"input_ids: .* which the model does not take: .*argument 'input_ids'"):
        isouq.score_tokens(torch.nn.Linear(4, 3), *pad(CASE, "left"))


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_a_model_that_changes_its_ids_in_place_gets_a_copy(engine):
    class Shifted(Bigram):
        def forward(self, input_ids):
            return super().forward(input_ids.add_(1).remainder_(VOCAB))

    model = Shifted()
    ids, answer, _ = pad(CASE, "right")
    kept, right = ids.clone(), Bigram()
    right.table.weight.data = model.table.weight.data.roll(-1, 0)
    S = isouq.score_tokens(model, ids, answer, engine=engine)
    assert_close(S.log_prob, isouq.score_tokens(right, ids, answer).log_prob, torch.float32)
    assert torch.equal(ids, kept)


@pytest.mark.parametrize("kind", ["int", None])
def test_a_model_that_takes_another_kind_of_logits_to_keep_is_not_asked_for_it(kind):
    class Last(Bigram):
        def forward(self, input_ids, logits_to_keep=0):
            logits = super().forward(input_ids).logits
            return logits[:, -logits_to_keep:] if logits_to_keep else logits

    Last.forward.__annotations__ = {"logits_to_keep": kind} if kind else {}
    model, plain = Last(), Bigram()
    plain.load_state_dict(model.state_dict())
    scores, right = (isouq.score_tokens(m, *pad(CASE, "left"), batch_size=2) for m in (model, plain))
    assert_close(scores.log_epistemic, right.log_epistemic, torch.float32)


def test_a_model_whose_output_has_another_shape_is_refused():
    class Classifier(Bigram):
        def forward(self, input_ids):
            return type("Output", (), {"logits": self.table(input_ids).sum(1, keepdim=True)})

    with pytest.raises(ValueError, match=r"model: logits of shape .* given, \(example, token, vocab\) wanted"):
        isouq.score_tokens(Classifier(), *pad(CASE, "left"))
