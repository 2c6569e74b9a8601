"""Any torch classifier or regressor → its uncertainty: the paper's estimate in its original, one-label form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isouq import estimate
from isouq.estimate import Estimate, Regression
from isouq.gradients import Engine, SquaredNorms, squared_norms

Inputs = Tensor | Mapping[str, Tensor]


def score_classes(
    model: nn.Module,
    inputs: Inputs,
    target: Tensor | Literal["all"] | None = None,
    *,
    link: Literal["softmax", "sigmoid"] = "softmax",
    engine: Engine = "auto",
    batch_size: int = 256,
    parameters: Sequence[str] | None = None,
) -> Estimate:
    """U_E = ‖∇θ p(c|x,θ)‖² and U_A = p(1 − p) of one class per example (paper, delta method with Cov[θ] = σ²I).

    Args:
        model: an nn.Module in eval mode; its output, or the output's `.logits`, is (example, class).
        inputs: a tensor (example, …), or a mapping of such tensors that the model takes by name.
        target: the class of each example, (example,) int64; None for the predicted one; "all" for every class, which
            makes the result's tensors (example, class).
        link: how logits become probabilities; "sigmoid" reads a single logit as that of class 1 of two.
        engine, parameters: as in `score_tokens`.
        batch_size: examples a pass; it does not change the scores.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is wanted.
    """

    def objective(part: Inputs, rows: slice) -> Tensor:
        log_p = _log_probabilities(_outputs(model, part), link)
        if isinstance(target, str):
            chosen = torch.arange(log_p.shape[1], device=log_p.device).expand(len(log_p), -1)
        else:
            chosen = (log_p.argmax(1) if target is None else target[rows].to(log_p.device))[:, None]
            _check_classes(chosen, log_p.shape[1])
        return log_p.gather(1, chosen)

    _check_target(target, _length(inputs))
    norms = _batched(model, inputs, objective, engine=engine, batch_size=batch_size, parameters=parameters)
    log_p, log_G = torch.cat([n.objective for n in norms]), torch.cat([n.total for n in norms]).log()
    if not isinstance(target, str):
        log_p, log_G = log_p[:, 0], log_G[:, 0]
    probability, aleatoric, log_epistemic = estimate.sequence(log_p, log_G)
    return Estimate(
        log_prob=log_p,
        n_tokens=torch.ones_like(log_p, dtype=torch.int64),
        probability=probability,
        aleatoric=aleatoric,
        log_epistemic=log_epistemic,
        engine=norms[0].engine,
        n_parameters=norms[0].n_parameters,
        parameters="all" if parameters is None else ", ".join(parameters),
    )


def score_outputs(
    model: nn.Module,
    inputs: Inputs,
    *,
    noise_variance: float,
    engine: Engine = "auto",
    batch_size: int = 256,
    parameters: Sequence[str] | None = None,
) -> Regression:
    """U_E = ‖∇θ f(x,θ)‖² of each output of a regressor; its aleatoric uncertainty is the noise's variance.

    `noise_variance` is in the square of the output's unit, U_E in the same per unit of σ². Other arguments and errors
    as in `score_classes`.
    """
    if not noise_variance >= 0:
        raise ValueError(f"noise_variance: {noise_variance} given, a number of at least 0 wanted")

    def objective(part: Inputs, rows: slice) -> Tensor:
        outputs = _outputs(model, part)
        return outputs[:, None] if outputs.dim() == 1 else outputs

    norms = _batched(model, inputs, objective, engine=engine, batch_size=batch_size, parameters=parameters)
    mean = torch.cat([n.objective for n in norms])
    return Regression(
        mean=mean,
        aleatoric=torch.full_like(mean, noise_variance),
        log_epistemic=torch.cat([n.total for n in norms]).log(),
        engine=norms[0].engine,
        n_parameters=norms[0].n_parameters,
    )


def _batched(
    model: nn.Module,
    inputs: Inputs,
    objective: Callable[[Inputs, slice], Tensor],
    *,
    engine: Engine,
    batch_size: int,
    parameters: Sequence[str] | None,
) -> list[SquaredNorms]:
    """Squared norms batch by batch; `objective` sees the rows of the whole that it is given."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: {batch_size!r} given, a positive integer wanted")
    n, found = _length(inputs), []
    if n == 0:
        raise ValueError("inputs: no example given, at least one wanted")
    for start in range(0, n, batch_size):
        stop = min(start + batch_size, n)

        def part(rows: slice, start: int = start, stop: int = stop) -> Tensor:
            inside = slice(start + rows.start, min(start + rows.stop, stop))
            return objective(_rows(inputs, inside), inside)

        found.append(squared_norms(model, part, stop - start, engine=engine, parameters=parameters, apart=True))
    return found


def _length(inputs: Inputs) -> int:
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    for value in tensors:
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise TypeError(f"inputs: {type(value).__name__} given, a tensor (example, …) or a mapping of such wanted")
    if len({len(value) for value in tensors}) != 1:
        raise ValueError(f"inputs: lengths {[len(v) for v in tensors]} given, one length wanted")
    return len(tensors[0])


def _rows(inputs: Inputs, rows: slice) -> Inputs:
    return {k: v[rows] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[rows]


def _outputs(model: nn.Module, part: Inputs) -> Tensor:
    out: Any = model(**part) if isinstance(part, Mapping) else model(part)
    out = getattr(out, "logits", out)
    if not isinstance(out, Tensor) or out.dim() not in (1, 2):
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"model: output {shape} given, a tensor (example, class) or one with .logits wanted")
    if not out.isfinite().all():
        raise ValueError("model: NaN or infinite output, finite ones wanted")
    return out


def _log_probabilities(logits: Tensor, link: str) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if link == "sigmoid":
        if wide.dim() == 2 and wide.shape[1] != 1:
            raise ValueError(f"link: 'sigmoid' given for {wide.shape[1]} logits an example, one wanted")
        one = wide.reshape(-1, 1)
        return nn.functional.logsigmoid(torch.cat([-one, one], 1))
    if link != "softmax":
        raise ValueError(f"link: {link!r} given, 'softmax' or 'sigmoid' wanted")
    if wide.dim() == 1 or wide.shape[1] == 1:
        raise ValueError("model: one logit an example; say link='sigmoid' for two classes, or use score_outputs")
    return wide.log_softmax(1)


def _check_target(target: Tensor | str | None, n: int) -> None:
    if isinstance(target, str) and target != "all":
        raise ValueError(f"target: {target!r} given, 'all', None or a tensor of classes wanted")
    if isinstance(target, Tensor) and (target.shape != (n,) or target.is_floating_point()):
        raise ValueError(f"target: shape {tuple(target.shape)} and {target.dtype} given, ({n},) int64 wanted")


def _check_classes(chosen: Tensor, n_classes: int) -> None:
    if int(chosen.min()) < 0 or int(chosen.max()) >= n_classes:
        raise ValueError(
            f"target: classes {int(chosen.min())} to {int(chosen.max())} given, 0 to {n_classes - 1} wanted"
        )
