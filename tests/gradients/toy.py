"""The small models that the traps are set in."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

N_WORDS = 11


def random_ids(n: int, length: int) -> torch.Tensor:
    return torch.randint(0, N_WORDS, (n, length))


class Toy(nn.Module):
    """Embedding, a causal mixing of tokens, a hidden layer, a head; the tests below replace one part of it."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(N_WORDS, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, N_WORDS, bias=False)

    def embedded(self, ids):
        return self.embed(ids)

    def body(self, x):
        return torch.tanh(self.hidden(x))

    def forward(self, ids):
        x = self.embedded(ids)
        return self.head((x + self.body(x)).cumsum(1))


class Checkpointed(Toy):
    def __init__(self, kind, *, repeats=1):
        super().__init__()
        self.kind, self.repeats = kind, repeats

    def body(self, x):
        for _ in range(self.repeats):
            if self.kind == "none":
                x = super().body(x)
            elif self.kind == "saved on the CPU":
                with torch.autograd.graph.save_on_cpu():
                    x = super().body(x)
            else:
                x = checkpoint(super().body, x, use_reentrant=self.kind == "reentrant")
        return x


class Broadcast(nn.Module):
    """Scalars, rows, columns and planes of parameters on a (example, 4, 3) value."""

    def __init__(self):
        super().__init__()
        shapes = ((), (3,), (4, 1), (4, 3), (1, 1, 3), (1, 4, 1))
        self.gains = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.shifts = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        for gain, shift in zip(self.gains, self.shifts, strict=True):
            x = gain * (1 + x.tanh()) + shift
        return self.head(x.mean(1))


class RawExperts(nn.Module):
    """A mixture as the very first layer: nothing in the graph says whose rows an expert was given."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        rows = x.flatten(0, 1)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            chosen = ((rows[:, 0] > 0) == bool(i)).nonzero()[:, 0]
            out = out.index_add(0, chosen, rows[chosen] @ expert)
        return self.head(out.view(x.shape).tanh().mean(1))
