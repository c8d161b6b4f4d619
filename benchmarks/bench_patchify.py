"""patchify: the bytes of a resized image to normalised patches, against transformers' processor.

H x W pixels, N patches, P values a patch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import moca_fast
from benchmarks.harness import Call, Cost, Runner, Target, Work

PATCH, MERGE, FRAMES = 14, 2, 2  # of Qwen2-VL, and the defaults of the op and of the processor


@dataclass(frozen=True, kw_only=True)
class Patchify(Work):
    height: int
    width: int
    backward: bool = False

    @property
    def title(self) -> str:
        return f"patchify {self.width} x {self.height}"

    def cost(self) -> Cost:
        # Three operations a byte; each becomes a float32 in every frame.
        values = 3 * self.height * self.width
        return Cost(3 * values, values + 4 * FRAMES * values)

    def leaves(self, device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        size = (self.height, self.width, 3)
        image = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        return (image.to(device),)

    def plain(self, image: Tensor) -> Tensor:
        """Token by token, and patch by patch inside each."""
        values = image.to(torch.promote_types(image.dtype, torch.float32)) / 255
        mean, std = values.new_tensor(moca_fast.CLIP_MEAN), values.new_tensor(moca_fast.CLIP_STD)
        side = PATCH * MERGE
        rows = []
        for strip in ((values - mean) / std).split(side, dim=0):
            for token in strip.split(side, dim=1):
                for row in token.split(PATCH, dim=0):
                    for patch in row.split(PATCH, dim=1):
                        channels = patch.permute(2, 0, 1).flatten(1)
                        rows.append(channels.repeat_interleave(FRAMES, dim=0).flatten())
        return torch.stack(rows)


def moca(work: Patchify, leaves: tuple[Tensor, ...], d_out: Tensor, backend: str) -> Call:
    return Call(lambda image: moca_fast.patchify(image, backend=backend), leaves, d_out)


def processor(work: Patchify, leaves: tuple[Tensor, ...], d_out: Tensor) -> Call:
    """Its three steps after the resize, on channels first as it has them by then."""
    steps = Qwen2VLImageProcessorPil()
    image = leaves[0].permute(2, 0, 1).contiguous().numpy()

    def function(_: Tensor) -> Tensor:
        values = steps.normalize(steps.rescale(image, 1 / 255), steps.image_mean, steps.image_std)
        return torch.from_numpy(steps.patchify(values, PATCH, MERGE, FRAMES)[0])

    return Call(function, leaves, d_out)


PEERS = [Runner("transformers", processor, devices=("cpu",), yardstick=True)]
WORKS = {
    "tiny": [Patchify(height=56, width=84)],
    "full": [
        Patchify(height=756, width=1036, targets=(Target(8),)),  # what 1024 x 768 is resized to
        Patchify(height=224, width=224),
    ],
}


def bench_patchify(measured, work, runner):
    measured(work, runner)
