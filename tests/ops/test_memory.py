"""Memory of large results: kept, given to the next one, never to two at a time."""

import threading

import pytest
import torch

import moca_fast
from moca_fast import _memory
from moca_fast._memory import MOST, SMALLEST, empty, empty_like

LARGE = SMALLEST // 4  # float32 numbers


@pytest.fixture(autouse=True)
def nothing_kept():
    """Not poisoned: where torch is to fill fresh memory, it comes from torch."""
    torch.use_deterministic_algorithms(False)
    moca_fast.empty_cache()
    yield
    moca_fast.empty_cache()


def kept() -> int:
    return sum(len(block) for block in _memory._kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (), (3, 5), (2048, 1031), (7, 3, 250_007)])
def test_shape_and_dtype(shape, dtype):
    tensor = empty(shape, dtype)
    assert tensor.shape == torch.Size(shape) and tensor.dtype == dtype and tensor.is_contiguous()
    tensor.fill_(1)
    assert tensor.sum() == tensor.numel()
    assert empty_like(tensor.mT if tensor.dim() > 1 else tensor).is_contiguous()


def test_the_next_result_gets_the_memory_of_the_last():
    first = empty((LARGE,), torch.float32)
    where = first.data_ptr()
    assert kept() == 0
    del first
    assert kept() >= SMALLEST
    assert empty((LARGE // 2, 4), torch.bfloat16).data_ptr() == where


def test_memory_is_kept_only_when_the_last_view_is_gone():
    view = empty((2, LARGE), torch.float32)[1]
    assert kept() == 0
    other = empty((2, LARGE), torch.float32)
    assert other.data_ptr() + 4 * LARGE != view.data_ptr()
    view.fill_(1)
    other.fill_(2)
    assert (view == 1).all()
    del view
    assert kept() >= 2 * SMALLEST


def test_a_much_larger_block_is_left_for_larger_results():
    large = empty((8 * LARGE,), torch.float32)
    del large
    before = kept()
    small = empty((LARGE,), torch.float32)
    assert kept() == before and small.numel() == LARGE


def test_only_so_much_is_kept_and_what_was_freed_last_stays():
    results = [empty((MOST // 4,), torch.uint8) for _ in range(6)]
    last = results[-1].data_ptr()
    while results:
        results.pop(0)
    assert kept() <= MOST
    assert last in {
        torch.frombuffer(block, dtype=torch.uint8).data_ptr() for block in _memory._kept
    }
    moca_fast.empty_cache()
    assert kept() == 0


def test_threads_never_share_a_block():
    failures = []

    def work(value: int) -> None:
        for _ in range(50):
            tensor = empty((LARGE,), torch.float32).fill_(value)
            if not (tensor == value).all():
                failures.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_gradients_of_two_steps_do_not_mix():
    pred = torch.randn(2048, 1024, requires_grad=True)
    patches = torch.randn(2048, 1024)
    index = torch.arange(2048)
    first = torch.autograd.grad(moca_fast.masked_patch_mse(pred, patches, index), pred)[0]
    expected = first.clone()
    second = torch.autograd.grad(moca_fast.masked_patch_mse(2 * pred, patches, index), pred)[0]
    assert torch.equal(first, expected) and not torch.equal(second, expected)


def test_no_memory_left():
    """As where torch has none: a RuntimeError."""
    with pytest.raises(RuntimeError, match="the system has no"):
        empty((1 << 50,), torch.float32)


def test_filled_by_torch_where_it_fills_fresh_memory():
    torch.use_deterministic_algorithms(True)
    assert torch.isnan(empty((LARGE,), torch.float32)).all()
