"""The plan of a batch's backward pass: a rule for every use of every parameter in autograd's graph.

No parameter's gradient is formed. Hooks turn activations and output gradients into factors as the backward pass reaches
them. A use without a rule raises `NotCovered` before anything is returned.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import CheckpointError

from isouq.gradients.autograd import Examples
from isouq.gradients.factors import Factor, NoRule
from isouq.gradients.graph import Graph, Layout
from isouq.gradients.model import Tracked, differentiable
from isouq.gradients.rules import Step, Use, step
from isouq.gradients.torch_contract import Grads, Node, NotCovered, is_custom, output_shape

Visit = Callable[[Use, list[Factor]], None]


class Plan:
    """All uses of the parameters in one batch's graph, and the backward pass that visits them."""

    def __init__(self, values: Tensor, tracked: Tracked, n_examples: int) -> None:
        self.values, self.tracked, self.n_examples = values, tracked, n_examples
        self.graph, self.layout = Graph(values), Layout(n_examples)
        self.uses: dict[str, list[Use]] = defaultdict(list)
        self.by_node: dict[Node, list[Use]] = defaultdict(list)
        for leaf, tensor in self.graph.leaves.items():
            name = self.tracked.names.get(id(tensor))
            if name is None:
                raise NotCovered("a tensor outside the model's parameters", "takes part in the forward pass")
            if name in self.tracked.parameters:
                self._follow(leaf, name, tuple(tensor.shape), ())
        self.custom = [node for node in self.graph.order if is_custom(node)]
        # A Python autograd.Function may use parameters that this graph does not show; `backward` checks that for all.
        self.watches_all = len(self.tracked.parameters) == len({*self.tracked.names.values()})
        for node in self.custom:
            if not self.watches_all or "checkpoint" in node.name().lower():
                raise NotCovered("an activation", f"goes through {node.name()}, which may use any parameter")
        self.roots = self.graph.roots(set(self.by_node))

    def _follow(self, node: Node, name: str, shape: tuple[int, ...], steps: tuple[Step, ...]) -> None:
        for consumer, slot in self.graph.consumers[node]:
            back = step(consumer, slot, shape, self.n_examples)
            if back is not None:
                self._follow(consumer, name, output_shape(consumer), (back, *steps))
                continue
            use = Use(name, consumer, slot, steps, shape, self.layout)
            if use.rule is None:
                raise NotCovered(name, f"is used by {consumer.name()}, which no rule covers")
            self.uses[name].append(use)
            self.by_node[consumer].append(use)

    def squares(self, seed: Tensor, *, retain: bool) -> Tensor:
        """‖∇‖² of each example's part of `seed`, a sum over examples, by parameter: (example, param) float64.

        ‖Σ_uses g_use‖² = Σ ‖g_use‖² + 2 Σ_{u<v} ⟨g_u, g_v⟩, added up as the backward pass reaches the uses.
        """
        nothing = self.values.new_zeros(self.n_examples, dtype=torch.float64)
        squares = dict.fromkeys(self.tracked.parameters, nothing)
        earlier: dict[str, list[Factor]] = defaultdict(list)

        def add(use: Use, factors: list[Factor]) -> None:
            name = use.parameter
            for factor in factors:
                square = factor.squared_norm() + sum(2 * factor.inner(other) for other in earlier[name])
                squares[name] = squares[name] + square.to(nothing.device)
            if len(self.uses[name]) > 1:
                earlier[name] += factors

        self.backward(seed, add, retain=retain)
        return torch.stack(list(squares.values()), 1).cpu()  # waits for a card once

    def backward(self, seed: Tensor, visit: Visit, *, retain: bool) -> None:
        """One activation-gradient pass from `seed`; calls `visit` with each use and its factors as the pass reaches it.

        Raises NotCovered if a custom function accumulates a parameter's gradient itself, or fails in the pass.
        """
        if not self.roots:  # none of the chosen parameters takes part: their gradient is zero
            return
        handles = [node.register_prehook(partial(self._meet, node, visit)) for node in self.by_node]
        try:
            edges = [GradientEdge(node, 0) for node in self.roots]
            grads = torch.autograd.grad(seed, edges, retain_graph=retain, allow_unused=True)
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
        for node, grad in zip(self.roots, grads, strict=True):  # the pass stopped before the hooks of these
            self._meet(node, visit, (grad,))

    @torch.no_grad()
    def _meet(self, node: Node, visit: Visit, grads: Grads) -> None:
        for use in self.by_node[node] if grads[0] is not None else ():
            try:
                visit(use, use.factors(grads))
            except NoRule as error:
                raise NotCovered(use.parameter, str(error)) from None


@contextmanager
def planned(model: nn.Module, examples: Examples, parameters: dict[str, nn.Parameter]) -> Iterator[Plan]:
    """A forward pass of the examples, and the plan of its backward pass over `parameters`. Raises NotCovered."""
    with differentiable(model, parameters) as tracked:
        try:
            yield Plan(examples.values(), tracked, examples.n)
        except CheckpointError as error:  # gradient checkpointing unpacks an activation once and no more
            why = "is computed anew in the backward pass (gradient checkpointing)"
            raise NotCovered("an activation", why) from error
