"""patchify on the kernels for GPUs: the bits of the CPU's."""

import pytest
import torch
from ahead import compile_launches
from numerics import DEVICE, DTYPES, GPU_BACKENDS, HAS_GPU
from test_patchify import HALF, SHAPES, named, noise

from moca_fast import CLIP_MEAN, CLIP_STD, patchify

LARGE = [((27, 37), (14, 2, 2)), ((64, 64), (16, 2, 2))]
pytestmark = pytest.mark.parametrize("backend", GPU_BACKENDS[:1])  # Triton alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("colours", [(CLIP_MEAN, CLIP_STD), HALF, ((0, 0, 0), (1, 1, 1))])
@pytest.mark.parametrize(
    ("tokens", "sizes"), [*SHAPES, ((1, 1), (40, 1, 2)), *LARGE * HAS_GPU], ids=str
)
def test_bits_are_those_of_the_cpu(tokens, sizes, colours, dtype, backend):
    image = noise(tokens, *sizes[:2])
    options = {"mean": colours[0], "std": colours[1], "dtype": dtype, **named(sizes)}
    expected = patchify(image, **options, backend="cpu")
    got = patchify(image.to(DEVICE), **options, backend=backend)
    assert got.dtype == dtype and torch.equal(got.cpu(), expected)


def test_every_byte(backend):
    image = torch.arange(256 * 3, dtype=torch.int32).to(torch.uint8).reshape(16, 16, 3)
    got = patchify(image.to(DEVICE), patch_size=4, backend=backend)
    assert torch.equal(got.cpu(), patchify(image, patch_size=4, backend="cpu"))


def test_any_strides(backend):
    image = noise((3, 2), 14, 2).to(DEVICE)
    expected = patchify(image, backend=backend)
    channels_first = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    part = torch.full((90, 60, 4), 7, dtype=torch.uint8, device=DEVICE)[3:87, 2:58, :3]
    transposed = image.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (channels_first, part.copy_(image), transposed):
        assert not view.is_contiguous()
        assert torch.equal(patchify(view, backend=backend), expected)
    grey = torch.randint(256, (28, 28, 1), dtype=torch.uint8, device=DEVICE)
    assert torch.equal(
        patchify(grey.expand(-1, -1, 3), backend=backend),
        patchify(grey.repeat(1, 1, 3), backend=backend),
    )


def test_float64_is_refused(backend):
    with pytest.raises(ValueError, match="dtype float64 has no"):
        patchify(noise((1, 1), 14, 2).to(DEVICE), dtype=torch.float64, backend=backend)


def test_compiles_ahead(backend):
    kernels = compile_launches("""
import torch
from moca_triton import patchify as op
for patch, merge, frames in ((14, 2, 2), (16, 2, 2), (1, 1, 1)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        image = torch.zeros(patch * merge * 2, patch * merge, 3, dtype=torch.uint8)
        op.forward(image, patch, merge, frames, [0.5] * 3, [0.25, 1.0, 2.0], dtype)
""")
    assert {kernel.name for kernel in kernels} == {"_forward_kernel"}
    assert all(kernel.stack == 0 for kernel in kernels)
    # The frames of 14 x 14 patches begin on 16 bytes in float32, of 16 x 16 ones in any dtype.
    assert sum(kernel.access == 16 for kernel in kernels) == 2 * 4
