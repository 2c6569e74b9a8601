"""Peak memory and exactness: each method in a process of its own, forked from one that has loaded the model.

A fork starts with the model in its memory and nothing else, so its peak, less that of a fork that does nothing, is
what the method needs above the model. `measure` starts that process; ``python -m isouq.studies.cost`` is it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch.overrides import TorchFunctionMode

from isouq.studies import assets
from isouq.studies.cost import cases
from isouq.studies.cost.cases import Case
from isouq.studies.cost.methods import A_FEW, CHECKED_FIRST, GRADIENT_EACH, METHODS

CLASSIFIER = "mlp"  # in place of a model's name: the small classifier of `cases.points`
FEW = 2  # examples of A_FEW, and those whose gradient is also taken in float64
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
LONGEST = 900  # seconds that a method may take


@dataclass(frozen=True)
class Memory:
    """`weights`: bytes of the model. `table`: a row per method, with the columns

    n_examples (how many at once), ran_out_at (the fewest examples that did not fit the memory, 0 where all fitted),
    peak_bytes (above the model; NaN where refused), relative_error (of ‖∇S‖², the largest, against float64; NaN where
    the method gives none) and refusal (its own words, or "").
    """

    weights: int
    table: pd.DataFrame


def measure(
    model: str, methods: Sequence[str], *, sizes: dict[str, int], memory_gb: float = 5.0, seed: int = 0
) -> Memory:
    """Measure `methods` on `model` (an asset, a folder, a Hub id, or "mlp") in processes of their own.

    `sizes`: n_examples and, for texts, n_tokens and n_answer. No process gets more than `memory_gb` (on Linux); of
    GRADIENT_EACH as many examples at once as fit, by halving. Raises RuntimeError when the model cannot be loaded.
    """
    command = [sys.executable, "-m", "isouq.studies.cost", "--model", model, "--method", *methods, "--json"]
    command += ["--memory-gb", str(memory_gb), "--seed", str(seed)]
    command += [word for name, size in sizes.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # give back at once
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"model {model}: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout)
    return Memory(found["weights"], pd.DataFrame(found["methods"]).set_index("method"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, as a table or as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m isouq.studies.cost", description="Peak memory, a process per method."
    )
    parser.add_argument("--model", required=True, help=f"an asset, a folder, a Hub id, or {CLASSIFIER}")
    parser.add_argument("--method", required=True, nargs="+", choices=METHODS, metavar="NAME")
    parser.add_argument("--n-examples", type=int, default=8)
    parser.add_argument("--n-tokens", type=int, default=64)
    parser.add_argument("--n-answer", type=int, default=6)
    parser.add_argument("--memory-gb", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork must not find a team of threads that it does not have
    for peer in ("opacus.grad_sample", "backpack"):
        with suppress(ImportError):
            __import__(peer)
    case = _case(options)
    weights = sum(p.numel() * p.element_size() for p in case.model.parameters())
    for p in case.model.parameters():
        p.data = p.data.clone()  # out of the mapped file: what is only mapped, a fork does not count as its own
    fork = partial(_in_fork, limit=int(options.memory_gb * 1e9), n_threads=n_threads)
    baseline = fork(lambda: None)["peak"]
    rows = [_method(name, case, fork) for name in options.method]
    truth = _reference(case, n_threads)
    for row in rows:
        peak, norms = row.pop("peak", None), row.pop("norms", None) or []
        row["peak_bytes"] = None if row["refusal"] else max(peak - baseline, 0)
        errors = [abs(norm / true - 1) for norm, true in zip(norms, truth, strict=False)]
        row["relative_error"] = max(errors, default=None)
    if options.json:
        print(json.dumps({"weights": weights, "methods": rows}))
    else:
        print(pd.DataFrame(rows).to_string(index=False))


def _case(options: argparse.Namespace) -> Case:
    if options.model == CLASSIFIER:
        return cases.points(n_examples=options.n_examples, seed=options.seed)
    sizes = {name: getattr(options, name) for name in ("n_examples", "n_tokens", "n_answer", "seed")}
    return cases.texts(*assets.load_causal_lm(options.model), **sizes)


def _method(name: str, case: Case, fork: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """One method's row; where a gradient per example does not fit, half as many examples, and so on."""
    n = min(FEW, len(case)) if name in A_FEW else len(case)
    ran_out_at = 0
    while True:
        found = fork(partial(_once, name, case.first(n)))
        ran_out = found.pop("out_of_memory", False)
        if name not in GRADIENT_EACH or not ran_out or n == 1:
            return {"method": name, "n_examples": n, "ran_out_at": ran_out_at, "refusal": "", **found}
        ran_out_at, n = n, n // 2


def _once(name: str, case: Case) -> list[float] | None:
    if name in CHECKED_FIRST:  # on a small batch: what the check of a new graph needs is not what a pass needs
        with METHODS[name](case.first(3)) as run:
            run()
    with METHODS[name](case) as run:
        found = run()
    return None if found is None else found.double().tolist()


def _in_fork(function: Callable[[], Any], *, limit: int, n_threads: int) -> dict[str, Any]:
    """What `function` gives and the peak of its process in bytes, or the words with which it fails."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        signal.alarm(LONGEST)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        torch.set_num_threads(n_threads)
        try:
            found = {"norms": function()}
        except Exception as error:  # whatever a library says is what is reported
            words = f"{type(error).__name__}: {error}".split("\n")[0]
            found = {"refusal": words, "out_of_memory": "allocate" in words or isinstance(error, MemoryError)}
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
        os.write(send, json.dumps(found).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as stream:
        said = stream.read()
    status = os.waitpid(child, 0)[1]
    if said:
        return json.loads(said)
    return {"refusal": f"the process ended with status {os.waitstatus_to_exitcode(status)}", "out_of_memory": True}


class _Double(TorchFunctionMode):
    """Casts to float32, which models put around their norms and softmaxes, go to float64 in here."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def _reference(case: Case, n_threads: int) -> list[float]:
    """‖∇S‖² of the first examples in float64, by the engine that goes one example at a time."""
    torch.set_num_threads(n_threads)
    model = case.model.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.first(FEW).inputs)
    with _Double():
        found = replace(case, model=model, inputs=inputs).scores(engine="autograd")
    return (found.log_epistemic - 2 * found.log_prob).exp().tolist()
