"""The fast engine: exact squared gradient norms of a batch from one forward and one activation-gradient pass."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import nn

from isouq.gradients import isolation
from isouq.gradients.autograd import Examples, SquaredNorms
from isouq.gradients.plan import planned


def squared_norms(
    model: nn.Module, examples: Examples, parameters: dict[str, nn.Parameter], *, apart: bool = False
) -> SquaredNorms:
    """‖∇θ objective[i, k]‖² for every example i and column k of one batch, over `parameters` (name → tensor).

    `apart`: the objective around the model treats examples apart. Where the batch is not known to keep them apart, they
    go one at a time, and the result's `engine` says so. Raises NotCovered, naming the parameter, where exactness cannot
    be vouched for.
    """
    with contextlib.suppress(isolation.Meeting):
        return _together(model, examples, parameters, apart)
    ones = [_together(model, one, parameters, apart) for one in examples.singly()]
    values, squares = torch.cat([o.objective for o in ones]), torch.cat([o.by_parameter for o in ones])
    return replace(ones[0], objective=values, by_parameter=squares, engine="ghost, one at a time")


def _together(model: nn.Module, examples: Examples, parameters: dict[str, nn.Parameter], apart: bool) -> SquaredNorms:
    with planned(model, examples, parameters) as plan:
        checks = isolation.examine(model, plan, examples, apart=apart)
        last = plan.values.shape[1] - 1
        columns = [plan.squares(plan.values[:, k].sum(), retain=k < last or bool(checks)) for k in range(last + 1)]
        for check in checks:
            check(columns[0])
        values = plan.values.detach().double().cpu()
    n_parameters = sum(p.numel() for p in parameters.values())
    return SquaredNorms(values, torch.stack(columns, 1), tuple(parameters), "ghost", n_parameters)
