"""How close two results have to be, by the type they were computed in. The only place where tolerances are stated."""

import torch
from torch import Tensor

RELATIVE = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 2e-2,  # 11 bits of activations and gradients; squares are added in float32
    torch.bfloat16: 1e-1,  # 8 bits of them
}


def assert_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Every entry of `actual` is finite, of the wanted shape, and within RELATIVE[dtype] of `wanted`."""
    actual, wanted = torch.as_tensor(actual).double(), torch.as_tensor(wanted).double()
    assert actual.shape == wanted.shape, f"shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}"
    assert actual.isfinite().all(), f"not finite: {actual}"
    error = ((actual - wanted).abs() / wanted.abs().clamp(min=1e-300)).max()
    assert error <= RELATIVE[dtype], f"relative error {error:.1e} > {RELATIVE[dtype]:.0e}: {actual}, wanted {wanted}"


def assert_logs_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """exp(actual) is within RELATIVE[dtype] of exp(wanted), without taking either."""
    assert actual.shape == wanted.shape, f"shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}"
    assert_close((actual.double() - wanted.double()).exp(), torch.ones_like(wanted, dtype=torch.float64), dtype)
