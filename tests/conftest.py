"""One thread for the unit tests: their models are tiny, and several may share the machine."""

import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest):
    n = torch.get_num_threads()
    if not any(request.node.iter_markers("assets")):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
