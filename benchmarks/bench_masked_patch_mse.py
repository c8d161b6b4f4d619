"""masked_patch_mse: the mean squared error of predicted patches; bound by memory.

M masked patches of N, P values a patch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import moca_fast
from benchmarks.harness import Call, Cost, Runner, Target, Work


@dataclass(frozen=True, kw_only=True)
class MaskedPatchMSE(Work):
    masked: int
    size: int
    normalize: bool

    @property
    def title(self) -> str:
        kind = " normalized" if self.normalize else ""
        return f"masked_patch_mse M {self.masked} P {self.size}{kind}"

    def cost(self) -> Cost:
        # Forward reads predictions and targets; backward reads them again and writes a gradient.
        numbers = self.masked * self.size
        flops, arrays = (8, 5) if self.backward else (5, 2)
        return Cost(flops * numbers, arrays * numbers * self.torch_dtype.itemsize)

    def leaves(self, device: str) -> tuple[Tensor, ...]:
        return (self.randn(self.masked, self.size, device=device),)

    def clean(self, device: str) -> tuple[Tensor, Tensor]:
        """The clean patches of all images, every other one masked, and the rows of the masked."""
        patches = self.randn(2 * self.masked, self.size, device=device, seed=1)
        generator = torch.Generator().manual_seed(2)
        index = torch.randperm(2 * self.masked, generator=generator)[: self.masked]
        return patches, index.sort().values.to(device)

    def plain(self, pred: Tensor) -> Tensor:
        patches, index = self.clean(pred.device.type)
        return _eager(pred, patches.to(pred.dtype), index, self.normalize)


def _eager(pred: Tensor, patches: Tensor, index: Tensor, normalize: bool) -> Tensor:
    target = patches[index]
    if normalize:
        variance, mean = torch.var_mean(target, dim=1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (pred - target).square().mean(dim=1).mean()


def moca(work: MaskedPatchMSE, leaves: tuple[Tensor, ...], d_out: Tensor, backend: str) -> Call:
    patches, index = work.clean(d_out.device.type)

    def function(pred: Tensor) -> Tensor:
        return moca_fast.masked_patch_mse(
            pred, patches, index, normalize=work.normalize, backend=backend
        )

    return Call(function, leaves, d_out)


def eager(work: MaskedPatchMSE, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    patches, index = work.clean(d_out.device.type)
    return Call(lambda pred: _eager(pred, patches, index, work.normalize), leaves, d_out)


def compiled(work: MaskedPatchMSE, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    patches, index = work.clean(d_out.device.type)
    fused = torch.compile(_eager, dynamic=False)
    return Call(lambda pred: fused(pred, patches, index, work.normalize), leaves, d_out)


PEERS = [
    Runner("torch", eager, yardstick=True),
    Runner("torch.compile", compiled, devices=("cuda",)),
]
WORKS = {
    "tiny": [MaskedPatchMSE(masked=20, size=48, normalize=True)],
    "full": [
        MaskedPatchMSE(
            masked=16384,
            size=1176,
            normalize=normalize,
            dtype=dtype,
            targets=(Target(4, limit=0.7),),
        )
        for normalize in (False, True)
        for dtype in ("float32", "bfloat16")
    ],
    "gpu": [
        MaskedPatchMSE(
            masked=32768,
            size=1176,
            normalize=normalize,
            dtype="bfloat16",
            targets=(Target(3, limit=0.85),),
        )
        for normalize in (False, True)
    ],
}


def bench_masked_patch_mse(measured, work, runner):
    measured(work, runner)
