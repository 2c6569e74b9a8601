"""The fast engine: exact squared gradient norms of a batch from one forward and one activation-gradient pass.

No parameter's gradient is formed. The batch's graph is read first (`graph`), every use of every parameter gets its
rule (`rules`), and hooks turn the activations and output gradients into squared norms as the backward pass meets
them. A use without a rule raises `NotCovered` before anything is returned.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import CheckpointError

from isouq.gradients import isolation
from isouq.gradients.common import Objective, SquaredNorms, Tracked, check_differentiable, differentiable
from isouq.gradients.factors import Factor, NoRule, Outer, Picked, inner, pick, squared_norm
from isouq.gradients.graph import Grads, Graph, Layout, Node, NotCovered, is_custom, operation, output_shape
from isouq.gradients.rules import INPUT_FIRST, RULES, Context, Rule, SharedGrams, Step, step

Visit = Callable[["Use", list[Factor]], None]


@dataclass(frozen=True)
class Use:
    """One use of one parameter: `node` takes it at input `slot` after the parameter-only `steps`, outermost first."""

    node: Node
    slot: int
    steps: tuple[Step, ...]
    rule: Rule
    context: Context

    def factors(self, grads: Grads) -> list[Factor]:
        """The parameter's gradient through this use, from the gradient at the node's output."""
        found = self.rule(self.node, self.slot, grads, self.context)
        out: list[Factor] = []
        for factor in found if isinstance(found, list) else [found]:
            for back in self.steps:
                try:
                    factor = back(factor)
                except NoRule as error:
                    raise self.context.refuse(str(error)) from None
            if len(next(v for v in vars(factor).values() if isinstance(v, Tensor))) != self.context.n_examples:
                raise self.context.refuse(f"meets a value in {self.node.name()} that is not laid out by example")
            out.append(factor)
        return out


@dataclass
class Plan:
    """All uses of the parameters in one batch's graph, and the backward pass that visits them."""

    values: Tensor
    tracked: Tracked
    n_examples: int
    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    by_node: dict[Node, list[Use]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.graph = Graph(self.values)
        self.grams = SharedGrams()
        self.layout = Layout(self.n_examples)
        for leaf, variable in self.graph.leaves():
            name = self.tracked.names.get(id(variable))
            if name is None:
                raise NotCovered("a tensor outside the model's parameters", "takes part in the forward pass")
            if name in self.tracked.parameters:
                self._follow(leaf, name, tuple(variable.shape), ())
        self.custom = [node for node in self.graph.order if is_custom(node)]
        self._check_custom_functions()
        self.grams.announce((use.node, use.slot) for uses in self.by_node.values() for use in uses)
        self.roots = self.graph.roots(set(self.by_node))

    def _follow(self, node: Node, name: str, shape: tuple[int, ...], steps: tuple[Step, ...]) -> None:
        for consumer, slot in self.graph.consumers[node]:
            back = step(consumer, slot, shape, self.n_examples)
            if back is not None:
                self._follow(consumer, name, output_shape(consumer), (back, *steps))
                continue
            rule = RULES.get(operation(consumer))
            if rule is None or (slot == 0 and operation(consumer) in INPUT_FIRST):
                raise NotCovered(name, f"is used by {consumer.name()}, which no rule covers")
            use = Use(consumer, slot, steps, rule, Context(name, shape, self.layout, self.grams))
            self.uses[name].append(use)
            self.by_node[consumer].append(use)

    def _check_custom_functions(self) -> None:
        """A Python autograd.Function may reach parameters that this graph lacks: all have to be watched for that."""
        for node in self.custom:
            if "checkpoint" in node.name().lower() or len(self.tracked.parameters) < len(
                {*self.tracked.names.values()}
            ):
                raise NotCovered("an activation", f"goes through {node.name()}, which may use any parameter")

    def squares(self, seed: Tensor, *, retain: bool) -> Tensor:
        """‖∇‖² of each example's part of `seed`, a sum over examples, by parameter: (example, param) float64."""
        collector = Collector(self)
        self.backward(seed, collector, retain=retain)
        nothing = torch.zeros(self.n_examples, dtype=torch.float64)
        return torch.stack([collector.squares.get(name, nothing) for name in self.tracked.parameters], 1)

    def backward(self, seed: Tensor, visit: Visit, *, retain: bool) -> None:
        """One activation-gradient pass from `seed`; `visit` sees each use with its factors as the pass meets it.

        Raises NotCovered where a custom function gathers a parameter's gradient by itself, or cannot be passed.
        """
        if not self.roots:  # none of the chosen parameters takes part: their gradient is zero
            return
        self.grams.start()
        handles = [node.register_prehook(self._meet(node, visit)) for node in self.by_node]
        try:
            edges = [GradientEdge(node, 0) for node in self.roots]
            found = torch.autograd.grad(seed, edges, retain_graph=retain, allow_unused=True)
        except RuntimeError as error:
            if self.custom:
                raise NotCovered("an activation", f"cannot pass {self.custom[0].name()} ({error})") from error
            raise
        finally:
            for handle in handles:
                handle.remove()
        for tensor in self.tracked.tensors if self.custom else ():
            if tensor.grad is not None:
                name = self.tracked.names[id(tensor)]
                raise NotCovered(name, f"gathers a gradient inside {self.custom[0].name()}")
        for node, grad in zip(self.roots, found, strict=True):  # the pass stops here, so their hooks did not run
            self._meet(node, visit)((grad,))

    def _meet(self, node: Node, visit: Visit) -> Callable[[Grads], None]:
        def hook(grads: Grads) -> None:
            if grads[0] is not None:
                with torch.no_grad():
                    for use in self.by_node[node]:
                        visit(use, use.factors(grads))

        return hook


@dataclass
class Collector:
    """Adds up ‖Σ_uses g_use‖² = Σ ‖g_use‖² + 2 Σ_{u<v} ⟨g_u, g_v⟩ for each parameter, (example,) float64."""

    plan: Plan
    squares: dict[str, Tensor] = field(default_factory=dict)
    pending: dict[str, list[Factor]] = field(default_factory=lambda: defaultdict(list))

    def __call__(self, use: Use, factors: list[Factor]) -> None:
        """Take the factors of one use."""
        name = use.context.parameter
        earlier = self.pending[name]
        for factor in factors:
            try:
                square = squared_norm(factor) + sum(2 * inner(factor, other) for other in earlier)
            except NoRule as error:
                raise use.context.refuse(str(error)) from None
            self.squares[name] = self.squares.get(name, 0) + square.cpu()
        if len(self.plan.uses[name]) > 1:
            earlier.extend(self._shrink(use, factor) for factor in factors)

    def _shrink(self, use: Use, factor: Factor) -> Factor:
        """Of a head's (token, vocab) gradient, keep only the columns that the tied embedding's tokens will ask for."""
        others = [u for u in self.plan.uses[use.context.parameter] if u is not use]
        look_up = len(others) == 1 and others[0].rule is RULES["Embedding"] and not others[0].steps
        if isinstance(factor, Outer) and look_up:
            index = others[0].node._saved_indices.reshape(self.plan.n_examples, -1)
            return Picked(pick(factor, index), factor.right)
        return factor


def squared_norms(
    model: nn.Module,
    objective: Objective,
    n_examples: int,
    *,
    parameters: dict[str, nn.Parameter],
    apart: bool = False,
) -> SquaredNorms:
    """‖∇θ objective[i, k]‖² for every example i and column k of one batch, over `parameters` (name → tensor).

    `apart`: the objective around the model treats examples apart. Where the batch is not known to keep them apart, they
    go one at a time, and the result's `engine` says so. Raises NotCovered, naming the parameter, where exactness cannot
    be vouched for.
    """
    with contextlib.suppress(isolation.Meeting):
        return _together(model, objective, n_examples, parameters, apart)
    ones = [_together(model, one(objective, i), 1, parameters, apart) for i in range(n_examples)]
    values, squares = torch.cat([o.objective for o in ones]), torch.cat([o.by_parameter for o in ones])
    return replace(ones[0], objective=values, by_parameter=squares, engine="ghost, one at a time")


def one(objective: Objective, i: int) -> Objective:
    """The objective of example i by itself."""
    return lambda _: objective(slice(i, i + 1))


def _together(
    model: nn.Module, objective: Objective, n_examples: int, parameters: dict[str, nn.Parameter], apart: bool
) -> SquaredNorms:
    n_parameters = sum(p.numel() for p in parameters.values())
    with differentiable(model, parameters) as tracked, refusing_recomputation():
        values = objective(slice(0, n_examples))
        check_differentiable(values)
        plan = Plan(values, tracked, n_examples)
        doubt = isolation.examine(model, plan, objective, apart=apart)
        last = values.shape[1] - 1
        columns = [plan.squares(values[:, k].sum(), retain=k < last or doubt.any) for k in range(last + 1)]
        isolation.check(plan, objective, columns[0], doubt)
    return SquaredNorms(
        values.detach().double().cpu(), torch.stack(columns, 1), tuple(parameters), "ghost", n_parameters
    )


@contextmanager
def refusing_recomputation() -> Iterator[None]:
    """Gradient checkpointing unpacks an activation once and no more: said as a refusal."""
    try:
        yield
    except CheckpointError as error:
        raise NotCovered("an activation", "is computed anew in the backward pass (gradient checkpointing)") from error
