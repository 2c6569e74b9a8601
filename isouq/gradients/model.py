"""All that is asked of a model and done to it: checks, the choice of parameters, forward passes, leaving no trace."""

from __future__ import annotations

import fnmatch
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from isouq.gradients.torch_contract import backward_hooks, forward_hooks

DIFFERENTIABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    kinds: list[Any] = [type(module), *map(type, forward_hooks(module)[1])]  # spectral norms are hooks
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


def select_parameters(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The model's parameters by name, each once (a tied one under its first name), those that match `patterns` only.

    Parameters of whole numbers that serve as indices have no gradient and are left out. Raises ValueError for a
    pattern that matches nothing and for parameters without a gradient (quantised, complex), TypeError for a string.
    """
    if isinstance(patterns, str):
        raise TypeError(f"parameters: the string {patterns!r} given, a list of name patterns or None wanted")
    every = dict(model.named_parameters())
    if not every:
        raise ValueError("model has no parameters to differentiate")
    for pattern in patterns or ():
        if not fnmatch.filter(every, pattern):
            raise ValueError(f"parameters: {pattern!r} matches none of the model's, such as {next(iter(every))!r}")
    asked = {n: p for n, p in every.items() if patterns is None or any(fnmatch.fnmatch(n, q) for q in patterns)}
    chosen = {n: p for n, p in asked.items() if not _is_index(p)}
    if not chosen:
        raise ValueError(f"parameters: {list(asked)} asked for, at least one with a gradient wanted; None means all")
    _refuse_without_gradient(model, chosen)
    tied = _tied(model, every.values())
    return {n: p for n, p in chosen.items() if n not in tied}


def _is_index(p: Tensor) -> bool:
    """Whether a parameter holds places or counts; narrow integers, and int32 in matrices, are packed weights."""
    return p.dtype in (torch.int64, torch.bool) or (p.dtype is torch.int32 and p.dim() < 2)


def _refuse_without_gradient(model: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
    if kinds := [f"{n} ({p.dtype})" for n, p in chosen.items() if p.is_complex()]:
        raise ValueError(f"model has complex parameters, for which there is no rule: {kinds[0]}; real ones wanted")
    wrong = [f"{n} ({p.dtype})" for n, p in chosen.items() if p.dtype not in DIFFERENTIABLE or p.is_quantized]
    wrong += [
        f"{n} ({type(m).__name__})"
        for n, m in model.named_modules()
        if ".quantized" in type(m).__module__ or hasattr(m, "qweight")
    ]
    if wrong:
        raise ValueError(
            f"model has quantised parameters, whose gradient does not exist: {', '.join(wrong[:3])}"
            f"{' …' if len(wrong) > 3 else ''}; load it in float32, bfloat16 or float16"
        )


@dataclass
class Tracked:
    """Which tensor stands for which parameter: the parameters themselves, and the copies that offloading loads.

    `parameters` are the chosen ones, `names` (by identity) those of all, `tensors` all that may gather a gradient.
    """

    parameters: dict[str, nn.Parameter]
    names: dict[int, str] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)

    def load(self, name: str, tensor: Tensor) -> None:
        """Take note of a tensor that a hook puts in a parameter's place; holding it keeps its identity."""
        self.names[id(tensor)] = name
        self.tensors.append(tensor)


class _Watched(dict[str, Any]):
    """A module's parameters, telling when one is replaced during the forward pass (accelerate's offloading does)."""

    def __init__(self, original: dict[str, Any], names: dict[str, str], tracked: Tracked) -> None:
        super().__init__(original)
        self.names, self.tracked = names, tracked

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key in self.names and value is not None and value.device.type != "meta":
            self.tracked.load(self.names[key], value)


def _tied(model: nn.Module, parameters: Iterable[Tensor]) -> dict[str, str]:
    """Name → the name it is tied to, where offloading has torn them apart: their identity is lost, the names remain."""
    if not any(p.is_meta for p in parameters):
        return {}
    declared = getattr(model, "all_tied_weights_keys", None)
    if declared is None:
        raise ValueError("model: offloaded, and it does not declare which weights are tied; load it on one device")
    return dict(declared)


@contextmanager
def differentiable(model: nn.Module, chosen: Iterable[str]) -> Iterator[Tracked]:
    """Let all parameters require a gradient, or none if none is `chosen`; put everything back afterwards.

    All of them, as autograd's graph then tells from the input on how the examples are laid out. Meanwhile what the
    owner has attached to the backward pass (hooks on parameters and modules, optimisers in them, gradients so far) is
    set aside, and compiled code runs as it was written.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("called inside torch.inference_mode(), where there are no gradients; leave it for this call")
    every = dict(model.named_parameters(remove_duplicate=False))
    tied, tensors = _tied(model, every.values()), {id(p): p for p in every.values()}
    tracked = Tracked({name: every[name] for name in chosen}, tensors=list(tensors.values()))
    tracked.names = {id(p): name for name, p in reversed(every.items())}
    tracked.names |= {id(every[name]): to for name, to in tied.items()}
    flags = [(p, p.requires_grad) for p in tensors.values()]
    offloaded = [m for m in model.modules() if hasattr(m, "_hf_hook") and m._parameters]
    hooks = backward_hooks(model, tensors.values())
    kept, grads = [dict(table) for table in hooks], [p.grad for p in tensors.values()]
    try:
        for table in hooks:  # emptied in place: autograd holds the very same tables
            table.clear()
        for p in tensors.values():
            p.grad = None
        for p, _ in flags:
            if p.dtype in DIFFERENTIABLE:
                p.requires_grad_(bool(tracked.parameters))
        for module in offloaded:
            names = {k: tracked.names[id(p)] for k, p in module._parameters.items() if p is not None}
            module._parameters = _Watched(module._parameters, names, tracked)
        with torch.enable_grad(), _as_written(), repeatable():
            yield tracked
    finally:
        for table, content in zip(hooks, kept, strict=True):
            table.update(content)
        for p, grad in zip(tensors.values(), grads, strict=True):
            p.grad = grad
        for module in offloaded:
            module._parameters = dict(module._parameters)
        for p, flag in flags:
            p.requires_grad_(flag)


def _as_written() -> AbstractContextManager[Any]:
    """Compiled code runs eagerly: its graph shows no operation, and it allows one backward pass only."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def check_differentiable(values: Tensor) -> None:
    """Refuse values that no parameter could have a gradient from; a score of exactly zero would hide the reason."""
    if not values.requires_grad:
        raise ValueError("model: its output carries no gradient (detached, or computed under torch.no_grad())")
