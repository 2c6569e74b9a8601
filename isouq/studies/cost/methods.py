"""The methods whose cost is measured, each used as its documentation shows.

A method is a context manager. Entering it is not timed; it yields the function that is timed, one pass over a case's
examples. A method that computes ‖∇S‖² returns it from that function, (example,), so that its error can be measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isouq.gradients.model import differentiable, select_parameters
from isouq.studies.cost.cases import Texts
from isouq.studies.qa import rivals
from isouq.studies.qa.generation import Sample, draw, next_log_probs
from isouq.studies.qa.sentences import SentenceEncoder

Run = Callable[[], Tensor | None]
Method = Callable[[Any], AbstractContextManager[Run]]

N_SAMPLES = 10  # answers drawn per question for the entropies


def _plain(function: Callable[..., Tensor | None], **options: Any) -> Method:
    """Make a method of a function that needs no preparation."""
    return lambda case: nullcontext(partial(function, case, **options))


# ── Ours, and what a forward and a backward pass cost ──────────────────────────────────────────────────────────


def _isouq(case: Texts, engine: str) -> Tensor:
    scores = case.scores(engine=engine)
    return (scores.log_epistemic - 2 * scores.log_prob).exp()


def _token_mean(case: Texts) -> None:
    case.scores(engine="ghost", aggregation="token_mean")


@torch.no_grad()
def _forward(case: Texts) -> None:
    case.model(input_ids=case.ids[:, :-1], use_cache=False)


@torch.no_grad()
def _forward_answer(case: Texts) -> None:
    case.objective(case.model, case.ids)


def _backward(case: Texts) -> Tensor:
    """Call .backward() for each example and sum the squares of every .grad: what one writes first."""
    norms = []
    for i in range(len(case)):
        case.objective(case.model, case.ids[i : i + 1]).sum().backward()
        norms.append(sum(p.grad.square().sum() for p in case.model.parameters()))
        case.model.zero_grad()
    return torch.stack(norms)


def _activations(case: Texts) -> None:
    """Run a forward pass that keeps its activations, from which every backward pass starts."""
    with differentiable(case.model, select_parameters(case.model)):
        case.objective(case.model, case.ids)


@contextmanager
def _activation_gradient(case: Texts) -> Iterator[Run]:
    """Differentiate through the activations without any parameter's gradient or norm: the least that is needed."""
    with differentiable(case.model, {}):
        embedded = case.model.get_input_embeddings()(case.ids[:, :-1]).detach().requires_grad_()
        value = case.objective(case.model, case.ids, inputs_embeds=embedded).sum()

        def run() -> None:
            torch.autograd.grad(value, embedded)

        yield run


# ── Peers: gradients or norms per example by other libraries ───────────────────────────────────────────────────


def _vmap(case: Texts) -> Tensor:
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}

    def one(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        def module(**arguments: Any) -> Any:
            return torch.func.functional_call(case.model, parameters, kwargs=arguments)

        return case.objective(module, ids[None]).sum()

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # the chapter says it once
        gradients = each(parameters, case.ids)
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)


@contextmanager
def _opacus(case: Texts, *, ghost: bool = False) -> Iterator[Run]:
    """Run Opacus, which captures in training mode only; without dropout the mode changes nothing else."""
    try:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    except ImportError:
        raise ImportError("opacus is not installed: pip install 'isouq[peers]'") from None
    was_training = case.model.training
    wrapper = GradSampleModuleFastGradientClipping if ghost else GradSampleModule
    wrapped = wrapper(case.model.train(), loss_reduction="sum")

    def run() -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # ids have no gradient, as they should
            case.objective(wrapped, case.ids).sum().backward()
        if ghost:
            return wrapped.get_norm_sample().square()
        norms = [p.grad_sample.flatten(1).square().sum(1) for p in case.model.parameters()]
        wrapped.zero_grad(set_to_none=True)
        return torch.stack(norms).sum(0)

    try:
        yield run
    finally:
        wrapped.zero_grad(set_to_none=True)
        wrapped.to_standard_module().train(was_training)


# ── Rivals: other uncertainties of the same answer ─────────────────────────────────────────────────────────────


def sampled(case: Texts, n_samples: int = N_SAMPLES, *, seed: int = 0) -> list[list[Sample]]:
    """Draw answers as long as the case's own at temperature 1, as chapter 04 does: (example, sample)."""
    numbers = np.random.default_rng(seed).random((len(case), n_samples, case.n_answer))
    prompts, no_stop = case.ids[:, : -case.n_answer].tolist(), (frozenset[int](), frozenset[int]())
    return draw(case.model, case.tokenizer, prompts, numbers, stops=no_stop)


def _naive_entropy(case: Texts) -> None:
    for answers in sampled(case):
        rivals.naive_entropy([a.log_prob for a in answers], [a.n_steps for a in answers])


@contextmanager
def _semantic_entropy(case: Texts) -> Iterator[Run]:
    """By embeddings, the cheap variant: the original asks an entailment model about each pair of answers."""
    encode = SentenceEncoder()

    def run() -> None:
        for answers in sampled(case):
            meanings = rivals.meanings(
                [a.text for a in answers], rivals.by_embedding(encode([a.text for a in answers]))
            )
            rivals.semantic_entropy([a.log_prob for a in answers], [a.n_steps for a in answers], meanings)

    yield run


def _p_true(case: Texts) -> None:
    """One more pass over question and answer, with the question whether the answer is true; no samples, no examples."""
    asked = rivals.p_true_prompt("", [], "")
    question, *labels = (case.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (asked, *rivals.LABELS))
    prompts = [[*row, *question] for row in case.ids.tolist()]
    next_log_probs(case.model, prompts, [label[0] for label in labels])


METHODS: dict[str, Method] = {
    "forward": _plain(_forward),
    "forward_answer": _plain(_forward_answer),
    "activations": _plain(_activations),
    "activation_gradient": _activation_gradient,
    "ghost": _plain(_isouq, engine="ghost"),
    "token_mean": _plain(_token_mean),
    "autograd": _plain(_isouq, engine="autograd"),
    "backward": _plain(_backward),
    "vmap": _plain(_vmap),
    "opacus": _opacus,
    "opacus_ghost": partial(_opacus, ghost=True),
    "naive_entropy": _plain(_naive_entropy),
    "semantic_entropy": _semantic_entropy,
    "p_true": _plain(_p_true),
}

ONE_BY_ONE = ("autograd", "backward")
A_FEW = (*ONE_BY_ONE, "token_mean")  # these gain nothing from a batch or are slow, so a few examples tell their cost
GRADIENT_EACH = ("vmap", "opacus")  # these hold a gradient per example
