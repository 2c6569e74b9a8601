"""Inner products of gradients against the gradients themselves, whichever way they are taken."""

import contextlib
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import rectangle as scoring
from architectures import COVERED, build, dtype_of, examples, upcasts_to
from closeness import RELATIVE
from isouq.gradients import NotCovered, products
from isouq.gradients.factors import Dense, Outer, Part, Rows
from reference import pad, token_log_probs

ROWS = examples((9, 5, 7, 8), (3, 1, 2, 5), seed=1)
OTHERS = examples((6, 9, 4), (2, 4, 1), seed=2)
SHORT = examples((3, 2, 3), (1, 1, 2), seed=3)  # so short that token products beat explicit gradients


def gradients(model: nn.Module, sequences) -> torch.Tensor:
    """∇S of each example, whole, by plain autograd: (example, param)."""
    rows = []
    for ids, n_answer in sequences:
        grads = torch.autograd.grad(token_log_probs(model, ids, n_answer).sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten().double() for g in grads]))
    return torch.stack(rows)


def assert_near(products: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    """Inner products can cancel, so errors are measured against ‖x‖‖y‖."""
    assert products.shape == wanted.shape
    assert products.isfinite().all()
    assert ((products - wanted).abs() / scale).max() <= RELATIVE[dtype]


def check(model: nn.Module, dtype: torch.dtype, sequences=ROWS, others=OTHERS, **options) -> None:
    with upcasts_to(dtype):
        X, Y = gradients(model, sequences), gradients(model, others)
        gram = scoring.gram(model, pad(sequences, "left"), pad(others, "right"), **options)
    x, y = X.norm(dim=1), Y.norm(dim=1)
    assert_near(gram.rows, X @ X.T, x[:, None] * x, dtype)
    assert_near(gram.between, X @ Y.T, x[:, None] * y, dtype)
    assert_near(gram.squares, Y.square().sum(1), y * y, dtype)


# One of each way in which parameters meet: what is multiplied are factors, whose rules test_ghost.py holds against all
# architectures. Head and embedding, biases and positions, projections around them, experts by index and by slices.
FORMS = ("llama", "gpt2", "opt_projected", "mixtral", "mixtral_grouped")
HELD_OUT_FORMS = ("falcon_alibi", "mamba", "gpt_oss", "qwen2_moe")  # no rule, convolution, stacks of experts, gates


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_covered_architecture_is_exact(name, tied):
    dtype = dtype_of(name)
    with upcasts_to(dtype):
        model = build(name, tied=tied)
    check(model, dtype, engine="ghost")


@pytest.mark.parametrize("name", HELD_OUT_FORMS)
def test_held_out_architecture_is_exact_or_refused(name):
    with upcasts_to(torch.float64):
        model = build(name, tied=True)
    check(model, torch.float64)
    with contextlib.suppress(NotCovered):
        check(model, torch.float64, engine="ghost")


@pytest.mark.parametrize("sequences", [ROWS, SHORT], ids=["explicit", "tokens"])
@pytest.mark.parametrize("buffer", [1, 5_000, 10**9], ids=["row by row", "slices", "whole"])
def test_every_way_of_multiplying_gives_the_same(monkeypatch, sequences, buffer):
    ways = []
    plain = products._by_tokens
    monkeypatch.setattr(products, "_by_tokens", lambda pieces: ways.append(plain(pieces)) or ways[-1])
    monkeypatch.setattr(products, "BUFFER_BYTES", buffer)
    check(build("llama", tied=True), torch.float64, sequences, sequences, engine="ghost")
    assert (sequences is SHORT) == any(ways)


def least_memory(call) -> float:
    """What a call asks for when it is given one byte."""
    with pytest.raises(ValueError, match=r"^memory: 1 bytes given, but .* give .* or more") as error:
        call(memory=1.0)
    return float(re.search(r"give ([\d.e+]+) or more", str(error.value))[1])


def plan_groups(monkeypatch, plan) -> None:
    """Groups of parameters by a function of their names, as some memory would make them."""
    monkeypatch.setattr(products, "groups", lambda sizes, *_: plan([*reversed(sizes)]))


@pytest.mark.parametrize(("name", "tied"), [("gemma3", True), ("gpt2", False), ("qwen2_moe", False)])
def test_the_parts_of_parameters_add_up(monkeypatch, name, tied):
    """All parameters in one group per part: a group for each parameter would catch no more, in dozens of sweeps."""
    plan_groups(monkeypatch, lambda names: [products.Group(names, Part(number, 3)) for number in range(3)])
    with upcasts_to(dtype_of(name)):
        model = build(name, tied=tied)
    check(model, dtype_of(name), engine="ghost" if name in COVERED else "auto")


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
def test_the_least_memory_asked_for_is_enough(engine):
    model = build("llama", tied=True, num_hidden_layers=1)
    least = least_memory(partial(scoring.gram, model, pad(ROWS, "left"), pad(OTHERS, "right"), engine=engine))
    check(model, torch.float64, engine=engine, memory=least)


def test_what_fits_stands_together_and_what_does_not_is_cut_into_as_few_parts_as_fit():
    sizes = {"first": (2.0, 0.0), "large": (50.0, 5.0), "small": (3.0, 3.0), "none": (0.0, 0.0), "last": (6.0, 1.0)}
    large, whole = [(["large"], Part(number, 9)) for number in range(9)], Part(0, 1)
    assert products.groups(sizes, 30.0, 20.0) == [(["last", "none", "small"], whole), *large, (["first"], whole)]
    assert products.groups(sizes, 90.0, 20.0) == [(["last", "none", "small", "large", "first"], whole)]
    with pytest.raises(
        ValueError, match=r"memory: 25 bytes given, but large takes 5\.7 and all else 20; give 34\.4 or"
    ):
        products.groups(sizes, 25.0, 20.0)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_too_little_memory_is_said_before_any_product_is_taken(monkeypatch, engine):
    monkeypatch.setattr(products.Sums, "add_pair", None)
    monkeypatch.setattr(products.Sums, "add_gradients", None)
    call = partial(scoring.inner_products, build("llama", tied=True), *pad(ROWS, "left"), engine=engine)
    assert least_memory(call) > 1e4
    for nothing in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"memory: .* given, a number of bytes above 0 wanted"):
            call(memory=nothing)


@pytest.mark.parametrize("engine", ["ghost", "autograd"])
def test_memory_may_be_without_limit(engine):
    model = build("llama", tied=True, num_hidden_layers=1)
    free, plain = (scoring.inner_products(model, *pad(ROWS, "left"), engine=engine, memory=m) for m in (math.inf, 4e9))
    torch.testing.assert_close(free, plain)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)], ids=["rows", "columns"])
def test_the_parts_of_every_form_of_factor_make_up_the_whole(shape):
    torch.manual_seed(0)
    n, tokens = 3, 5
    whole = torch.zeros(n, *shape, dtype=torch.float64)
    left, right = (torch.randn(n, tokens, size, dtype=torch.float64) for size in shape)
    index = torch.randint(shape[0], (n, tokens))
    for example in range(n):
        for t in range(tokens):
            whole[example] += left[example, t, :, None] * right[example, t]
            whole[example, index[example, t]] += right[example, t]
    square = whole.flatten(1).square().sum(1)
    for count in (1, 2, 3, 8):
        sums, parts = torch.zeros(2, n, dtype=torch.float64)
        for number in range(count):
            part = Part(number, count)
            f, g, dense = (
                x.cut(part, torch.Size(shape)) for x in (Outer(left, right), Rows(index, right), Dense(whole))
            )
            sums += f.squared_norm() + 2 * f.inner(g) + g.squared_norm()
            parts += dense.squared_norm()
        torch.testing.assert_close(sums, square, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts, square, rtol=1e-12, atol=0)


MEASURE = """
import re, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
sys.path.insert(0, sys.argv[2])
import rectangle as scoring
torch.set_num_threads(1)
torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=100_000, tie_word_embeddings=True, **shape)).eval()
def texts(n):
    ids = torch.randint(0, 100_000, (n, 16))
    return ids, (torch.arange(16) >= 8).expand(n, 16), None
def peak():  # of this process alone: ru_maxrss begins with that of the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
scoring.gram(model, texts(2), texts(2), memory=1e9)
scoring.score_tokens(model, *texts(3))
before, memory = peak(), float(sys.argv[1])
for aggregation in ("sequence", "token_mean"):
    scoring.score_tokens(model, *texts(60), memory=memory, aggregation=aggregation)
    print(peak() - before)
scoring.gram(model, texts(60), texts(50), memory=memory)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_never_takes_more_than_a_tenth_above_the_memory_asked_for():
    """Of all examples, the head's factors take 350 MB, and the logits with their gradient as much. Peaks so far."""
    memory = 3e8
    command = [sys.executable, "-c", MEASURE, str(memory), str(Path(scoring.__file__).parent)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sequence, token_mean, gram = map(float, printed.split())
    assert sequence > 0.1 * memory, "what is measured is not the call"
    assert token_mean <= 1.1 * memory
    assert gram <= 1.1 * memory


def test_one_set_gives_its_own_products_and_two_give_those_between():
    model = build("llama", tied=True)
    with upcasts_to(torch.float64):
        both = scoring.inner_products(model, *pad([*ROWS, *OTHERS], "right", 9))
        between = scoring.inner_products(model, *pad(ROWS, "left"), others=pad(OTHERS, "left"))
    torch.testing.assert_close(between, both[:4, 4:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(both, both.T, rtol=1e-12, atol=1e-12)


def passes(monkeypatch) -> list[int]:
    """Grows with every batch that is passed; a hook on the model would have its examples compared one by one."""
    seen, visit = [], products.Work.visit
    monkeypatch.setattr(products.Work, "visit", lambda *work: seen.append(1) or visit(*work))
    return seen


class Killed(dict):
    """A checkpoint in memory, {stage: {item: record}}; the process dies after the `last` record."""

    def __init__(self, last: int):
        super().__init__()
        self.last = last

    def get(self, stage):
        return super().get(stage, {})

    def put(self, item_id, records, *, replace):
        assert replace
        for stage, record in records.items():
            self[stage] = {item_id: record}
        self.last -= 1
        if self.last == 0:
            raise KeyboardInterrupt


def test_a_killed_run_resumes_after_its_last_group(monkeypatch):
    model, seen, kept = build("llama", tied=True, num_hidden_layers=1), passes(monkeypatch), Killed(3)
    call = partial(scoring.gram, model, pad(ROWS, "left"), pad(OTHERS, "left"))
    plan_groups(monkeypatch, lambda names: [products.Group([name], Part(0, 1)) for name in names])
    with upcasts_to(torch.float64):
        whole = call()
        n_whole = len(seen)
        with pytest.raises(KeyboardInterrupt):
            call(checkpoint=kept)
        seen.clear()
        resumed = call(checkpoint=kept)
        n_resumed = len(seen)
        again = call(checkpoint=kept)
    assert n_resumed == n_whole - 3 * 2  # a pass for the rows and one for the others in each of three groups
    assert len(seen) - n_resumed == 2, "what fits is asked, and nothing is done again"
    for gram in (resumed, again):
        for name in ("rows", "between", "squares"):
            torch.testing.assert_close(getattr(gram, name), getattr(whole, name), rtol=1e-12, atol=0)


def test_a_model_is_left_as_it_was(tmp_path):
    model = build("llama", tied=True)
    model.requires_grad_(False)
    with upcasts_to(torch.float64):
        scoring.gram(model, pad(ROWS, "left"))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no example"):
        products.inner_products(build("llama", tied=True), [])


@pytest.mark.assets
def test_products_on_a_real_model_agree_with_autograd():
    """The issue's number: at most 1e-4 relative in float32, here of ‖x‖‖y‖."""
    from isouq.studies import assets

    model, tokenizer = assets.load_causal_lm("smollm2-135m-instruct")
    texts = ["The capital of France is Paris", "Water boils at 100", "A tale of two cities was written by Dickens"]
    sequences = [(torch.tensor(tokenizer(text)["input_ids"]), 2) for text in texts]
    X = gradients(model, sequences)
    gram = scoring.gram(model, pad(sequences[:2], "left"), pad(sequences[2:], "left"), engine="ghost", memory=1e8)
    norms = X.norm(dim=1)
    error = (torch.cat([gram.rows, gram.between], 1) - X[:2] @ X.T).abs() / (norms[:2, None] * norms)
    assert error.max() <= 1e-4
    assert abs(gram.squares[0] / norms[2] ** 2 - 1) <= 1e-4
