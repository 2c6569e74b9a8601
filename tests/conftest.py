"""What all tests share: one thread for the tiny models of unit tests, and a way past the type checks."""

import jaxtyping
import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest):
    """Several test runs may share the machine; real models (marker `assets`) take all its cores."""
    n = torch.get_num_threads()
    if not any(request.node.iter_markers("assets")):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def unchecked():
    """Annotations are checked under pytest only; a test of bad input wants the error that a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
