"""The costs are of what they say: every method does its work, and clock and peaks are read rightly."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from architectures import VOCAB, build, upcasts_to
from closeness import assert_close
from isouq.studies import assets
from isouq.studies.cost import cases, findings, memory, methods, plots, timing
from isouq.studies.cost.cases import Texts
from isouq.studies.cost.methods import METHODS


def language(seed: int = 0) -> Texts:
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(seed))
    words = SimpleNamespace(decode=lambda ids, **options: " ".join(map(str, ids)))
    return Texts(model=build("llama", tied=True).float(), ids=ids, n_answer=3, tokenizer=words)


def squared_norms(case) -> torch.Tensor:
    """The definition, in float64: the whole gradient of each example's log p, squared and summed."""
    norms, model = [], case.model.double()
    for ids in case.ids:
        log_p = model(input_ids=ids[None]).logits.log_softmax(-1)
        value = sum(log_p[0, t - 1, ids[t]] for t in range(9 - case.n_answer, 9))
        gradients = torch.autograd.grad(value, list(model.parameters()))
        norms.append(sum(g.square().sum() for g in gradients))
    return torch.stack(norms)


GIVE_NORMS = ("ghost", "autograd", "backward", "vmap", "opacus")


@pytest.mark.parametrize("method", GIVE_NORMS)
def test_a_method_that_gives_a_norm_gives_the_right_one(method):
    if method == "opacus":
        pytest.importorskip("opacus")
    with METHODS[method](language()) as run:
        norms = run().double()
    assert_close(norms, squared_norms(language()), torch.float32)


@pytest.mark.parametrize(
    "method", sorted({"forward", "activations", *GIVE_NORMS, "activation_gradient", "naive_entropy"})
)
def test_a_method_leaves_the_model_as_it_was(method):
    if method == "opacus":
        pytest.importorskip("opacus")
    case = language()
    with METHODS[method](case) as run:
        run()
    assert not case.model.training
    assert all(p.requires_grad and p.grad is None for p in case.model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in case.model.modules())
    assert not any(hasattr(p, "grad_sample") and p.grad_sample is not None for p in case.model.parameters())


def test_a_peer_that_cannot_says_so_in_its_own_words():
    pytest.importorskip("opacus")
    with (
        pytest.raises(NotImplementedError, match="Parameter tying is not supported"),
        METHODS["opacus_ghost"](language()) as run,
    ):
        run()


def test_an_absent_peer_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(ImportError, match=r"opacus is not installed: pip install 'isouq\[peers\]'"):
        METHODS["opacus"](language()).__enter__()


def test_sampled_answers_have_the_log_p_that_a_whole_forward_pass_gives():
    case = language()
    samples = [answer for answers in methods.sampled(case, 4, seed=1) for answer in answers]
    ids = torch.tensor([answer.token_ids for answer in samples]).unflatten(0, (3, 4))
    log_p = torch.tensor([answer.log_prob for answer in samples])
    assert ids.shape == (3, 4, 3)
    assert len({tuple(row) for row in ids[0].tolist()}) > 1, "samples differ"
    prompts = case.ids[:, :-3].repeat_interleave(4, 0)
    again = torch.cat([prompts, ids.flatten(0, 1)], 1)
    with torch.no_grad():
        expected = case.objective(case.model, again)
    assert_close(log_p.flatten(), expected, torch.float32)


def test_the_peers_are_given_the_same_log_p_as_isouq():
    case = language()
    assert_close(case.objective(case.model, case.ids).detach(), case.scores().log_prob, torch.float32)


class Clock:
    """A clock that moves only when a method runs."""

    def __init__(self, monkeypatch, *names: str) -> None:
        self.now, self.ran, self.costs = 0.0, [], {}
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        for name in names:
            monkeypatch.setitem(METHODS, name, self.method(name))

    def method(self, name: str):
        @contextmanager
        def entered(case):
            self.now += 100  # to prepare is not timed

            def run():
                self.ran.append(name)
                self.now += self.costs[name](self.ran.count(name)) * len(case)

            yield run

        return entered


def test_rounds_are_interleaved_warmed_up_and_compared_round_by_round(monkeypatch):
    clock = Clock(monkeypatch, "forward", "ghost")
    drift = {1: 50.0, 2: 1.0, 3: 3.0, 4: 7.0}  # the machine gets slower; the first round is thrown away
    clock.costs = {"forward": drift.__getitem__, "ghost": lambda n: {2: 2.0, 3: 1.5, 4: 2.5, 1: 9.0}[n] * drift[n]}
    case = language()
    times = timing.interleaved({"forward": ("forward", case), "ghost": ("ghost", case.first(2))}, 3)
    assert clock.ran == ["forward", "ghost"] * 4
    assert times["forward"].tolist() == pytest.approx([1, 3, 7]), "seconds per example"
    table = timing.relative(times).set_index("method")
    assert table.loc["ghost", ["value", "low", "high"]].tolist() == pytest.approx([2, 1.5, 2.5])
    assert table.loc["forward", ["value", "low", "high"]].tolist() == pytest.approx([1, 1, 1])


def test_a_sweep_compares_each_size_with_its_own_forward_pass(monkeypatch):
    clock = Clock(monkeypatch, "forward", "autograd")
    clock.costs = {"forward": lambda n: 1.0, "autograd": lambda n: 3.0}
    case = language()
    table = timing.sweep({1: case.first(1), 3: case}, ["autograd"], 2)
    assert table["size"].tolist() == [1, 1, 3, 3]
    assert table["value"].tolist() == pytest.approx([1, 3, 1, 3])


def ground(**changes: dict) -> memory.Memory:
    """Every method on two of three texts, 10 bytes above the model each, but Opacus' ghost clipping refuses."""
    rows = {m: {"n_examples": 2, "peak_bytes": 10.0, "relative_error": np.nan, "refusal": ""} for m in findings.EVERY}
    rows["opacus_ghost"] |= {"peak_bytes": np.nan, "refusal": "NotImplementedError: tied"}
    for method, change in changes.items():
        rows[method] |= change
    return memory.Memory(100, pd.DataFrame.from_dict(rows, orient="index").rename_axis("method"))


@pytest.fixture
def costs(monkeypatch) -> dict[str, findings.Costs]:
    """Two models: a forward pass takes 1 s, the ghost engine 2, everything else 8; the engine gets slower by round."""

    def interleaved(runs, n_rounds):
        seconds = {"forward": 1.0, "ghost": 2.0}
        slower = np.linspace(1, 1.5, n_rounds)
        return pd.DataFrame({m: seconds.get(m, 8.0) * (slower if m == "ghost" else slower**0) for m in runs})

    monkeypatch.setattr(timing, "interleaved", interleaved)
    found = ground(ghost={"peak_bytes": 30.0, "relative_error": 1e-6}, vmap={"peak_bytes": 60.0})
    other = ground(ghost={"peak_bytes": 15.0, "relative_error": 1e-4}, opacus={"refusal": "cannot"})
    rounds = {"n_rounds": 6, "n_rival_rounds": 2}
    return {name: findings.measure(language(), g, **rounds) for name, g in {"m-1": found, "gemma": other}.items()}


TOKENS = findings.PerToken(per_token=1.2, at_start=1.1, bound=0.9)


def test_what_can_run_is_timed_on_as_many_texts_as_fitted(monkeypatch):
    asked = []
    monkeypatch.setattr(
        timing, "interleaved", lambda runs, n: asked.append((runs, n)) or pd.DataFrame({"forward": [1.0]})
    )
    findings.measure(language(), ground(), n_rounds=6, n_rival_rounds=2)
    (own, n_own), (single, n_single), (others, n_others) = asked
    assert list(own) == list(findings.OURS)
    assert {len(case) for _, case in own.values()} == {2}
    assert list(single) == ["forward", "ghost"]
    assert {len(case) for _, case in single.values()} == {1}
    assert list(others) == ["forward", "backward", "vmap", "opacus", *findings.RIVALS]
    assert (n_own, n_single, n_others) == (6, 6, 2)


def test_tables_of_costs_say_what_ran_what_refused_and_what_is_absent(costs):
    grounds = {name: of.memory for name, of in costs.items()}
    assert findings.refusals(grounds)["refusal"].to_dict() == {
        ("m-1", "opacus_ghost"): "NotImplementedError: tied",
        ("gemma", "opacus"): "cannot",
        ("gemma", "opacus_ghost"): "NotImplementedError: tied",
    }
    assert list(findings.gradients_at_once(grounds).index) == [("m-1", "vmap"), ("m-1", "opacus"), ("gemma", "vmap")]
    text = findings.times_text(costs)
    assert text.loc["ghost (isouq)", ("m-1", "seconds per text")] == "2.500"
    assert text.loc["Opacus", ("gemma", "forward passes")] == "—"
    assert list(text.index)[:2] == ["forward pass", "forward, answer's logits"]
    assert findings.errors_text(costs).to_dict("index") == {"ghost (isouq)": {"m-1": "1.0e-06", "gemma": "1.0e-04"}}


def test_targets_are_met_or_missed_by_what_was_measured(costs):
    table = findings.targets(costs, TOKENS).set_index(["model", "target"])
    assert table.loc[("m-1", "ghost / autograd, time per text")].tolist() == pytest.approx([0.4, 2.5 / 8, "yes"])
    assert table.loc[("gemma", "ghost / autograd, time per text")].tolist() == pytest.approx([0.2, 2.5 / 8, "NO"])
    assert table.loc[("m-1", "ghost above activations / weights")].tolist() == pytest.approx([0.1, 0.2, "NO"])
    assert table.loc[("gemma", "ghost above activations / weights"), "met"] == "yes"
    assert table.loc[("m-1", "ghost / vmap, peak above the model"), "measured"] == pytest.approx(0.5)
    assert table.loc[("gemma", "ghost, relative error"), "met"] == "NO"
    assert ("gemma", "ghost / opacus, time per text") not in table.index
    assert table["measured"].iloc[-1] == TOKENS.bound


def test_named_costs_have_an_interval_from_six_rounds_on(costs):
    results = findings.named_results(costs, TOKENS, 3)
    ghost = results["cost.m-1.ghost.relative_to_forward"]
    assert (ghost.value, ghost.low, ghost.high, ghost.n, ghost.claim) == pytest.approx((2.5, 2, 3, 6, "C1"))
    vmap = results["cost.m-1.vmap.relative_to_forward"]
    assert (vmap.value, vmap.low, vmap.n, vmap.claim) == (8, None, 2, None)
    assert results["cost.m-1.single.ghost.relative_to_forward"].value == pytest.approx(2.5)
    assert results["cost.m-1.ghost.speedup_over_autograd"].value == pytest.approx(8 / 2.5)
    assert results["cost.m-1.ghost.memory_above_activations"].value == pytest.approx(0.2)
    assert results["cost.gemma.ghost.relative_error"].value == 1e-4
    assert "cost.m-1.forward.relative_error" not in results
    assert "cost.m-1.opacus_ghost.peak_bytes" not in results
    assert results["cost.m-1.token_mean.passes_per_token"].value == 1.2
    met = (findings.targets(costs, TOKENS)["met"] == "yes").sum()
    assert (results["cost.targets.met"].value, results["cost.targets.number"].value) == (met, 17)


def test_the_token_means_line_and_its_bound_are_those_of_the_sweep():
    """time = 2 forward passes + 3 L activation gradients, where a gradient takes half a forward pass."""
    rows = []
    for size in (1, 2, 4):
        seconds = {"forward": 1.0, "activation_gradient": 0.5, "token_mean": 2 + 1.5 * size}
        rows += [{"size": size, "method": method, "seconds": of} for method, of in seconds.items()]
    found = findings.per_token(pd.DataFrame(rows))
    assert (found.per_token, found.at_start) == pytest.approx((3, 2))
    assert found.bound == pytest.approx(8 / (1 + 1.3 * 4 * 0.5))


@pytest.mark.usefixtures("figure_style")
def test_figures_of_costs_have_a_panel_per_model_and_a_row_per_method_that_ran(costs):
    for figure in (plots.times(costs), plots.peaks(costs)):
        assert [ax.get_title(loc="left") for ax in figure.axes] == ["m-1", "gemma"]
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels == [
            plots.plotting.METHODS[m].label for m in findings.EVERY if m not in ("activations", "opacus_ghost")
        ]
    sweep = pd.DataFrame({"method": ["forward", "ghost"], "size": 1, "value": [1.0, 2.0], "low": 1.0, "high": 2.0})
    figure = plots.sweeps({"tokens": sweep, "texts": sweep}, aspect=0.8)
    assert [ax.get_xlabel() for ax in figure.axes] == ["tokens", "texts"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["forward pass", "ghost (isouq)"]


MODEL, SIZES = "smollm2-135m-instruct", {"n_examples": 4, "n_tokens": 12, "n_answer": 2}


@pytest.fixture(scope="module")
def measured():
    return memory.measure(MODEL, ["forward", "ghost", "vmap", "opacus_ghost"], sizes=SIZES)


@pytest.mark.assets
def test_a_peak_is_the_methods_own(measured):
    peaks = measured.table["peak_bytes"]
    assert measured.weights == 4 * sum(p.numel() for p in assets.load_causal_lm(MODEL)[0].parameters())
    assert peaks["vmap"] > 4 * measured.weights, "a gradient per example is in memory"
    assert peaks["ghost"] < peaks["vmap"] / 4
    assert peaks["forward"] <= peaks["ghost"]


@pytest.mark.assets
def test_exactness_is_measured_against_float64(measured):
    errors = measured.table["relative_error"]
    assert errors["ghost"] < 1e-5
    assert pd.isna(errors["forward"])


def test_the_reference_is_float64_also_where_a_model_casts_to_float32():
    """A Llama takes its norms in float32, whatever its own type."""
    case, again = language(), language()
    norms = torch.tensor(memory._reference(case), dtype=torch.float64)
    with upcasts_to(torch.float64):
        wanted = squared_norms(again.first(2))
    assert_close(norms, wanted, torch.float64)


@pytest.mark.assets
def test_a_refusal_is_kept_word_for_word(measured):
    pytest.importorskip("opacus")
    row = measured.table.loc["opacus_ghost"]
    assert row["refusal"].startswith("NotImplementedError: Parameter tying is not supported")
    assert pd.isna(row["peak_bytes"])


@pytest.mark.assets
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's memory")
def test_where_gradients_do_not_fit_fewer_examples_are_taken_at_once():
    row = memory.measure(MODEL, ["vmap"], sizes=SIZES, memory_gb=2.5).table.loc["vmap"]
    assert 0 < row["n_examples"] < 4
    assert row["refusal"] == ""
    assert row["relative_error"] < 1e-5


def test_a_model_that_cannot_be_loaded_is_named_with_the_last_line_of_the_error(monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nModelError: no such model\n")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"^model smollm3-135m: ModelError: no such model$"):
        memory.measure("smollm3-135m", ["forward"], sizes={})


def test_an_answer_leaves_room_for_its_question():
    with pytest.raises(ValueError, match="n_answer: 8 given, from 1 to n_tokens − 1 = 7 wanted"):
        cases.texts(None, None, n_examples=1, n_tokens=8, n_answer=8)


@pytest.mark.assets
def test_texts_are_real_of_one_length_and_the_rivals_run_on_them():
    model, tokenizer = assets.load_causal_lm("smollm2-135m-instruct")
    case = cases.texts(model, tokenizer, n_examples=2, n_tokens=20, n_answer=2)
    assert case.ids.shape == (2, 20)
    assert (case.ids[0] != case.ids[1]).any()
    assert "A:" in tokenizer.decode(case.ids[0]) or "Answer" in tokenizer.decode(case.ids[0])
    for rival in ("semantic_entropy", "p_true"):
        with METHODS[rival](case) as run:
            assert run() is None, "no squared norm"
