"""The fast engine: exact squared gradient norms of a batch from one forward and one activation-gradient pass.

No parameter's gradient is formed. The batch's graph is read first (`graph`), every use of every parameter gets its
rule (`rules`), and hooks turn the activations and output gradients into squared norms as the backward pass meets
them. A use without a rule raises `NotCovered` before anything is returned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import CheckpointError

from isouq.gradients.common import Objective, SquaredNorms, Tracked, check_differentiable, differentiable
from isouq.gradients.factors import Factor, NoRule, Outer, Picked, inner, pick, squared_norm
from isouq.gradients.graph import Grads, Graph, Layout, Node, NotCovered, is_custom, operation, output_shape, reorders
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
        self.layout.assumed = self.n_examples > 1 and any(reorders(node, self.n_examples) for node in self.graph.order)
        for leaf, variable in self.graph.leaves():
            name = self.tracked.names.get(id(variable))
            if name is None:
                raise NotCovered("a tensor outside the model's parameters", "takes part in the forward pass")
            if name in self.tracked.parameters:
                self._follow(leaf, name, tuple(variable.shape), ())
        self._check_custom_functions()
        self.grams.announce((use.node, use.slot) for uses in self.by_node.values() for use in uses)
        self.roots = self.graph.roots(set(self.by_node))

    @property
    def unsure(self) -> bool:
        """Whether data could lay out the next batch otherwise: an order was taken, and the graph does not prove it."""
        return self.layout.assumed and not self._separates

    @cached_property
    def _separates(self) -> bool:
        return self.graph.separates(self.n_examples)

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
        """A Python autograd.Function may run a backward pass of its own, for parameters that this graph lacks."""
        absent = [name for name in self.tracked.parameters if name not in self.uses]
        for node in filter(is_custom, self.graph.order):
            if absent or "checkpoint" in node.name().lower():
                raise NotCovered(absent[0] if absent else "an activation", f"may be used inside {node.name()}")

    def squares(self, k: int, *, weights: Tensor | None = None, retain: bool) -> Tensor:
        """‖∇ objective[i, k]‖² by parameter, (example, param) float64; the objectives times `weights` (example,)."""
        collector, column = Collector(self), self.values[:, k]
        seed = column.sum() if weights is None else column @ weights.to(column)
        self.backward(seed, collector, retain=retain)
        nothing = torch.zeros(self.n_examples, dtype=torch.float64)
        return torch.stack([collector.squares.get(name, nothing) for name in self.tracked.parameters], 1)

    def backward(self, seed: Tensor, visit: Visit, *, retain: bool) -> None:
        """One activation-gradient pass from `seed`; `visit` sees each use with its factors as the pass meets it."""
        if not self.roots:  # none of the chosen parameters takes part: their gradient is zero
            return
        self.grams.start()
        handles = [node.register_prehook(self._meet(node, visit)) for node in self.by_node]
        try:
            edges = [GradientEdge(node, 0) for node in self.roots]
            found = torch.autograd.grad(seed, edges, retain_graph=retain, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
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
    model: nn.Module, objective: Objective, n_examples: int, *, parameters: dict[str, nn.Parameter]
) -> SquaredNorms:
    """‖∇θ objective[i, k]‖² for every example i and column k of one batch, over `parameters` (name → tensor).

    Raises NotCovered, naming the parameter, where exactness cannot be vouched for.
    """
    n_parameters = sum(p.numel() for p in parameters.values())
    with differentiable(model, parameters) as tracked, refusing_recomputation():
        values = objective(slice(0, n_examples))
        check_differentiable(values)
        plan = Plan(values, tracked, n_examples)
        last = values.shape[1] - 1
        new = not isolated(model, plan)
        columns = [plan.squares(k, retain=k < last or new) for k in range(last + 1)]
        check_isolation(model, plan, objective, columns[0], alive=new)
        by_parameter = torch.stack(columns, 1)
    return SquaredNorms(values.detach().double().cpu(), by_parameter, tuple(parameters), "ghost", n_parameters)


@contextmanager
def refusing_recomputation() -> Iterator[None]:
    """Gradient checkpointing unpacks an activation once and no more: said as a refusal."""
    try:
        yield
    except CheckpointError as error:
        raise NotCovered("an activation", "is computed anew in the backward pass (gradient checkpointing)") from error


# ── Do the examples of a batch stay apart? Layouts are read off shapes, so each kind of graph is tried first. ────────

_Ways = set[tuple[str, frozenset[tuple[str, int]]]]  # each parameter with the operations through which it is used
_TRIED: WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], list[_Ways]]] = WeakKeyDictionary()


def _ways(plan: Plan) -> _Ways:
    return {
        (name, frozenset((operation(use.node), len(use.steps)) for use in uses)) for name, uses in plan.uses.items()
    }


def _modes(model: nn.Module) -> tuple[bool, ...]:
    return tuple(module.training for module in model.modules())


def isolated(model: nn.Module, plan: Plan) -> bool:
    """Whether `check_isolation` has nothing left to do."""
    if plan.n_examples == 1:
        return True
    tried, ways = _TRIED.get(model, {}).get(_modes(model), []), _ways(plan)
    return not plan.unsure and all(sum(way in known for known in tried) >= 3 for way in ways)


def check_isolation(
    model: nn.Module, plan: Plan, objective: Objective, squares: Tensor | None = None, *, alive: bool
) -> None:
    """Refuse a layout that was read wrongly, and models in which the examples of a batch meet.

    With weights w_i on the objectives each example's squared norm must grow by exactly w_i², or another's gradient is
    in it; and the last examples alone must have the values that they have in the batch. What was found of one batch
    holds for the next with the same ways of using the parameters if the first two examples by themselves have the same
    norms (an axis of tokens as long as the batch may have been taken for it). Every batch is tried where nothing tells
    whose the rows of a value are and the graph does not prove them apart (`Plan.unsure`). `squares` are those of column
    0, where they are known. The plan's graph is used up; `alive` says whether it is still there.
    """
    if isolated(model, plan):
        return
    if not alive:  # only the backward pass told that the plan was unsure
        plan = Plan(objective(slice(0, plan.n_examples)), plan.tracked, plan.n_examples)
    n, slack = plan.n_examples, next(s for t, s in _SLACK.items() if any(p.dtype == t for p in model.parameters()))
    squares = plan.squares(0, retain=True) if squares is None else squares
    bases = [slack.radix**k for k in range(n) if slack.radix**k < n]
    for base in bases:  # powers of two scale exactly, within the type's range
        weights = 2.0 ** (torch.arange(n) // base % slack.radix - slack.radix // 2)
        scaled = plan.squares(0, weights=weights, retain=base < bases[-1]) / weights.double().square()[:, None]
        _check_equal(plan, scaled, squares, slack.scaled)
    with torch.no_grad():
        last = range(max(0, n - 4), n)
        alone, together = torch.cat([objective(slice(i, i + 1)) for i in last]), plan.values[last.start :]
    if not bool(((alone - together).abs() <= slack.value * (1 + together.abs())).all()):
        raise NotCovered("the output", "for an example changes with the others of its batch, or with its padding")
    if n > 2:
        pair = Plan(objective(slice(0, 2)), plan.tracked, 2)
        if not _ways(pair) <= _ways(plan):
            raise NotCovered("the batch's size", "changes the operations through which parameters are used")
        _check_equal(plan, pair.squares(0, retain=False), squares[:2], slack.norm)
    if not plan.unsure and len(plan.values[:, 0].unique()) > 1:  # equal examples prove nothing
        times = 3 if n > 2 else 1
        _TRIED.setdefault(model, {}).setdefault(_modes(model), []).extend([_ways(plan)] * times)


@dataclass(frozen=True)
class _Slack:
    """By how much, relatively, rounding may change a norm scaled by a power of two, a value, and a norm."""

    scaled: float
    value: float
    norm: float
    radix: int = 16  # how many weights the type's range allows


_SLACK = {  # the narrowest type of the parameters decides
    torch.float16: _Slack(0.2, 0.1, 0.2, radix=4),
    torch.bfloat16: _Slack(1e-5, 0.1, 0.2),
    torch.float32: _Slack(1e-5, 1e-4, 1e-3),
    torch.float64: _Slack(1e-9, 1e-6, 1e-4),
}


def _check_equal(plan: Plan, found: Tensor, squares: Tensor, slack: float) -> None:
    wrong = (found - squares).abs() > slack * (squares + 1e-4 * squares.sum(1, keepdim=True))
    if bool(wrong.any()):
        name = list(plan.tracked.parameters)[int(wrong.any(0).nonzero()[0])]
        raise NotCovered(name, "gathers gradients of one example in another's: the examples of a batch meet")
