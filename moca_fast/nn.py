"""The losses as modules. `InfoNCELoss` also gathers documents over a process group.

B queries of this process, M documents of all processes, K hard negatives a query, D dim.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moca_fast.ops.info_nce.op import info_nce
from moca_fast.ops.linear_cross_entropy.op import linear_cross_entropy
from moca_fast.ops.masked_patch_mse.op import masked_patch_mse


class MaskedPatchMSELoss(nn.Module):
    """`moca_fast.masked_patch_mse` as a module."""

    def __init__(self, *, normalize: bool = False, backend: str = "auto") -> None:
        super().__init__()
        self.normalize = normalize
        self.backend = backend

    def forward(self, pred: Tensor, patches: Tensor, index: Tensor) -> Tensor:
        return masked_patch_mse(
            pred, patches, index, normalize=self.normalize, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, backend={self.backend!r}"


class LinearCrossEntropyLoss(nn.Module):
    """`moca_fast.linear_cross_entropy` as a module; the weight stays with the model's head."""

    def __init__(
        self, *, ignore_index: int = -100, reduction: str = "mean", backend: str = "auto"
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )


class InfoNCELoss(nn.Module):
    """`moca_fast.info_nce` of this process's queries against the documents of all processes.

    Every process passes its own B queries and their B documents. Documents (and their ids) are
    gathered over the group; gradients flow back to the process that made them. What is returned
    is scaled so that its mean over processes, which is what DistributedDataParallel makes of the
    gradients, is the mean loss over the whole batch: parameters get exactly the gradient that one
    process holding all pairs would compute. With equal B this is simply the mean over B; B may
    differ between processes, and may be 0 in some.

    Args:
        temperature: a positive float.
        learnable: make the temperature a parameter, stored as its logarithm.
        gather: False keeps to the documents of this process.
        group: the process group; default all processes. Where torch.distributed is not
            initialised there is one process.
        backend: as in `moca_fast.info_nce`.
    """

    def __init__(
        self,
        temperature: float = 0.03,
        *,
        learnable: bool = False,
        gather: bool = True,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"InfoNCELoss: temperature: expected above 0, got {temperature!r}")
        self.log_temperature: nn.Parameter | None = None
        if learnable:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.initial_temperature = temperature
        self.gather = gather
        self.group = group
        self.backend = backend

    @property
    def temperature(self) -> float | Tensor:
        if self.log_temperature is None:
            return self.initial_temperature
        return self.log_temperature.exp()

    def forward(
        self,
        query: Tensor,
        document: Tensor,
        hard_negatives: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss, () float32.

        Args:
            query: (B, D).
            document: (B, D), row b answers query b.
            hard_negatives: (B, K, D), seen by their own query only, so never gathered.
            document_ids: (B,) int64; documents of one id are no negatives of each other's
                queries. On all processes or on none.
        """
        if document.shape != query.shape:
            raise ValueError(
                f"InfoNCELoss: document: expected the shape of query {tuple(query.shape)}, got "
                f"{tuple(document.shape)}"
            )
        batch = query.shape[0]
        sizes, rank = [batch], 0
        query_ids = document_ids
        if self.gather and dist.is_available() and dist.is_initialized():
            rank = dist.get_rank(self.group)
            sizes = gathered_sizes(batch, query.device, self.group)
            document = gather_rows(document, sizes, self.group)
            if document_ids is not None:
                document_ids = gather_rows(document_ids, sizes, self.group)
        loss = info_nce(
            query,
            document,
            torch.arange(batch, device=query.device) + sum(sizes[:rank]),
            temperature=self.temperature,
            hard_negatives=hard_negatives,
            query_ids=query_ids,
            document_ids=document_ids,
            reduction="sum",
            backend=self.backend,
        )
        return loss * (len(sizes) / max(sum(sizes), 1))

    def extra_repr(self) -> str:
        learnable = self.log_temperature is not None
        return (
            f"temperature={self.initial_temperature}, learnable={learnable}, "
            f"gather={self.gather}, backend={self.backend!r}"
        )


def gathered_sizes(rows: int, device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    """How many rows each process of the group has, in rank order."""
    mine = torch.tensor([rows], device=device)
    every = mine.new_empty(dist.get_world_size(group))
    dist.all_gather_into_tensor(every, mine, group=group)
    return every.tolist()


def gather_rows(tensor: Tensor, sizes: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all processes of the group in rank order, (sum of sizes, ...), differentiably.

    Backward: each process gets the sum, over processes, of the gradients of its rows.
    """
    return _GatherRows.apply(tensor, sizes, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, sizes, group):
        ctx.sizes, ctx.group = sizes, group
        largest = max(sizes)  # collectives want equal shapes
        padded = tensor.new_zeros((largest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        every = padded.new_empty((len(sizes) * largest, *tensor.shape[1:]))
        dist.all_gather_into_tensor(every, padded, group=group)
        pieces = every.split(largest)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    def backward(ctx, d_every):
        # A reduce-scatter would move less, but gloo has none in every torch version we support.
        d_every = d_every.clone(memory_format=torch.contiguous_format)  # others may hold it too
        dist.all_reduce(d_every, group=ctx.group)
        return d_every.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None
