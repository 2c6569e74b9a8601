"""What all tests share: one thread for the tiny models of unit tests, and a way past the type checks."""

from pathlib import Path

import jaxtyping
import pytest
import torch

import pipeline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes, keep a file's tests in one, for what they share; those of the gradients share nothing."""
    for item in items:
        if item.path.parent.name not in {"gradients", "traps"}:
            item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest):
    """Several test runs may share the machine; real models (marker `assets`) take all its cores."""
    n = torch.get_num_threads()
    if not any(request.node.iter_markers("assets")):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="session")
def smoke() -> Path:
    """The run at smoke size that `make test` makes; one that is absent or out of date is not looked at."""
    if plan := pipeline.plan(pipeline.ROOT, profile="smoke"):
        why = next(iter(plan.items()))
        pytest.fail(f"the book at smoke size is not built or not of this code: run `make test`; {why}", pytrace=False)
    return pipeline.ROOT / "build" / "smoke"


@pytest.fixture
def figure_style():
    """The style of all figures, for one test; its figures are closed."""
    import matplotlib.pyplot as plt

    from isouq.studies import plotting

    plt.switch_backend("agg")
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


@pytest.fixture
def unchecked():
    """Annotations are checked under pytest only; a test of bad input wants the error that a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
