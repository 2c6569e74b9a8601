"""Reading autograd's graph: every use of every parameter, and which example each row of a matrix belongs to.

The graph is what differentiation sees, whatever the modules are called. Walking it once per batch finds each edge
into a parameter; an edge that leads to an operation without a rule is refused by the parameter's name. So nothing
can be left out silently: no custom module, no tied weight, no parameter used through `functional`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

Node = Any  # torch.autograd.graph.Node; its saved tensors are attributes that depend on the operation
Grads = tuple[Any, ...]  # the gradients at a node's outputs; None where nothing depends on one

POINTWISE = frozenset(
    "Mul Add Sub Div Neg Exp Expm1 Log Log1P Pow Sqrt Rsqrt Relu Elu Gelu Silu Tanh Sigmoid LogSigmoid Softplus"
    " LeakyRelu Hardtanh ClampBackward1 Threshold Where MaskedFill NativeDropout ToCopy Clone Alias".split()
)
ELEMENTWISE = POINTWISE | frozenset(
    "Split SplitWithSizes Slice Unbind NativeLayerNorm FusedRmsNorm Mean Softmax LogSoftmax".split()
)
RESHAPES = frozenset("View UnsafeView ReshapeAlias Unsqueeze Squeeze".split())


class NotCovered(ValueError):
    """The ghost engine has no rule for a use of a parameter; the message names both and the way out."""

    def __init__(self, parameter: str, why: str) -> None:
        super().__init__(f"{parameter} {why}; use engine='autograd' (engine='auto' does so by itself)")
        self.parameter = parameter


def operation(node: Node) -> str:
    """The operation a node undoes: MmBackward0 → "Mm"."""
    return _undone(node.name())


@cache
def _undone(name: str) -> str:
    return name.rsplit("::", 1)[-1].removesuffix("0").removesuffix("Backward")


def is_custom(node: Node) -> bool:
    """Whether a Python autograd.Function stands at the node: it may hold parameters that the graph does not show.

    Operators registered with torch.library name all their inputs, so theirs are not meant; nor are functions that
    declare themselves `parameter_free`.
    """
    name: str = node.name()
    innocent = name.startswith("GeneratedBackwardFor_") or declares(node, "parameter_free")
    return isinstance(node, BackwardCFunction) and not innocent


def declares(node: Node, name: str) -> bool:
    """Whether the Python autograd.Function at the node has the class attribute `name`, set to True."""
    return bool(getattr(getattr(node, "_forward_cls", None), name, False))


def signed(number: int) -> int:
    """Negative numbers are stored unsigned."""
    return number - 2**64 if number >= 2**63 else number


def output_shape(node: Node, number: int = 0) -> tuple[int, ...]:
    """The shape of the value that the node's operation gave."""
    return tuple(node._input_metadata[number].shape)


@dataclass
class Graph:
    """The nodes below `output`, with their consumers. Holding the nodes keeps their identity stable."""

    output: Tensor
    consumers: dict[Node, list[tuple[Node, int]]] = field(default_factory=dict)
    order: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        seen: set[Node] = set()
        stack = [self.output.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            self.order.append(node)
            for slot, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    self.consumers.setdefault(child, []).append((node, slot))
                    stack.append(child)

    def leaves(self) -> Iterable[tuple[Node, Tensor]]:
        """(node, parameter) of every tensor that gathers a gradient."""
        for node in self.order:
            if node.name().endswith("AccumulateGrad"):
                yield node, node.variable

    def roots(self, consumers: set[Node]) -> list[Node]:
        """Those of `consumers` that have none of the others below them: where a backward pass may stop."""
        above: set[Node] = set()  # nodes with a consumer strictly below
        stack = list(consumers)
        while stack:
            for parent, _ in self.consumers.get(stack.pop(), ()):
                if parent not in above:
                    above.add(parent)
                    stack.append(parent)
        return [node for node in consumers if node not in above]


@dataclass
class Layout:
    """Which rows of a flattened (row, feature) matrix belong to which of `n_examples` examples.

    Read off shapes, so a good guess and no proof: `isolation` asks for that.
    """

    n_examples: int
    _known: dict[Node, Tensor | None] = field(default_factory=dict)

    def split(self, matrix: Tensor, owner: Tensor | None) -> Tensor:
        """(row, feature) → (example, token, feature): blocks where `owner` is None, else gathered and zero-padded."""
        if owner is None:
            return matrix.reshape(self.n_examples, -1, matrix.shape[-1])
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=self.n_examples)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(owner), device=owner.device) - starts.repeat_interleave(counts)
        padded = matrix.new_zeros(self.n_examples, int(counts.max()), matrix.shape[-1])
        padded[owner[order], place] = matrix[order]
        return padded

    def owner(self, node: Node, slot: int, matrix: Tensor, parameter: str) -> Tensor | None:
        """The example of each row of `matrix`, the value at input `slot` of `node`; None for equal consecutive blocks.

        Raises NotCovered when it cannot be read off the graph.
        """
        n_rows = matrix.shape[0]
        if self.n_examples == 1:
            return None
        source, number = node.next_functions[slot]
        found = None if source is None else self._trace(source, number)  # None: the raw input
        return self._checked(found, n_rows, node, parameter)

    def owner_of_output(self, node: Node, n_rows: int, parameter: str) -> Tensor | None:
        """The same for the rows of the node's own output."""
        return None if self.n_examples == 1 else self._checked(self._trace(node, 0), n_rows, node, parameter)

    def _checked(self, found: Any, n_rows: int, node: Node, parameter: str) -> Tensor | None:
        if found is False or (found is None and n_rows % self.n_examples):
            raise NotCovered(parameter, f"meets {n_rows} rows in {node.name()} whose examples are not known")
        return found

    def _trace(self, node: Node, number: int) -> Any:
        """None: blocks; a tensor: the example of each row; False: unknown."""
        if node not in self._known:
            self._known[node] = self._read(node, number)
        return self._known[node]

    def _read(self, node: Node, number: int) -> Any:
        shape, name = output_shape(node, number), operation(node)
        if len(shape) > 2 and shape[0] == self.n_examples:
            return None
        if name in RESHAPES:
            sizes = tuple(getattr(node, "_saved_self_sym_sizes", ()))
            if len(sizes) > 2 and sizes[0] == self.n_examples:
                return None
        if name == "Index":
            return self._through_index(node)
        if name in ("Mm", "GroupedMm"):
            return self._child(node, 0, shape)
        if name == "Addmm":
            return self._child(node, 1, shape)
        if name in ELEMENTWISE or name in RESHAPES:
            for slot in range(len(node.next_functions)):
                found = self._child(node, slot, shape)
                if found is not False:
                    return found
        return None if shape and shape[0] == self.n_examples else False

    def _child(self, node: Node, slot: int, shape: tuple[int, ...]) -> Any:
        source, number = node.next_functions[slot]
        if source is None:
            return None if slot == 0 and shape[0] % self.n_examples == 0 else False
        if output_shape(source, number)[:1] != shape[:1] and operation(node) not in RESHAPES:
            return False
        return self._trace(source, number)

    def _through_index(self, node: Node) -> Any:
        index = [i for i in node._saved_indices if i is not None]
        source, number = node.next_functions[0]
        if len(index) != 1 or index[0].dim() != 1 or source is None:
            return False
        found, n_rows = self._trace(source, number), output_shape(source, number)[0]
        if found is False or (found is None and n_rows % self.n_examples):
            return False
        if found is None:
            every = torch.arange(self.n_examples, device=index[0].device)
            found = every.repeat_interleave(n_rows // self.n_examples)
        return found[index[0]]
