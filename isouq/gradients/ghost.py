"""The fast engine: exact squared gradient norms of a batch from one forward and one activation-gradient pass.

No parameter's gradient is formed. The batch's graph is read first (`graph`), every use of every parameter gets its
rule (`rules`), and hooks turn the activations and output gradients into squared norms as the backward pass meets
them. A use without a rule raises `NotCovered` before anything is returned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from isouq.gradients.common import Objective, SquaredNorms, differentiable
from isouq.gradients.factors import Factor, Outer, Picked, inner, pick, squared_norm
from isouq.gradients.graph import Graph, Layout, Node, NotCovered, operation, output_shape
from isouq.gradients.rules import RULES, Context, Rule, SharedGrams, Step, saved_matrix, step

Visit = Callable[["Use", list[Factor]], None]


@dataclass(frozen=True)
class Use:
    """One use of one parameter: `node` takes it at input `slot` after the parameter-only `steps`, outermost first."""

    node: Node
    slot: int
    steps: tuple[Step, ...]
    rule: Rule
    context: Context

    def factors(self, grads: tuple[Tensor, ...]) -> list[Factor]:
        """The parameter's gradient through this use, from the gradient at the node's output."""
        found = self.rule(self.node, self.slot, grads, self.context)
        out: list[Factor] = []
        for factor in found if isinstance(found, list) else [found]:
            for back in self.steps:
                factor = back(factor)
            out.append(factor)
        return out


@dataclass
class Plan:
    """All uses of the parameters in one batch's graph, and the backward pass that visits them."""

    values: Tensor
    names: dict[int, str]
    n_examples: int
    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    by_node: dict[Node, list[Use]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.graph = Graph(self.values)
        self.grams = SharedGrams()
        self.layout = Layout(self.n_examples)
        for leaf, variable in self.graph.leaves():
            if id(variable) not in self.names:
                raise NotCovered("a tensor outside the model's parameters", "takes part in the forward pass")
            self._follow(leaf, self.names[id(variable)], tuple(variable.shape), ())
        for x in (saved_matrix(use.node, use.slot) for uses in self.by_node.values() for use in uses):
            if x is not None:
                self.grams.announce(x)
        self.roots = self.graph.roots(set(self.by_node))

    def _follow(self, node: Node, name: str, shape: tuple[int, ...], steps: tuple[Step, ...]) -> None:
        for consumer, slot in self.graph.consumers[node]:
            back = step(consumer, slot, shape, self.n_examples)
            if back is not None:
                self._follow(consumer, name, output_shape(consumer), (back, *steps))
                continue
            rule = RULES.get(operation(consumer))
            if rule is None:
                raise NotCovered(name, f"is used by {consumer.name()}, which no rule covers")
            use = Use(consumer, slot, steps, rule, Context(name, shape, self.layout, self.grams))
            self.uses[name].append(use)
            self.by_node[consumer].append(use)

    def backward(self, seed: Tensor, visit: Visit, *, retain: bool) -> None:
        """One activation-gradient pass from `seed`; `visit` sees each use with its factors as the pass meets it."""
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

    def _meet(self, node: Node, visit: Visit) -> Callable[[tuple[Tensor, ...]], None]:
        def hook(grads: tuple[Tensor, ...]) -> None:
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
            square = squared_norm(factor) + sum(2 * inner(factor, other) for other in earlier)
            self.squares[name] = self.squares.get(name, 0) + square.cpu()
        if len(self.plan.uses[name]) > 1:
            earlier.extend(self._shrink(use, factor) for factor in factors)

    def _shrink(self, use: Use, factor: Factor) -> Factor:
        """Of a head's (token, vocab) gradient, keep only the columns that the tied embedding's tokens will ask for."""
        others = [u for u in self.plan.uses[use.context.parameter] if u is not use]
        if isinstance(factor, Outer) and len(others) == 1 and others[0].rule is RULES["Embedding"]:
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
    with differentiable(model, parameters) as tracked:
        values = objective(slice(0, n_examples))
        out = torch.zeros(*values.shape, len(parameters), dtype=torch.float64)
        if values.requires_grad:
            plan = Plan(values, tracked.names, n_examples)
            check_isolation(model, plan)
            for k in range(values.shape[1]):
                collector = Collector(plan)
                plan.backward(values[:, k].sum(), collector, retain=k + 1 < values.shape[1])
                for place, name in enumerate(parameters):
                    out[:, k, place] = collector.squares.get(name, 0)
        return SquaredNorms(values.detach().double().cpu(), out, tuple(parameters), "ghost", n_parameters)


_ISOLATED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def check_isolation(model: nn.Module, plan: Plan) -> None:
    """Once per model: the gradient of example 0 alone must leave every other example's rows exactly zero.

    This catches a layout that was read wrongly and models in which the examples of a batch meet.
    """
    if plan.n_examples == 1 or model in _ISOLATED:
        return

    def visit(use: Use, factors: list[Factor]) -> None:
        for factor in factors:
            sides = [v for v in vars(factor).values() if isinstance(v, Tensor) and v.is_floating_point()]
            if all(bool(side[1:].any()) for side in sides):
                why = "gathers gradients of one example from another's rows: the examples of a batch meet"
                raise NotCovered(use.context.parameter, why)

    plan.backward(plan.values[0, 0], visit, retain=True)
    _ISOLATED[model] = True
