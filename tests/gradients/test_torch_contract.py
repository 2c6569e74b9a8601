"""What is relied on of torch, operation by operation: `make test-torch VERSION=...` asks another version the same."""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isouq.gradients import NotCovered, torch_contract
from isouq.gradients.torch_contract import SAVED, operation, output_shape, saved, saved_axes

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
W, B, GAIN = (torch.randn(shape).requires_grad_() for shape in ((6, 5), (5,), (6,)))
IDS, PLACES = torch.tensor([[1, 0, 3]]), torch.zeros(4, 1, dtype=torch.int64)
IMAGE, KERNEL = torch.randn(2, 4, 5, 5).requires_grad_(), torch.randn(6, 2, 3, 3).requires_grad_()
STACK, ENDS = torch.randn(2, 8, 8).requires_grad_(), torch.tensor([3, 8], dtype=torch.int32)
ROWS = torch.randn(8, 8).requires_grad_()
NORM = nn.BatchNorm1d(6).eval()
NORM.running_mean.normal_()
CHANNELS = nn.BatchNorm2d(4).eval()
CHANNELS.running_mean.normal_()


def rstd(x, axes, eps=1e-5):
    return (x.var(axes, unbiased=False, keepdim=True) + eps).rsqrt()


def grouped(x):
    return x.reshape(2, 2, -1)


CASES = {  # operation → the value, and what its node keeps under each name
    "Mm": (lambda: X @ W, {"self": X}),
    "Addmm": (lambda: torch.addmm(B, X, W, beta=2, alpha=3), {"mat1": X, "alpha": 3, "beta": 2}),
    "GroupedMm": (lambda: F.grouped_mm(ROWS, STACK, offs=ENDS), {"self": ROWS, "offs": ENDS}),
    "Embedding": (
        lambda: F.embedding(IDS, X, padding_idx=1),
        {"indices": IDS, "padding_idx": 1, "scale_grad_by_freq": False},
    ),
    "Mul": (lambda: X * GAIN, {"self": X, "other": GAIN}),
    "Add": (lambda: torch.add(X, GAIN, alpha=3), {"alpha": 3}),
    "NativeLayerNorm": (
        lambda: F.layer_norm(X, (6,), GAIN, GAIN),
        {"input": X, "result1": X.mean(1, keepdim=True), "result2": rstd(X, 1)},
    ),
    "FusedRmsNorm": (
        lambda: F.rms_norm(X.cuda(), (6,), GAIN.cuda(), 1e-5),
        {"input": X, "result1": (X.square().mean(1, keepdim=True) + 1e-5).rsqrt()},
    ),
    "NativeBatchNorm": (
        lambda: NORM(X),
        {
            "input": X,
            "running_mean": NORM.running_mean,
            "running_var": NORM.running_var,
            "eps": NORM.eps,
            "training": False,
        },
    ),
    "CudnnBatchNorm": (
        lambda: CHANNELS.cuda()(IMAGE.cuda()),
        {
            "input": IMAGE,
            "running_mean": CHANNELS.running_mean,
            "running_var": CHANNELS.running_var,
            "epsilon": CHANNELS.eps,
            "training": False,
        },
    ),
    "NativeGroupNorm": (
        lambda: F.group_norm(IMAGE, 2, torch.ones(4)),
        {"input": IMAGE, "result1": grouped(IMAGE).mean(2), "result2": rstd(grouped(IMAGE), 2)[..., 0], "group": 2},
    ),
    "Convolution": (
        lambda: F.conv2d(IMAGE, KERNEL, None, (1, 2), (2, 1), (1, 1), 2),
        {"input": IMAGE, "stride": (1, 2), "padding": (2, 1), "dilation": (1, 1), "transposed": False, "groups": 2},
    ),
    "Transpose": (lambda: X.transpose(0, -1), {"dim0": 0, "dim1": -1}),
    "Permute": (lambda: X.permute(1, 0), {"dims": (1, 0)}),
    "Select": (lambda: X.select(-1, -1), {"dim": -1, "index": -1}),
    "Index": (lambda: X[:, PLACES[:, 0]], {"indices": (None, PLACES[:, 0])}),
    "View": (lambda: X.view(8, 3), {"self_sym_sizes": (4, 6)}),
    "UnsafeView": (lambda: torch.ops.aten._unsafe_view(X, (8, 3)), {"self_sym_sizes": (4, 6)}),
    "ReshapeAlias": (lambda: torch.ops.aten._reshape_alias(X, (8, 3), (3, 1)), {"self_sym_sizes": (4, 6)}),
    "Squeeze": (lambda: X[None].squeeze(), {"self_sym_sizes": (1, 4, 6)}),
}


def same(kept, wanted) -> bool:
    if isinstance(wanted, torch.Tensor):
        return kept.shape == wanted.shape and torch.allclose(kept.cpu(), wanted, rtol=1e-5, atol=1e-6)
    if isinstance(wanted, tuple):
        return len(kept) == len(wanted) and all(map(same, kept, wanted))
    return kept is None if wanted is None else kept == wanted


@pytest.mark.parametrize("name", SAVED)
def test_an_operation_keeps_what_is_read_of_it(name):
    if name in ("FusedRmsNorm", "CudnnBatchNorm") and not torch.cuda.is_available():
        pytest.skip("torch has this operation on a card only")
    value, wanted = CASES[name]
    out = value()
    assert operation(out.grad_fn) == name
    assert output_shape(out.grad_fn) == tuple(out.shape)
    assert tuple(wanted) == SAVED[name]
    for attribute, kept in wanted.items():
        assert same(saved(out.grad_fn, attribute), kept), f"{name}: {attribute} is {saved(out.grad_fn, attribute)}"


def test_an_embedding_without_padding_says_minus_one():
    assert saved(F.embedding(IDS, X).grad_fn, "padding_idx") == -1


def test_axes_are_counted_from_the_first():
    assert saved_axes(X.transpose(0, -1).grad_fn, 2, "dim0", "dim1") == {0, 1}


BY_NAME = {  # operations of which only the name is relied on
    "Unsqueeze": lambda: X.unsqueeze(0),
    "T": lambda: X.t(),
    "Expand": lambda: X.expand(2, 4, 6),
    "Split": lambda: X.split(2)[0],
    "SplitWithSizes": lambda: X.split([1, 3])[0],
    "Slice": lambda: X[1:],
    "Unbind": lambda: X.unbind()[0],
    "Softmax": lambda: X.softmax(1),
    "LogSoftmax": lambda: X.log_softmax(1),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_an_operation_that_is_known_by_its_name_alone_has_it(name):
    assert operation(BY_NAME[name]().grad_fn) == name


def test_every_operation_and_attribute_that_is_read_is_compared_with_torch_here():
    words = {name: set() for name in ("graph", "rules")}
    for name in words:
        for node in ast.walk(ast.parse(Path(torch_contract.__file__).with_name(f"{name}.py").read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words[name] |= set(node.value.split()) if re.fullmatch(r"[\w ]+", node.value) else set()
    operations = {word for word in words["graph"] | words["rules"] if re.fullmatch(r"[A-Z]\w*", word)}
    assert operations <= {*SAVED, *BY_NAME, *torch_contract.POINTWISE}
    assert {attribute for kept in SAVED.values() for attribute in kept} <= words["graph"] | words["rules"]


@pytest.mark.parametrize("name", sorted(torch_contract.POINTWISE))
def test_a_pointwise_operation_is_pointwise(name):
    """Each number of the output depends on its own place: the Jacobian of (6,) → (6,) is diagonal."""
    x = torch.rand(6, generator=torch.Generator().manual_seed(1)) + 0.1
    functions = {
        "Mul": lambda x: x * x,
        "Add": lambda x: x + x,
        "Sub": lambda x: x - 2 * x,
        "Div": lambda x: x / x.exp(),
        "Log1P": torch.log1p,
        "Pow": lambda x: x.pow(3),
        "Elu": F.elu,
        "Gelu": F.gelu,
        "Silu": F.silu,
        "LogSigmoid": F.logsigmoid,
        "Softplus": F.softplus,
        "LeakyRelu": F.leaky_relu,
        "Hardtanh": F.hardtanh,
        "ClampBackward1": lambda x: x.clamp(0.2, 0.8),
        "Threshold": lambda x: F.threshold(x, 0.5, 0.0),
        "Where": lambda x: torch.where(x > 0.5, x, 0.0),
        "MaskedFill": lambda x: x.masked_fill(x > 0.5, 0.0),
        "NativeDropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
        "ToCopy": lambda x: x.double(),
        "Alias": torch.ops.aten.alias,
    }
    x.requires_grad_()
    out = functions.get(name, getattr(torch, name.lower(), None))(x)
    assert operation(out.grad_fn) == name
    jacobian = torch.stack([torch.autograd.grad(value, x, retain_graph=True)[0] for value in out])
    assert not jacobian[~torch.eye(6, dtype=torch.bool)].any()


def test_a_name_that_torch_changed_is_refused_with_its_version(monkeypatch):
    monkeypatch.setitem(SAVED, "Mm", ("renamed",))
    with pytest.raises(
        NotCovered, match=rf"MmBackward0, which has no _saved_renamed in torch {re.escape(torch.__version__)}"
    ):
        saved((X @ W).grad_fn, "renamed")
    with pytest.raises(LookupError, match="SAVED has no entry Mm: mat2"):
        saved((X @ W).grad_fn, "mat2")


def test_no_other_file_reads_what_torch_does_not_document():
    private = re.compile(
        r"\._saved|\"_saved|_input_metadata|_forward_cls|\._(backward|forward|post_accumulate)\w*hooks"
    )
    folder = Path(torch_contract.__file__).parent
    readers = {path.name for path in folder.glob("*.py") if private.search(path.read_text())}
    assert readers == {"torch_contract.py"}


def test_leaves_custom_functions_and_hooks_are_told_apart():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    value = Double.apply(X)  # kept: before torch 2.13 its node dies with it
    node = value.grad_fn
    assert torch_contract.is_custom(node)
    Double.parameter_free = True
    assert not torch_contract.is_custom(node)
    library = torch.library.Library("isouq_tests", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: 2 * x, "CPU")
    torch.library.register_autograd("isouq_tests::double", lambda ctx, grad: 2 * grad, lib=library)
    registered = torch.ops.isouq_tests.double(X)
    assert isinstance(registered.grad_fn, torch.autograd.function.BackwardCFunction)
    assert not torch_contract.is_custom(registered.grad_fn)
    assert torch_contract.leaf_tensor(node) is None
    assert torch_contract.leaf_tensor(node.next_functions[0][0]) is X


def test_every_hook_that_a_backward_pass_runs_is_in_the_tables():
    layer = nn.Linear(6, 3)
    assert not torch_contract.backward_hooks(layer, layer.parameters())
    for register in ("register_module_full_backward_hook", "register_module_full_backward_pre_hook"):
        handle = getattr(nn.modules.module, register)(lambda *_: None)
        assert len(torch_contract.backward_hooks(layer, layer.parameters())) == 1
        handle.remove()
    layer.weight.register_hook(lambda grad: grad)
    layer.bias.register_post_accumulate_grad_hook(lambda p: None)
    layer.register_full_backward_hook(lambda *_: None)
    layer.register_full_backward_pre_hook(lambda *_: None)
    assert len(torch_contract.backward_hooks(layer, layer.parameters())) == 4


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_forward_pass_are_seen(register):
    layer = nn.Linear(6, 3)
    assert not any(torch_contract.forward_hooks(layer))
    getattr(layer, register)(lambda *_: None)
    assert [len(hooks) for hooks in torch_contract.forward_hooks(layer)] == [
        register.endswith("d_hook"),
        "pre" in register,
    ]
    assert not any(torch_contract.forward_hooks(None))
    handle = getattr(nn.modules.module, register.replace("register", "register_module"))(lambda *_: None)
    assert any(torch_contract.forward_hooks(None))
    handle.remove()
