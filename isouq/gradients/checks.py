"""What is asked of a model before and while it is differentiated: one place for every door."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
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
            raise ValueError(
                f"model: in training mode with {why} ({name or type(module).__name__}), which makes scores random or "
                "dependent on the batch; call model.eval()"
            )


def _depends_on_mode(module: nn.Module) -> str | None:
    """Why a module's output in training mode may be another than in eval mode, or None.

    What decides is whether the class's code mentions `training`; where a module states rates of noise, only rates above
    0 count. transformers reads the mode nearly everywhere, also without an effect: there rates alone decide.
    """
    if getattr(module, "track_running_stats", None) is False or type(module) in _READ_IT_FOR_SPEED:
        return None
    config = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})
    rates = {**{k: v for k, v in settings.items() if "drop" in k and isinstance(v, float)}, **_rates(module)}
    reads = _reads_mode(type(module))
    if any(rates.values()) and (settings or reads):
        return next(f"dropout {k}={v}" for k, v in rates.items() if v)
    return type(module).__name__ if reads and not rates and not from_library(module, "transformers") else None


_READ_IT_FOR_SPEED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


def _rates(module: nn.Module) -> dict[str, float]:
    numbers = {k: v for k, v in vars(module).items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: v for k, v in numbers.items() if k == "p" or any(word in k for word in ("drop", "noise"))}


def from_library(module: nn.Module, *libraries: str) -> bool:
    """Whether the module's class is defined in one of the libraries."""
    return type(module).__module__.split(".")[0] in libraries


@cache
def _reads_mode(kind: type[nn.Module]) -> bool:
    """Whether a method of the class or of its bases, other than nn.Module's, mentions `training`."""
    bases = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    methods = [inspect.unwrap(f) for base in bases for f in vars(base).values() if inspect.isfunction(f)]
    codes: list[Any] = [method.__code__ for method in methods]
    for code in codes:  # grows: functions inside functions
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return any("training" in (*code.co_names, *code.co_consts) for code in codes)


@contextmanager
def repeatable(model: nn.Module) -> Iterator[None]:
    """Raise ValueError where a forward pass inside draws random numbers, or in training mode changes a buffer.

    Buffers are put back. In eval mode this costs the reading of the generators' states.
    """
    training = any(module.training for module in model.modules())
    kept = [(m, k, b, b.clone()) for m in model.modules() if training for k, b in m._buffers.items() if b is not None]
    states = _generators()
    yield
    changed = [m for m, k, b, copy in kept if m._buffers.get(k) is not b or not torch.equal(b, copy)]
    for module, name, buffer, copy in kept if changed else ():
        module._buffers[name] = buffer.copy_(copy)
    if changed:
        raise ValueError(f"model: {type(changed[0]).__name__} changes its buffers in training mode; call model.eval()")
    if not all(map(torch.equal, states, _generators())):
        way_out = "call model.eval()" if training else "a model that gives equal outputs for equal inputs is wanted"
        raise ValueError(f"model: its forward pass draws random numbers, which makes scores random; {way_out}")


def _generators() -> list[Tensor]:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpus]


def run(model: nn.Module, argument: str, *args: Tensor, **options: Any) -> Any:
    """The model's output. What torch says of an input that does not fit becomes a ValueError naming `argument`."""
    try:
        return model(*args, **options)
    except (RuntimeError, IndexError) as error:
        if type(error) not in (RuntimeError, IndexError):  # memory, checkpointing: no matter of the input
            raise
        given = [v for v in (*args, *options.values()) if isinstance(v, Tensor)]
        shown = ", ".join(f"{tuple(v.shape)} {v.dtype} on {v.device}" for v in given)
        raise ValueError(f"{argument}: {shown} given, which the model does not take: {error}") from error
