"""What 04_llm_qa would take on a GPU: tokens of every stage, their FLOPs and seconds, and memory. Nothing is measured.

A token costs 2 FLOPs per weight of a matrix product forward, and twice that backward: once for the gradient of the
activations, and at most once for the norms of the weights' gradients. Attention's own products are left out, and every
answer counts as long as it may be. A step of decoding reads all weights, which is what a small batch waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, cast

import pandas as pd

from isouq.pipeline.profiles import Gpu, Profile, ProfileError
from isouq.pipeline.schemas import LlmQa
from isouq.studies.qa import data, study
from isouq.studies.qa.sampling import N_IDEAS
from isouq.studies.qa.subject import N_TRUE_SHOTS

CHARACTERS = 4.0  # of English text in a token, about
P_TRUE_WORDS = 30  # tokens of the prompt of P(True) beside question and answers
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """What one model does on one data set: tokens through forward and backward passes, and steps of decoding.

    `batch` is the most tokens of one batch whose gradients are taken.
    """

    forward: float
    backward: float
    steps: float
    batch: float


@dataclass(frozen=True)
class Size:
    """A model's parameters, the weights of its matrix products (a tied head's too), and the sum of their two sides."""

    parameters: int
    products: int
    sides: int


def work(section: LlmQa, model: str, data_set: str) -> Work:
    """Count the tokens that the stages of `isouq.studies.qa.stages` take, by the questions that would be asked."""
    how, choose = section.scoring(model, data_set), data_set.endswith("_choose")
    whole = study.load_questions(data_set.removesuffix("_choose"))
    n, n_samples, size = how["n_questions"], how["n_samples"], how["batch_size"]
    n_shots = 0 if whole.prefix else how["n_shots"]
    asked, shots = data.sample(whole, n, n_shots=n_shots, seed=section.seed)
    bare = [_tokens(replace(whole, prefix="").prompt(question)) for question in asked]
    shared = _tokens(whole.prompt(asked[0], shots)) - bare[0]  # the prefix or the examples, read once a batch
    longest = how["max_new_tokens"] * (2 if whole.sentences else 1)
    own, batches = sum(bare), n / size
    read, written = own + shared * batches, n * longest
    forward, steps = read + written, longest * batches
    whole_texts = own + n * shared + written
    forward, backward = forward + 2 * whole_texts, 1.5 * whole_texts  # estimate; cheap, which has no norms
    if choose:
        references = [[_tokens(text) for text in (*q.answers, *q.false_answers)] for q in asked]
        read_so = [*zip(bare, references, strict=True)][: how["n_choice"]]
        extra = sum(own_of * len(texts) + sum(texts) for own_of, texts in read_so)
        forward, backward, steps = forward + sum(map(sum, references)) + 2 * extra, backward + extra, 0.0
    each = mean(bare) + shared + longest
    backward += min(n, how["n_token_mean"]) * longest * each
    forward += min(n, how["n_token_mean"]) * each
    if n_samples:
        example = mean(bare) + (N_IDEAS + 1) * longest + P_TRUE_WORDS
        forward += read + n_samples * written + (n + N_TRUE_SHOTS * batches) * example
        steps += longest * batches
    return Work(forward, backward, steps, size * (max(bare) + shared + longest))


def _tokens(text: str) -> float:
    return len(text) / CHARACTERS


def size_of(architecture: Mapping[str, Any]) -> Size:
    """Return the size of a model from its config (`model_type` and what differs from that type's defaults)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    linear = [module.weight.shape for module in model.modules() if isinstance(module, torch.nn.Linear)]
    parameters = sum(p.numel() for p in model.parameters())
    return Size(parameters, sum(a * b for a, b in linear), sum(a + b for a, b in linear))


def flops(size: Size, done: Work) -> float:
    """Return the floating-point operations of some work."""
    return 2.0 * size.products * (done.forward + 2 * done.backward)


def memory(size: Size, done: Work, n_bytes: int) -> float:
    """Return bytes: the weights, and both sides of each matrix product with their gradients for the largest batch."""
    return n_bytes * (size.parameters + 2 * size.sides * done.batch)


def table(profile: Profile) -> pd.DataFrame:
    """Return a row per model and data set: parameters (10⁹), petaflops (10¹⁵ operations), GPU hours, gigabytes.

    Raises ProfileError for a profile without 04_llm_qa or `gpu`, or a model without an entry there.
    """
    gpu, section = profile.gpu, cast(LlmQa, profile.parameters("04_llm_qa"))
    if gpu is None or (unknown := [model for model in section.models if model not in gpu.architectures]):
        missing = "gpu" if gpu is None else f"gpu.architectures.{unknown[0]}"
        raise ProfileError(f"profile {profile.name!r} has no {missing}, on which hours and memory depend")
    sizes = {model: size_of(gpu.architectures[model]) for model in section.models}
    rows = []
    for model, data_set in section.pairs():
        size, done, n_bytes = sizes[model], work(section, model, data_set), BYTES[section.dtype]
        computing = flops(size, done) / (1e12 * gpu.teraflops)
        reading = done.steps * n_bytes * size.parameters / (1e12 * gpu.terabytes_per_second)
        rows.append(
            {
                "model": model,
                "data set": data_set,
                "parameters": size.parameters / 1e9,
                "petaflops": flops(size, done) / 1e15,
                "hours": (computing + reading) / gpu.efficiency / 3600,
                "gigabytes": memory(size, done, n_bytes) / 1e9,
            }
        )
    return pd.DataFrame(rows)


def shown(profile: Profile) -> dict[str, Any]:
    """Return what readers see: `header` and `rows`, one a model and one for all together, and the `basis` in words.

    Hours and operations are those of a model's data sets together, memory is the most of them. Raises as `table`.
    """
    how = {"parameters": "first", "petaflops": "sum", "hours": "sum", "gigabytes": "max"}
    models = table(profile).groupby("model", sort=False).agg(how).reset_index()
    total = {"model": "together", "petaflops": models["petaflops"].sum(), "hours": models["hours"].sum()}
    text = pd.concat([models, pd.DataFrame([total])], ignore_index=True)
    digits = {"parameters": "{:.1f} billion", "petaflops": "{:,.0f}", "hours": "{:.1f}", "gigabytes": "{:.0f}"}
    for name, form in digits.items():
        text[name] = ["" if pd.isna(value) else form.format(value) for value in text[name]]
    text = text.rename(columns={"hours": "GPU hours", "gigabytes": "GPU memory, GB"})
    gpu = cast(Gpu, profile.gpu)
    peak = f"{gpu.efficiency:.0%} of its {gpu.teraflops:g} teraflop/s and {gpu.terabytes_per_second:g} TB/s"
    basis = f"Estimated, not measured: for one {gpu.name}, of which a run is taken to reach {peak}."
    return {"header": list(text), "rows": text.to_numpy().tolist(), "basis": basis}
