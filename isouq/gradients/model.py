"""Everything the engines ask of a model and do to it: checks, choosing parameters, forward passes, cleaning up."""

import fnmatch
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from isouq.gradients.torch_contract import backward_hooks, compute_anew, forward_hooks

DIFFERENTIABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What a forward pass raises about its arguments: of the wrong shape or type, by other names, or where there is none.
UNFIT = (RuntimeError, NotImplementedError, IndexError, KeyError, ValueError, TypeError, AttributeError, AssertionError)


class ExampleError(ValueError):
    """An error in one example: `example` is its place in the caller's order; "{}" in `message` stands for its name."""

    def __init__(self, message: str, example: int) -> None:
        super().__init__(message.replace("{}", f"example {example}"))
        self.message, self.example = message, example

    def about(self, name: str) -> str:
        """The message with another name for the example, such as "row 7" of a file."""
        return self.message.replace("{}", name)


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be scored: no module, weights without values, a training mode that changes the output.

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
    """Why a module's output may differ between training and eval mode, or None.

    Only a class whose code mentions `training` can differ. If the module or its config states dropout rates, they
    decide. Norms without running statistics ignore the mode, and so does transformers apart from its rates.
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
    """Whether a method of the class or its bases mentions `training`, apart from nn.Module's own and fast paths."""
    bases = set(kind.__mro__) - {nn.Module, nn.TransformerEncoderLayer, nn.TransformerEncoder}
    methods = [inspect.unwrap(f) for base in bases for f in vars(base).values() if inspect.isfunction(f)]
    codes: list[Any] = [method.__code__ for method in methods]
    for code in codes:  # grows: functions inside functions
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return issubclass(kind, torch.jit.ScriptModule) or any("training" in (*c.co_names, *c.co_consts) for c in codes)


@contextmanager
def repeatable() -> Iterator[None]:
    """Raise ValueError if a forward pass in this context draws random numbers, in whatever mode."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]

    before = states()
    yield
    if not all(map(torch.equal, before, states())):
        raise ValueError("model: its forward pass draws random numbers; call model.eval(), or make it deterministic")


def run(model: nn.Module, argument: str, *args: Tensor, **options: Any) -> Any:
    """The model's output. An error about an input that does not fit becomes a Value- or TypeError naming `argument`."""
    try:
        return model(*args, **options)
    except UNFIT as error:
        if type(error) not in UNFIT:  # subclasses: out of memory, checkpointing
            raise
        given = ", ".join(f"{tuple(v.shape)} {v.dtype}" for v in (*args, *options.values()) if isinstance(v, Tensor))
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{argument}: {given} given, which the model does not take: {error}") from error


def select_parameters(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The model's parameters that match `patterns`, by name, each once (a tied one under its first name).

    Integer parameters that serve as indices are left out. Raises ValueError for a pattern that
    matches nothing and for parameters without a gradient (quantised, complex), TypeError for a string.
    """
    listed = patterns is None or (isinstance(patterns, Collection) and all(isinstance(q, str) for q in patterns))
    if isinstance(patterns, str) or not listed:
        raise TypeError(f"parameters: {patterns!r} given, a list of name patterns or None wanted")
    every = dict(model.named_parameters())
    if not every:
        raise ValueError("model has no parameters to differentiate")
    for pattern in patterns or ():
        if not fnmatch.filter(every, pattern):
            raise ValueError(f"parameters: {pattern!r} matches none of the model's, such as {next(iter(every))!r}")
    asked = {n: p for n, p in every.items() if patterns is None or any(fnmatch.fnmatch(n, q) for q in patterns)}
    # Parameters of indices or counts have no gradient. Narrow integers, and int32 matrices, are packed weights instead.
    no_gradient = (torch.int64, torch.bool)
    chosen = {n: p for n, p in asked.items() if p.dtype not in no_gradient and (p.dtype != torch.int32 or p.dim() > 1)}
    if not chosen:
        raise ValueError(f"parameters: {list(asked)} asked for, at least one with a gradient wanted; None means all")
    _refuse_without_gradient(model, chosen)
    tied = _tied(model, every.values())
    return {n: p for n, p in chosen.items() if n not in tied}


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

    `parameters` are the chosen ones; `names` maps the id of every tensor to its parameter's name; `tensors` are all
    that may receive a gradient.
    """

    parameters: dict[str, nn.Parameter]
    names: dict[int, str]
    tensors: list[Tensor]


class _Watched(dict[str, Any]):
    """A module's parameters; tracks the tensors put in their place during a forward pass (accelerate's offloading)."""

    def __init__(self, original: dict[str, Any], names: dict[str, str], tracked: Tracked) -> None:
        super().__init__(original)
        self.names, self.tracked = names, tracked

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key in self.names and value is not None and value.device.type != "meta":
            self.tracked.names[id(value)] = self.names[key]
            self.tracked.tensors.append(value)  # held, so that no other tensor gets its id


def _tied(model: nn.Module, parameters: Iterable[Tensor]) -> dict[str, str]:
    """Name → the name it is tied to, if the model is offloaded: tied weights are then distinct tensors."""
    if not any(p.is_meta for p in parameters):
        return {}
    declared = getattr(model, "all_tied_weights_keys", None)
    if declared is None:
        raise ValueError("model: offloaded, and it does not declare which weights are tied; load it on one device")
    return dict(declared)


@contextmanager
def differentiable(model: nn.Module, chosen: Iterable[str]) -> Iterator[Tracked]:
    """Let all parameters require a gradient, or none if none is `chosen`; restore everything afterwards.

    With all of them, autograd's graph reaches back to the input, which tells how the examples are laid out. Meanwhile
    what the owner has attached to the backward pass (hooks on parameters and modules, optimisers in them, gradients so
    far) is set aside, and compiled code runs eagerly.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("called inside torch.inference_mode(), where there are no gradients; leave it for this call")
    every = dict(model.named_parameters(remove_duplicate=False))
    tied, tensors = _tied(model, every.values()), {id(p): p for p in every.values()}
    names = {id(p): name for name, p in reversed(every.items())} | {id(every[name]): to for name, to in tied.items()}
    tracked = Tracked({name: every[name] for name in chosen}, names, list(tensors.values()))
    with ExitStack() as undo:
        for table in backward_hooks(model, tensors.values()):  # emptied in place: autograd holds these very tables
            undo.callback(table.update, dict(table))
            table.clear()
        for p in tensors.values():
            undo.callback(setattr, p, "grad", p.grad)
            undo.callback(p.requires_grad_, p.requires_grad)
            p.grad = None
            if p.dtype in DIFFERENTIABLE:
                p.requires_grad_(bool(tracked.parameters))
        for module in model.modules():
            if hasattr(module, "_hf_hook") and module._parameters:
                own = {k: names[id(p)] for k, p in module._parameters.items() if p is not None}
                module._parameters = _Watched(module._parameters, own, tracked)
                undo.callback(lambda m: setattr(m, "_parameters", dict(m._parameters)), module)
        compute_anew(undo)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes seconds
            # A compiled graph shows no operation and allows one backward pass only.
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        with torch.enable_grad(), repeatable():
            yield tracked


def check_differentiable(values: Tensor) -> None:
    """Refuse values without a graph, which would otherwise score exactly zero and hide the reason."""
    if not values.requires_grad:
        raise ValueError("model: its output carries no gradient (detached, or computed under torch.no_grad())")
