"""What is asked of a model before it is scored, and of its forward passes: one place for every door."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class ExampleError(ValueError):
    """An error of one example: `example` is its place in the caller's order, "{}" in `message` stands for its name."""

    def __init__(self, message: str, example: int) -> None:
        super().__init__(message.replace("{}", f"example {example}"))
        self.message, self.example = message, example

    def about(self, name: str) -> str:
        """The message with another name for the example, such as "row 7" of a file."""
        return self.message.replace("{}", name)


def check_model(model: nn.Module) -> None:
    """Refuse what has no score: no module, weights without numbers, a training mode that changes the output.

    Raises TypeError or ValueError, naming the module or parameter and the way out.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} given, a torch.nn.Module wanted")
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(value):
            raise ValueError(f"model: {name} has no shape yet; run the lazy module once on an input")
        if value.is_meta and not offloaded:
            raise ValueError(f"model: {name} is on the meta device, without numbers; load the model's weights")
        if value.is_inference():
            raise ValueError(f"model: {name} was made under torch.inference_mode(); make or load the model outside it")
    for name, module in model.named_modules():
        if module.training and (why := _depends_on_mode(module)):
            raise ValueError(f"model: in training mode with {why} ({name or 'itself'}); call model.eval()")


def _depends_on_mode(module: nn.Module) -> str | None:
    """Why a module's output in training mode may be another than in eval mode, or None.

    Only classes whose code mentions `training` come into question. Where the module or its config states rates,
    these decide. Norms without statistics ignore the mode, and so does transformers but for its rates.
    """
    kinds: list[Any] = [type(module), *map(type, module._forward_pre_hooks.values())]  # spectral norms are hooks
    reader = next((kind.__name__ for kind in kinds if _reads_mode(kind)), None)
    config: Any = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})
    stated = {k: v for k, v in {**settings, **vars(module)}.items() if k == "p" or "drop" in k or "noise" in k}
    rates = {k: v for k, v in stated.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    if reader and any(rates.values()):
        return next(f"dropout {k}={v}" for k, v in rates.items() if v)
    hub = type(module).__module__.startswith("transformers.")
    return None if rates or hub or getattr(module, "track_running_stats", None) is False else reader


@cache
def _reads_mode(kind: Any) -> bool:
    """Whether a method of the class or of its bases mentions `training`, besides nn.Module's own and fast paths."""
    bases = set(kind.__mro__) - {nn.Module, nn.TransformerEncoderLayer, nn.TransformerEncoder}
    methods = [inspect.unwrap(f) for base in bases for f in vars(base).values() if inspect.isfunction(f)]
    codes: list[Any] = [method.__code__ for method in methods]
    for code in codes:  # grows: functions inside functions
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return issubclass(kind, torch.jit.ScriptModule) or any("training" in (*c.co_names, *c.co_consts) for c in codes)


@contextmanager
def repeatable() -> Iterator[None]:
    """Raise ValueError where a forward pass inside draws random numbers, in whatever mode."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]

    before = states()
    yield
    if not all(map(torch.equal, before, states())):
        raise ValueError("model: its forward pass draws random numbers; call model.eval(), or make it deterministic")


def run(model: nn.Module, argument: str, *args: Tensor, **options: Any) -> Any:
    """The model's output. What torch says of an input that does not fit becomes a ValueError naming `argument`."""
    try:
        return model(*args, **options)
    except (RuntimeError, IndexError, ValueError) as error:
        if type(error) not in (RuntimeError, IndexError, ValueError):  # memory, checkpointing: no matter of the input
            raise
        given = ", ".join(f"{tuple(v.shape)} {v.dtype}" for v in (*args, *options.values()) if isinstance(v, Tensor))
        raise ValueError(f"{argument}: {given} given, which the model does not take: {error}") from error
