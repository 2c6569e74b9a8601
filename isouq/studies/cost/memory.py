"""Peak memory and exactness: each method runs in a process of its own, forked from one that has loaded the model.

A fork starts with the model in its memory and nothing else, so its peak, less that of a fork that does nothing, is
what the method needs above the model. `measure` starts the process that loads and forks: this module as a script.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch.overrides import TorchFunctionMode

from isouq.studies import assets
from isouq.studies.cost import cases
from isouq.studies.cost.cases import Texts
from isouq.studies.cost.methods import A_FEW, GRADIENT_EACH, METHODS

FEW = 2  # examples of A_FEW, and those whose gradient is also taken in float64
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
LONGEST = 900  # seconds that a method may take


class Memory(NamedTuple):
    """What `measure` returns: `weights`, the bytes of the model, and `table`, a row per method with the columns

    n_examples (how many ran at once), peak_bytes (above the model; NaN where the method was refused), relative_error
    (the largest of ‖∇S‖² against float64; NaN where the method does not compute ‖∇S‖²) and refusal (the method's own
    error text, or "").
    """

    weights: int
    table: pd.DataFrame


def measure(
    model: str, methods: Sequence[str], *, sizes: dict[str, int], memory_gb: float = 5.0, seed: int = 0
) -> Memory:
    """Measure `methods` on `model` (an asset, a folder or a Hub id), each in its own process.

    Args:
        sizes: n_examples, n_tokens and n_answer.
        memory_gb: what a process may take (on Linux). A method of GRADIENT_EACH runs on as many examples as fit; their
            number is halved until they do.

    Raises:
        RuntimeError: the model cannot be loaded.
    """
    request = {"model": model, "methods": methods, "sizes": sizes, "memory_gb": memory_gb, "seed": seed}
    # With the low threshold, malloc returns freed memory to the system at once.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "isouq.studies.cost.memory"]
    run = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"model {model}: {run.stderr.strip().splitlines()[-1]}")
    reply = json.loads(run.stdout)
    return Memory(reply["weights"], pd.DataFrame(reply["rows"]).set_index("method"))


def _measure(
    model: str, methods: Sequence[str], *, sizes: dict[str, int], memory_gb: float, seed: int
) -> dict[str, Any]:
    """Load the model, fork once per method, and return the columns of `Memory` as JSON."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork must not look for a team of threads that it does not have
    with suppress(ImportError):
        import opacus.grad_sample  # noqa: F401  # before the forks, none of which then pays for it
    case = cases.texts(*assets.load_causal_lm(model), **sizes, seed=seed)
    weights = sum(p.numel() * p.element_size() for p in case.model.parameters())
    for p in case.model.parameters():
        p.data = p.data.clone()  # a fork does not count what is only mapped from the file as its own memory
    fork = partial(_in_fork, limit=int(memory_gb * 1e9), n_threads=n_threads)
    baseline = fork(lambda: None)["peak"]
    rows = [_row(name, case, fork) for name in methods]
    torch.set_num_threads(n_threads)
    truth = _reference(case)
    for row in rows:
        errors = [abs(norm / true - 1) for norm, true in zip(row.pop("norms") or [], truth, strict=False)]
        row["relative_error"] = max(errors, default=None)
        row["peak_bytes"] = None if row["refusal"] else max(row["peak"] - baseline, 0)
    return {"weights": weights, "rows": rows}


def _row(name: str, case: Texts, fork: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Run one method; where a gradient per example does not fit, on half as many examples, and so on."""
    n = min(FEW, len(case)) if name in A_FEW else len(case)
    reply = fork(partial(_norms, name, case.first(n)))
    while name in GRADIENT_EACH and reply["out_of_memory"] and n > 1:
        n //= 2
        reply = fork(partial(_norms, name, case.first(n)))
    return {"method": name, "n_examples": n, **reply}


def _norms(name: str, case: Texts) -> list[float] | None:
    with METHODS[name](case) as run:
        norms = run()
    return None if norms is None else norms.double().tolist()


def _in_fork(function: Callable[[], Any], *, limit: int, n_threads: int) -> dict[str, Any]:
    """Call `function` in a fork: what it returns (norms) or the words with which it fails (refusal), and the peak."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(function, send, limit, n_threads))
    child.start()
    send.close()
    reply: dict[str, Any] = {"norms": None, "refusal": "", "out_of_memory": False}
    try:
        return reply | receive.recv()
    except EOFError:
        child.join()
        return reply | {"refusal": f"the process ended with status {child.exitcode}", "out_of_memory": True}


def _report(function: Callable[[], Any], send: Connection, limit: int, n_threads: int) -> None:
    signal.alarm(LONGEST)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(n_threads)
    try:
        reply: dict[str, Any] = {"norms": function()}
    except Exception as error:  # whatever a library says is what is reported
        words = f"{type(error).__name__}: {error}".split("\n")[0]
        reply = {"refusal": words, "out_of_memory": "allocate" in words or isinstance(error, MemoryError)}
    send.send(reply | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT})


class _Double(TorchFunctionMode):
    """Turns casts to float32, which models put around their norms and softmaxes, into casts to float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def _reference(case: Texts) -> list[float]:
    """Return ‖∇S‖² of the first examples in float64, by the engine that takes one example at a time."""
    with _Double():
        scores = replace(case.first(FEW), model=case.model.double()).scores(engine="autograd")
    return (scores.log_epistemic - 2 * scores.log_prob).exp().tolist()


if __name__ == "__main__":
    print(json.dumps(_measure(**json.load(sys.stdin))))
