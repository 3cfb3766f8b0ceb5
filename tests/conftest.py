"""Fixtures that every test gets: a GPU only where promised, no leaking seeds, NaN-filled fresh memory."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests without a GPU, unless DINOFAST_REQUIRE_CUDA=1 promises one: then they must fail."""
    if torch.cuda.is_available() or os.environ.get("DINOFAST_REQUIRE_CUDA") == "1":
        return
    for item in items:
        if "needs_cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _contained_randomness():
    """Seed torch, and put back what the test leaves."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Fill memory from torch.empty with NaN, so that an unwritten result fails."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=False)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture(scope="session")
def lite0():
    """The smallest backbone with real weights: 6 x 6 patches of an image of 96 x 96, about 10 ms each."""
    from dinofast import backbone

    return backbone.load("efficientnet-lite0", size=96, device="cpu")
