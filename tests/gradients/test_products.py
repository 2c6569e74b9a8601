"""Inner products of gradients against the gradients themselves, whichever way they are taken."""

import contextlib
import itertools
import sqlite3

import pytest
import torch
from architectures import COVERED, HELD_OUT, build, dtype_of, examples, upcasts_to
from closeness import RELATIVE
from reference import pad, token_log_probs
from torch import nn

from isouq import causal_lm, identity
from isouq.gradients import products
from isouq.gradients.graph import NotCovered
from isouq.store import StoreError

ROWS = examples((9, 5, 7, 8), (3, 1, 2, 5), seed=1)
OTHERS = examples((6, 9, 4), (2, 4, 1), seed=2)
SHORT = examples((3, 2, 3), (1, 1, 2), seed=3)  # so short that token products beat explicit gradients


def gradients(model: nn.Module, sequences) -> torch.Tensor:
    """∇S of each example, whole, by plain autograd: (example, param)."""
    found = []
    for ids, n_answer in sequences:
        grads = torch.autograd.grad(token_log_probs(model, ids, n_answer).sum(), list(model.parameters()))
        found.append(torch.cat([g.flatten().double() for g in grads]))
    return torch.stack(found)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    """Inner products can cancel, so errors are measured against ‖x‖‖y‖."""
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    assert ((found - wanted).abs() / scale).max() <= RELATIVE[dtype]


def check(model: nn.Module, dtype: torch.dtype, sequences=ROWS, others=OTHERS, **options) -> None:
    with upcasts_to(dtype):
        X, Y = gradients(model, sequences), gradients(model, others)
        found = causal_lm.gram(model, pad(sequences, "left"), pad(others, "right"), **options)
    x, y = X.norm(dim=1), Y.norm(dim=1)
    assert_near(found.rows, X @ X.T, x[:, None] * x, dtype)
    assert_near(found.between, X @ Y.T, x[:, None] * y, dtype)
    assert_near(found.squares, Y.square().sum(1), y * y, dtype)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", COVERED)
def test_covered_architecture_is_exact(name, tied):
    dtype = dtype_of(name)
    with upcasts_to(dtype):
        model = build(name, tied=tied)
    check(model, dtype, engine="ghost")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_architecture_is_exact_or_refused(name, tied):
    dtype = dtype_of(name)
    with upcasts_to(dtype):
        model = build(name, tied=tied)
    check(model, dtype)
    with contextlib.suppress(NotCovered):
        check(model, dtype, engine="ghost")


@pytest.mark.parametrize("sequences", [ROWS, SHORT], ids=["explicit", "tokens"])
@pytest.mark.parametrize("buffer", [1, 5_000, 10**9], ids=["row by row", "slices", "whole"])
def test_every_way_of_multiplying_gives_the_same(monkeypatch, sequences, buffer):
    ways = []
    plain = products._by_tokens
    monkeypatch.setattr(products, "_by_tokens", lambda pieces: ways.append(plain(pieces)) or ways[-1])
    monkeypatch.setattr(products, "BUFFER_BYTES", buffer)
    check(build("llama", tied=True), torch.float64, sequences, sequences, engine="ghost")
    assert (sequences is SHORT) == any(ways)


@pytest.mark.parametrize("memory", [1.0, 2e4])
@pytest.mark.parametrize("engine", ["ghost", "autograd"])
def test_groups_of_parameters_add_up(engine, memory):
    check(build("gemma3", tied=True), torch.float64, engine=engine, memory=memory)


def test_one_set_gives_its_own_products_and_two_give_those_between():
    model = build("llama", tied=True)
    with upcasts_to(torch.float64):
        both = causal_lm.inner_products(model, *pad([*ROWS, *OTHERS], "right", 9))
        between = causal_lm.inner_products(model, *pad(ROWS, "left"), others=pad(OTHERS, "left"))
    torch.testing.assert_close(between, both[:4, 4:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(both, both.T, rtol=1e-12, atol=1e-12)


def passes(monkeypatch) -> list[int]:
    """Grows with every batch that is passed; a hook on the model would have its examples compared one by one."""
    seen, visit = [], products._visit_factors
    monkeypatch.setattr(products, "_visit_factors", lambda *work: seen.append(1) or visit(*work))
    return seen


def test_a_killed_run_goes_on_after_its_last_group(tmp_path, monkeypatch):
    model, file = build("llama", tied=True), tmp_path / "deep" / "products.sqlite"
    seen = passes(monkeypatch)
    call = (model, pad(ROWS, "left"), pad(OTHERS, "left"))
    options = {"memory": 4e3, "checkpoint": file}
    with upcasts_to(torch.float64):
        whole = causal_lm.gram(*call)
        seen.clear()
        causal_lm.gram(*call, memory=4e3)
        n_whole = len(seen)
        keep, kept = products._keep, itertools.count(1)

        def killed(*arguments):
            keep(*arguments)
            if next(kept) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(products, "_keep", killed)
        with pytest.raises(KeyboardInterrupt):
            causal_lm.gram(*call, **options)
        monkeypatch.setattr(products, "_keep", keep)
        seen.clear()
        resumed = causal_lm.gram(*call, **options)
        n_resumed = len(seen)
        seen.clear()
        again = causal_lm.gram(*call, **options)
    assert n_resumed == n_whole - 3 * 2  # a pass for the rows and one for the others in each of three groups
    assert len(seen) < n_resumed
    [kept] = file.parent.iterdir()
    assert kept.name.startswith("products-")
    for found in (resumed, again):
        for name in ("rows", "between", "squares"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-12, atol=0)


@pytest.mark.parametrize("change", ["nothing", "examples", "model", "code"])
def test_a_checkpoint_of_something_else_is_not_taken(tmp_path, monkeypatch, change):
    model, file = build("llama", tied=True), tmp_path / "products.sqlite"
    with upcasts_to(torch.float64):
        causal_lm.gram(model, pad(ROWS, "left"), checkpoint=file)
        if change == "model":
            with torch.no_grad():
                model.model.norm.weight[0] += 1
        if change == "code":
            monkeypatch.setattr(identity, "code", lambda *modules: "another")
        sequences = OTHERS if change == "examples" else ROWS
        seen = []
        monkeypatch.setattr(products, "_gather", lambda *work, plain=products._gather: seen.append(1) or plain(*work))
        found = causal_lm.gram(model, pad(sequences, "left"), checkpoint=file)
        X = gradients(model, sequences)
    assert bool(seen) == (change != "nothing")
    torch.testing.assert_close(found.rows, X @ X.T, rtol=1e-8, atol=1e-8)


def test_a_checkpoint_in_use_is_refused_by_its_name(tmp_path):
    model, file = build("llama", tied=True), tmp_path / "products.sqlite"
    causal_lm.gram(model, pad(ROWS, "left"), checkpoint=file)
    [kept] = tmp_path.iterdir()
    connection = sqlite3.connect(kept, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match=f"{kept.name} is in use by another process; wait for it to end"):
        causal_lm.gram(model, pad(ROWS, "left"), checkpoint=file)
    connection.close()


def test_a_model_is_left_as_it_was(tmp_path):
    model = build("llama", tied=True)
    model.requires_grad_(False)
    with upcasts_to(torch.float64):
        causal_lm.gram(model, pad(ROWS, "left"))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no example"):
        products.inner_products(build("llama", tied=True), [])


@pytest.mark.assets
def test_products_on_a_real_model_agree_with_autograd():
    """The issue's number: at most 1e-4 relative in float32, here of ‖x‖‖y‖."""
    from isouq import assets

    model, tokenizer = assets.load_causal_lm("smollm2-135m-instruct")
    texts = ["The capital of France is Paris", "Water boils at 100", "A tale of two cities was written by Dickens"]
    sequences = [(torch.tensor(tokenizer(text)["input_ids"]), 2) for text in texts]
    X = gradients(model, sequences)
    found = causal_lm.gram(model, pad(sequences[:2], "left"), pad(sequences[2:], "left"), engine="ghost", memory=1e8)
    norms = X.norm(dim=1)
    error = (torch.cat([found.rows, found.between], 1) - X[:2] @ X.T).abs() / (norms[:2, None] * norms)
    assert error.max() <= 1e-4
    assert abs(found.squares[0] / norms[2] ** 2 - 1) <= 1e-4
