import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import BACKENDS, DTYPES
from torch import Tensor

from moca_fast import CLIP_MEAN, CLIP_STD, patchify

HALF = ((0.5, 0.25, 0.75), (0.5, 0.125, 2.0))
# Image sides in vision tokens; patch, merge and temporal sizes.
SHAPES = [((1, 1), (14, 2, 2)), ((3, 5), (14, 2, 2)), ((5, 3), (16, 2, 2)), ((2, 7), (3, 3, 1))]
SHAPES += [((9, 8), (8, 1, 3)), ((1, 2), (1, 1, 1)), ((0, 2), (14, 2, 2))]


def noise(tokens: tuple[int, int], patch: int, merge: int) -> Tensor:
    sides = [side * patch * merge for side in tokens]
    return torch.randint(256, (*sides, 3), dtype=torch.uint8)


def oracle(image: Tensor, sizes: tuple[int, int, int], mean, std) -> np.ndarray:
    """Patch by patch and value by value, in float64."""
    patch, merge, frames = sizes
    pixels = (image.numpy() / 255.0 - np.float64(mean)) / np.float64(std)
    rows = []
    step = patch * merge
    for top in range(0, pixels.shape[0], step):
        for left in range(0, pixels.shape[1], step):
            for y in range(top, top + step, patch):
                for x in range(left, left + step, patch):
                    one = pixels[y : y + patch, x : x + patch]
                    rows.append([one[:, :, c].ravel() for c in range(3) for _ in range(frames)])
    return np.asarray(rows).reshape(-1, 3 * frames * patch**2)


def named(sizes: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("patch_size", "merge_size", "temporal_patch_size"), sizes, strict=True))


def assert_exact(got: Tensor, exact: np.ndarray, dtype: torch.dtype) -> None:
    """Four roundings in float32 (three steps, and what `mean` loses), then one of `dtype`."""
    assert got.dtype == dtype and got.shape == exact.shape
    wide = torch.from_numpy(exact)
    allowed = 1e-6 + torch.finfo(dtype).eps * wide.abs()
    assert ((got.double() - wide).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("colours", [(CLIP_MEAN, CLIP_STD), HALF])
@pytest.mark.parametrize(("tokens", "sizes"), SHAPES)
@pytest.mark.kernel
def test_exact(tokens, sizes, colours, dtype, backend):
    image = noise(tokens, *sizes[:2])
    options = {"mean": colours[0], "std": colours[1], "dtype": dtype, "backend": backend}
    got = patchify(image, **named(sizes), **options)
    assert_exact(got, oracle(image, sizes, *colours), dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    sizes=st.tuples(st.integers(1, 17), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**31),
)
@pytest.mark.kernel
def test_exact_random_shapes(tokens, sizes, seed):
    torch.manual_seed(seed)
    image = noise(tokens, *sizes[:2])
    got = patchify(image, **named(sizes), backend="cpu")
    assert_exact(got, oracle(image, sizes, CLIP_MEAN, CLIP_STD), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "sizes"), [((121, 119), (7, 1, 1)), ((31, 33), (14, 2, 2))])
@pytest.mark.kernel
def test_results_of_megabytes(tokens, sizes, dtype):
    """They are written past the caches, whole lines at a time; a patch of 7 x 7 ends inside one."""
    image = noise(tokens, *sizes[:2])
    got = patchify(image, **named(sizes), dtype=dtype, backend="cpu")
    assert got.nbytes > 4 << 20
    assert torch.equal(got, patchify(image, **named(sizes), dtype=dtype, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree_to_the_bit(dtype):
    image = torch.arange(256 * 3, dtype=torch.int32).to(torch.uint8).reshape(16, 16, 3)
    options = {"patch_size": 4, "dtype": dtype}
    got = patchify(image, **options, backend="cpu")
    assert torch.equal(got, patchify(image, **options, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_transformers(backend):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    image = noise((4, 6), 14, 2)
    processor = module.Qwen2VLImageProcessorPil(do_resize=False)
    expected = processor(image.numpy(), return_tensors="pt", input_data_format="channels_last")
    got = patchify(image, backend=backend)
    assert (got - expected["pixel_values"]).abs().max() <= 1e-6
    assert backend == "reference" or torch.equal(got, expected["pixel_values"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.kernel
def test_any_strides(backend):
    image = noise((3, 2), 14, 2)
    expected = patchify(image)
    channels_first = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    part = torch.full((90, 60, 4), 7, dtype=torch.uint8)[3:87, 2:58, :3]
    transposed = image.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (channels_first, part.copy_(image), transposed):
        assert not view.is_contiguous()
        assert torch.equal(patchify(view, backend=backend), expected)
    grey = torch.randint(256, (28, 28, 1), dtype=torch.uint8)
    assert torch.equal(
        patchify(grey.expand(-1, -1, 3), backend=backend), patchify(grey.repeat(1, 1, 3))
    )


@pytest.mark.kernel
def test_bits_do_not_depend_on_runs_or_threads():
    image, threads, results = noise((9, 8), 14, 2), torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 5):
            torch.set_num_threads(count)
            results.append(patchify(image, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_float64_is_computed_in_float64():
    image = noise((2, 3), 14, 2)
    got = patchify(image, dtype=torch.float64)
    exact = oracle(image, (14, 2, 2), CLIP_MEAN, CLIP_STD)
    np.testing.assert_allclose(got.numpy(), exact, rtol=1e-14, atol=1e-15)
    with pytest.raises(ValueError, match=r"cpu.*dtype float64 has no native kernel"):
        patchify(image, dtype=torch.float64, backend="cpu")


def test_there_is_no_gradient():
    assert not patchify(noise((1, 1), 14, 2)).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    arguments = (noise((2, 3), 4, 2), 4, 2, 2, list(CLIP_MEAN), list(CLIP_STD), torch.bfloat16)
    torch.library.opcheck(torch.ops.moca_fast.patchify.default, (*arguments, backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    op = lambda x: patchify(x, patch_size=4) * 2  # noqa: E731
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in ((2, 3), (4, 5)):
        image = noise(tokens, 4, 2)
        assert torch.equal(compiled(image), op(image))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.zeros(28, 28)}, ValueError, r"image: expected shape \(H, W, 3\), got"),
        ({"image": torch.zeros(3, 28, 28).byte()}, ValueError, r"got \(3, 28, 28\)"),
        ({"image": torch.zeros(28, 28, 3)}, TypeError, "image: expected dtype uint8, got float32"),
        ({"image": np.zeros((28, 28, 3), np.uint8)}, TypeError, "a tensor, got ndarray"),
        ({"image": torch.zeros(28, 30, 3).byte()}, ValueError, "merge_size = 28, got 28 x 30"),
        ({"patch_size": 0}, ValueError, "patch_size: expected at least 1, got 0"),
        ({"temporal_patch_size": -1}, ValueError, "temporal_patch_size: .*got -1"),
        ({"patch_size": 14.0}, TypeError, r"patch_size: expected a whole number, got 14\.0"),
        ({"mean": (0.5,)}, ValueError, r"mean: expected 3 values, got \(0\.5,\)"),
        ({"std": 0.5}, ValueError, r"std: expected 3 values, got 0\.5"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std: expected positive values"),
        ({"std": (0.5, 1e-46, 0.5)}, ValueError, "of at least 1.2e-38, got .*1e-46"),
        ({"std": (1, float("nan"), 1)}, ValueError, "std: expected a finite number, got nan"),
        ({"mean": (0, float("inf"), 1)}, ValueError, "mean: expected a finite number, got inf"),
        ({"mean": "abc"}, TypeError, "mean: expected a number .* got 'a'"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected a floating-point dtype, got"),
        ({"backend": "cuda"}, ValueError, "patchify has no cuda kernel"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        patchify(**{"image": torch.zeros(28, 28, 3).byte(), **change})
