"""Fresh tensors are poisoned: whatever a kernel leaves unwritten reads as NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills uninitialised memory with NaN in deterministic mode only."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
