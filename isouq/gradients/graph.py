"""Finds every use of every parameter in autograd's graph, and which example each row of a matrix belongs to.

The graph is what differentiation sees, whatever the modules are called. One walk per batch finds each edge into a
parameter; an edge to an operation without a rule is refused with the parameter's name. So nothing is left out silently:
no custom module, no tied weight, no parameter used through `functional`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from isouq.gradients.factors import NoRule
from isouq.gradients.torch_contract import POINTWISE, RESHAPES, SAVED, Node, leaf_tensor, operation, output_shape, saved

# Operations whose output has the rows of those inputs that have as many.
_BY_ROW = frozenset("Split SplitWithSizes Slice Unbind NativeLayerNorm FusedRmsNorm Softmax LogSoftmax".split())
KEEPS_ROWS = POINTWISE | RESHAPES | _BY_ROW
DATA_INPUT = {"Mm": 0, "GroupedMm": 0, "Addmm": 1}  # at which input a matrix product takes the activation


class Graph:
    """The nodes below `output` in `order`, and their `consumers`. Holding the nodes keeps their identity stable."""

    def __init__(self, output: Tensor) -> None:
        self.consumers: dict[Node, list[tuple[Node, int]]] = {}  # node → (consumer, at which of its inputs)
        self.leaves: dict[Node, Tensor] = {}  # node that accumulates a gradient → the tensor that it belongs to
        nodes: dict[Node, None] = {}
        stack: list[Node] = [output.grad_fn]
        while stack:
            node = stack.pop()
            if node in nodes:
                continue
            nodes[node] = None
            if (tensor := leaf_tensor(node)) is not None:
                self.leaves[node] = tensor
            for slot, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    self.consumers.setdefault(child, []).append((node, slot))
                    stack.append(child)
        self.order = list(nodes)

    def roots(self, consumers: set[Node]) -> list[Node]:
        """Those of `consumers` with no other of them below: where a backward pass may stop."""
        above: set[Node] = set()  # nodes with a consumer strictly below
        stack = list(consumers)
        while stack:
            for parent, _ in self.consumers.get(stack.pop(), ()):
                if parent not in above:
                    above.add(parent)
                    stack.append(parent)
        return [node for node in consumers if node not in above]


Owner = Tensor | None | Literal[False]
"""The example of each row of a value: a tensor says it, None means equal consecutive blocks, False unknown."""


@dataclass
class Layout:
    """Which rows of a flattened (row, feature) matrix belong to which of `n_examples` examples.

    It is inferred from shapes, which is a good guess and no proof: `isolation` takes care of that.
    """

    n_examples: int
    _known: dict[Node, Owner] = field(default_factory=dict)

    def split(self, matrix: Tensor, owner: Tensor | None) -> Tensor:
        """(row, feature) → (example, token, feature): blocks where `owner` is None, else gathered and zero-padded."""
        if owner is None:
            return matrix.reshape(self.n_examples, -1, matrix.shape[-1])
        counts = torch.bincount(owner, minlength=self.n_examples).tolist()
        return pad_sequence(matrix[owner.argsort(stable=True)].split(counts), batch_first=True)

    def owner(self, node: Node, slot: int | None, n_rows: int) -> Tensor | None:
        """The example of each row of the node's input `slot`, or of its output if `slot` is None.

        Returns None for equal consecutive blocks. Raises NoRule.
        """
        source, number = (node, 0) if slot is None else node.next_functions[slot]  # no source: the raw input
        if self.n_examples == 1 or (source is None and n_rows % self.n_examples == 0):
            return None
        owner = False if source is None else self._trace(source, number)
        if owner is False or (owner is None and n_rows % self.n_examples):
            raise NoRule(f"meets {n_rows} rows in {node.name()} whose examples are not known")
        return owner

    def _trace(self, node: Node, number: int) -> Owner:
        if node not in self._known:
            self._known[node] = self._read(node, number)
        return self._known[node]

    def _read(self, node: Node, number: int) -> Owner:
        name, shape = operation(node), output_shape(node, number)
        before = tuple(saved(node, "self_sym_sizes")) if "self_sym_sizes" in SAVED.get(name, ()) else ()
        if any(len(sizes) > 2 and sizes[0] == self.n_examples for sizes in (shape, before)):
            return None
        if name == "Index":
            return self._through_index(node)
        inputs = node.next_functions if name in KEEPS_ROWS else ()
        if name in DATA_INPUT:
            inputs = node.next_functions[DATA_INPUT[name] :][:1]
        for place, (source, child) in enumerate(inputs):
            if source is None and place == 0 and shape and shape[0] % self.n_examples == 0:
                return None  # the raw input
            same_rows = source is not None and (name in RESHAPES or output_shape(source, child)[:1] == shape[:1])
            if same_rows and (owner := self._trace(source, child)) is not False:
                return owner
        return None if shape[:1] == (self.n_examples,) and name not in DATA_INPUT else False

    def _through_index(self, node: Node) -> Owner:
        index = [i for i in saved(node, "indices") if i is not None]
        source, number = node.next_functions[0]
        if len(index) != 1 or index[0].dim() != 1 or source is None:
            return False
        owner, n_rows = self._trace(source, number), output_shape(source, number)[0]
        if owner is None and n_rows % self.n_examples == 0:
            every = torch.arange(self.n_examples, device=index[0].device)
            owner = every.repeat_interleave(n_rows // self.n_examples)
        return owner[index[0]] if isinstance(owner, Tensor) else False
