"""Any torch classifier or regressor → its uncertainty: the paper's estimate in its original, one-label form."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor, nn

from isouq import estimate
from isouq.estimate import Estimate, Regression
from isouq.gradients import Engine, ExampleError, SquaredNorms, squared_norms
from isouq.gradients.model import check_model, run

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
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
        model: An nn.Module in eval mode. Its output, or the output's `.logits`, is (example, class).
        inputs: A tensor (example, …), or a mapping of such tensors that the model takes by name.
        target: The class of each example, (example,) int64; None for the predicted class; "all" for every class.
        link: How logits become probabilities; "sigmoid" reads a single logit as that of class 1 of two.
        engine, parameters: As in `score_tokens`.
        batch_size: Examples a pass. It does not change the scores.

    Returns:
        An `Estimate` whose tensors are (example,) float64, or (example, class) for target "all": log-probabilities in
        nats, U_A as a variance of probability, and U_E in units of the parameter variance σ².

    Raises:
        ValueError, TypeError: An argument is wrong, or the model is in a training mode that changes its output or is
            not finite. The message names the argument, what was given and what is wanted.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x = torch.randn(5, 2)
        >>> isouq.score_classes(net, x).epistemic.shape, isouq.score_classes(net, x, "all").epistemic.shape
        (torch.Size([5]), torch.Size([5, 3]))
    """

    def objective(outputs: Tensor, rows: range) -> Tensor:
        logits = _logits(outputs, link)
        if isinstance(target, str):
            return _log_odds(logits)
        chosen = logits.argmax(1) if target is None else target[rows.start : rows.stop].long().to(logits.device)
        wrong = ((chosen < 0) | (chosen >= logits.shape[1])).nonzero()
        if len(wrong):
            given = f"target: class {int(chosen[wrong[0]])} given for {{}}, 0 to {logits.shape[1] - 1} wanted"
            raise ExampleError(given, rows[int(wrong[0])])
        return _log_odds(logits).gather(1, chosen[:, None])

    _check_target(target, _length(inputs))
    norms = _squared_norms(model, inputs, objective, engine=engine, batch_size=batch_size, parameters=parameters)
    log_p, log_G = estimate.from_log_odds(norms.objective, norms.total)
    if not isinstance(target, str):
        log_p, log_G = log_p[:, 0], log_G[:, 0]
    probability, aleatoric, log_epistemic = estimate.sequence(log_p, log_G)
    return Estimate(
        log_prob=log_p,
        n_tokens=torch.ones_like(log_p, dtype=torch.int64),
        probability=probability,
        aleatoric=aleatoric,
        log_epistemic=log_epistemic,
        engine=norms.engine,
        n_parameters=norms.n_parameters,
        parameters="all" if parameters is None else ", ".join(parameters),
        log_probability=log_p,
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

    Args:
        model: An nn.Module in eval mode. Its output is (example, output) or (example,).
        noise_variance: The variance of the noise, in the square of the output's unit.
        inputs, engine, batch_size, parameters: As in `score_classes`.

    Returns:
        A `Regression` whose tensors are (example, output) float64; U_E is in the square of the output's unit, per unit
        of the parameter variance σ².

    Raises:
        ValueError, TypeError: As `score_classes`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> scores = isouq.score_outputs(net, torch.randn(5, 2), noise_variance=0.25)
        >>> scores.epistemic.shape, scores.aleatoric.unique().item()
        (torch.Size([5, 1]), 0.25)
    """
    if not isinstance(noise_variance, Real) or not 0 <= noise_variance < math.inf:
        raise ValueError(f"noise_variance: {noise_variance!r} given, a finite number of at least 0 wanted")

    def objective(outputs: Tensor, _: range) -> Tensor:
        return outputs[:, None] if outputs.dim() == 1 else outputs

    norms = _squared_norms(model, inputs, objective, engine=engine, batch_size=batch_size, parameters=parameters)
    return Regression(
        mean=norms.objective,
        aleatoric=torch.full_like(norms.objective, noise_variance),
        log_epistemic=norms.total.log(),
        engine=norms.engine,
        n_parameters=norms.n_parameters,
    )


def _squared_norms(
    model: nn.Module,
    inputs: Inputs,
    objective: Callable[[Tensor, range], Tensor],
    *,
    engine: Engine,
    batch_size: int,
    parameters: Sequence[str] | None,
) -> SquaredNorms:
    """Squared norms of all batches, joined; `objective` takes the model's output for a range of rows and the range."""
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size: {batch_size!r} given, a positive integer wanted")
    check_model(model)
    n, parts = _length(inputs), []
    if n == 0:
        raise ValueError("inputs: no example given, at least one wanted")
    for start in range(0, n, batch_size):
        batch = range(n)[start : start + batch_size]

        def values(rows: slice, batch: range = batch) -> Tensor:
            return objective(_outputs(model, inputs, batch[rows]), batch[rows])

        parts.append(
            squared_norms(model, values, len(batch), engine=engine, parameters=parameters, apart=True, rows=batch)
        )
    return SquaredNorms.joined(parts)


def _length(inputs: Inputs) -> int:
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    for value in tensors:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.layout != torch.strided:
            raise TypeError(f"inputs: {type(value).__name__} given, a tensor (example, …), not sparse, or dict wanted")
    if len({len(value) for value in tensors}) != 1:
        raise ValueError(f"inputs: tensors of lengths {[len(v) for v in tensors]} given, one length wanted")
    return len(tensors[0])


def _outputs(model: nn.Module, inputs: Inputs, rows: range) -> Tensor:
    named = {"": inputs} if isinstance(inputs, Tensor) else inputs
    part = {k: v.detach()[rows.start : rows.stop].clone() for k, v in named.items()}  # the model may change its input
    out = run(model, "inputs", part[""]) if isinstance(inputs, Tensor) else run(model, "inputs", **part)
    out = getattr(out, "logits", out)
    real = isinstance(out, Tensor) and out.layout == torch.strided and not out.is_complex()
    if not real or out.dim() not in (1, 2) or len(out) != len(rows) or 0 in out.shape:
        kind = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        given = f"output {kind} of {len(rows)} examples given"
        raise ValueError(f"model: {given}, a tensor (example, class) or one with .logits wanted")
    wrong = (~out.isfinite()).nonzero()
    if len(wrong):
        raise ExampleError("model: NaN or infinite output for {}, finite ones wanted", rows[int(wrong[0, 0])])
    return out


def _logits(outputs: Tensor, link: str) -> Tensor:
    """A logit for each class, float64; a single logit is the log odds of class 1, and class 0 gets logit 0."""
    wide = outputs.double()
    if link == "sigmoid":
        if wide.dim() == 2 and wide.shape[1] != 1:
            raise ValueError(f"link: 'sigmoid' given for {wide.shape[1]} logits an example, one wanted")
        one = wide.reshape(-1, 1)
        return torch.cat([torch.zeros_like(one), one], 1)
    if link != "softmax":
        raise ValueError(f"link: {link!r} given, 'softmax' or 'sigmoid' wanted")
    if wide.dim() == 1 or wide.shape[1] == 1:
        raise ValueError("model: one logit an example; say link='sigmoid' for two classes, or use score_outputs")
    return wide


def _log_odds(logits: Tensor) -> Tensor:
    """log p − log(1 − p) of every class, (example, class); for the top class 1 − p is summed over the others."""
    top = logits.argmax(1, keepdim=True)
    others = logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    log_p = logits.log_softmax(1)
    p = log_p.exp().scatter(1, top, 0.0)
    return (log_p - torch.log1p(-p)).scatter(1, top, logits.gather(1, top) - others)


def _check_target(target: Tensor | str | None, n: int) -> None:
    if isinstance(target, str) and target != "all":
        raise ValueError(f"target: {target!r} given, 'all', None or a tensor of classes wanted")
    if not isinstance(target, Tensor | str | None):
        raise TypeError(f"target: {type(target).__name__} given, a tensor ({n},) int64, 'all' or None wanted")
    if isinstance(target, Tensor) and (target.shape != (n,) or target.dtype not in INTEGERS):
        raise ValueError(f"target: shape {tuple(target.shape)} and {target.dtype} given, ({n},) int64 wanted")
