import datetime
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from moca_fast import info_nce, linear_cross_entropy, masked_patch_mse
from moca_fast.nn import (
    InfoNCELoss,
    LinearCrossEntropyLoss,
    MaskedPatchMSELoss,
    gather_rows,
)

SIZE, DIM, HARD = 6, 8, 2


class Encoder(nn.Module):
    """A tower and its loss, as a training loop wraps them together."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(SIZE, DIM)
        self.loss = InfoNCELoss(0.5, learnable=True)

    def forward(self, query, document, hard, ids) -> Tensor:
        return self.loss(
            self.tower(query), self.tower(document), self.tower(hard), document_ids=ids
        )


def batch_of(rows: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    query, document = torch.randn(2, rows, SIZE, generator=generator)
    hard = torch.randn(rows, HARD, SIZE, generator=generator)
    return query, document, hard, torch.randint(3, (rows,), generator=generator)


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_steps(rank: int, cases: list[list[int]], port: int, results) -> None:
    """One backward a case; `sizes` of a case are the pairs of each process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=len(cases[0]),
        timeout=datetime.timedelta(minutes=5),
    )
    try:
        for case, sizes in enumerate(cases):
            model = nn.parallel.DistributedDataParallel(encoder())
            loss = model(*(x.split(sizes)[rank] for x in batch_of(sum(sizes))))
            loss.backward()
            results[case, rank] = (loss.item(), [p.grad.tolist() for p in model.parameters()])
        gradient = torch.ones(4, 1)
        rows = torch.zeros(2, 1, requires_grad=True)
        gather_rows(rows, [2, 2]).backward(gradient)
        results["gathered", rank] = (gradient.tolist(), rows.grad.tolist())
    finally:
        dist.destroy_process_group()


def test_two_processes_make_the_gradients_of_one():
    cases = [[4, 4], [2, 5], [3, 0]]
    with mp.Manager() as manager:
        shared = manager.dict()
        # DistributedDataParallel keeps its process group for ever, and a thread of a group that
        # lets go of a tensor while the interpreter is being torn down aborts the process. A fork
        # server's children end without tearing it down.
        arguments = (cases, free_port(), shared)
        mp.start_processes(train_steps, arguments, nprocs=2, start_method="forkserver")
        results = dict(shared)
    for rank in range(2):  # the gradient that a backward is given stays as it is
        assert results["gathered", rank] == ([[1.0]] * 4, [[2.0]] * 2)
    for case, sizes in enumerate(cases):
        model = encoder()
        whole = model(*batch_of(sum(sizes)))
        whole.backward()
        losses, gradients = zip(*(results[case, rank] for rank in range(2)), strict=True)
        torch.testing.assert_close(sum(losses) / 2, whole.item(), rtol=1e-6, atol=0)
        for rank in range(2):
            for got, parameter in zip(gradients[rank], model.parameters(), strict=True):
                torch.testing.assert_close(torch.tensor(got), parameter.grad, rtol=1e-5, atol=1e-6)


def test_info_nce_of_one_process():
    query, document = torch.randn(2, 5, DIM)
    hard = torch.randn(5, HARD, DIM)
    ids = torch.tensor([0, 1, 0, 2, 3])
    loss = InfoNCELoss(0.2)(query, document, hard, ids)
    expected = info_nce(query, document, temperature=0.2, hard_negatives=hard, document_ids=ids)
    torch.testing.assert_close(loss, expected)


def test_temperature_learns_through_its_logarithm():
    module = InfoNCELoss(0.2, learnable=True)
    query, document = torch.randn(2, 5, DIM)
    module(query, document).backward()
    temperature = torch.tensor(0.2, requires_grad=True)
    info_nce(query, document, temperature=temperature).backward()
    torch.testing.assert_close(module.log_temperature.grad, temperature.grad * 0.2)
    assert not list(InfoNCELoss(0.2).parameters())


def test_info_nce_of_no_pair():
    query = torch.zeros(0, DIM, requires_grad=True)
    loss = InfoNCELoss()(query, query)
    loss.backward()
    assert loss.item() == 0 and query.grad.shape == (0, DIM)


def test_info_nce_refusals():
    with pytest.raises(ValueError, match=r"document.*\(3, 4\), got \(2, 4\)"):
        InfoNCELoss()(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature: expected above 0, got -1"):
        InfoNCELoss(-1)


def test_modules_pass_their_options_on():
    hidden, weight, bias = torch.randn(5, 4), torch.randn(7, 4), torch.randn(7)
    labels = torch.tensor([0, 6, 3, 3, 1])
    options = {"ignore_index": 3, "reduction": "sum", "backend": "reference"}
    assert torch.equal(
        LinearCrossEntropyLoss(**options)(hidden, weight, labels, bias),
        linear_cross_entropy(hidden, weight, labels, bias=bias, **options),
    )
    pred, patches, index = torch.randn(3, 12), torch.randn(4, 12), torch.tensor([0, 3, 3])
    options = {"normalize": True, "backend": "reference"}
    assert torch.equal(
        MaskedPatchMSELoss(**options)(pred, patches, index),
        masked_patch_mse(pred, patches, index, **options),
    )
    with pytest.raises(ValueError, match="'nowhere'"):
        MaskedPatchMSELoss(backend="nowhere")(pred, patches, index)
