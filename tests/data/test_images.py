"""Images: equal to the transformers processor to the bit, and clear errors for bad ones."""

import io
import itertools

import numpy as np
import PIL.Image
import pytest
from moca.data.images import (
    ImageSettings,
    decode,
    denormalize,
    patchify,
    resize,
    target_size,
)

reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")


def noise(height, width, mode="RGB", seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,), "CMYK": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    return PIL.Image.fromarray(values, mode)


def encoded(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def load_patches(image, settings):
    """An image as its patches and their grid, by the steps that documents go through."""
    return patchify(np.asarray(resize(decode(image), settings)), settings)


def processor(settings):
    return reference.Qwen2VLImageProcessorPil(**settings.to_processor_config())


SETTINGS = [
    ImageSettings(),
    ImageSettings(patch_size=8, min_pixels=32 * 32, max_pixels=64 * 64),
    ImageSettings(16, 2, 2, 64 * 64, 96 * 160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ImageSettings(patch_size=4, merge_size=3, temporal_patch_size=1, max_pixels=120 * 120),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_transformers_processor(settings):
    sides = np.random.default_rng(settings.patch_size).integers(1, 400, (8, 2))
    for height, width in [*sides.tolist(), (1, 1), (1, 200), (3, 600), (28, 28), (700, 500)]:
        image = noise(height, width, seed=height * width)
        patches, grid = load_patches(image, settings)
        expected = processor(settings)(image, return_tensors="np")
        np.testing.assert_array_equal(patches, expected["pixel_values"])
        np.testing.assert_array_equal([grid], expected["image_grid_thw"])
        assert patches.dtype == np.float32 and patches.shape[1] == settings.patch_dim


@pytest.mark.parametrize("least, most", [(12, 24), (256, 512), (256, 1024)])
def test_bounds_with_room_between_them_are_kept(least, most):
    area = 28 * 28
    settings = ImageSettings(min_pixels=least * area, max_pixels=most * area)
    for short, ratio in itertools.product(np.geomspace(10, 4000, 40), np.linspace(1, 4, 25)):
        height, width = target_size(int(short), int(short * ratio), settings)
        assert least <= height * width / area <= most


def special_images():
    palette = noise(40, 50).convert("P")
    clear = noise(40, 50).convert("P")
    clear.info["transparency"] = 3
    modes = {mode: noise(40, 50, mode) for mode in ("L", "LA", "RGBA", "CMYK")}
    other = {"1": noise(40, 50, "L").convert("1"), "YCbCr": noise(40, 50).convert("YCbCr")}
    return {"P": palette, "P transparent": clear, **modes, **other}


@pytest.mark.parametrize("mode", special_images())
def test_every_mode_becomes_rgb_as_in_transformers(mode):
    image, settings = special_images()[mode], ImageSettings()
    expected = processor(settings)(image, return_tensors="np")
    np.testing.assert_array_equal(load_patches(image, settings)[0], expected["pixel_values"])


def test_transparency_is_laid_over_white():
    image = PIL.Image.new("RGBA", (30, 30), (255, 0, 0, 0))
    assert decode(encoded(image)).getpixel((5, 5)) == (255, 255, 255)
    grey = PIL.Image.new("I;16", (30, 30), 1000)
    assert decode(encoded(grey, transparency=1000)).getpixel((5, 5)) == (255, 255, 255)
    assert decode(encoded(grey, transparency=1001)).getpixel((5, 5)) == (4, 4, 4)


def grey16(kind):
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    if kind == "I;16B":
        return values, PIL.Image.frombytes("I;16B", (60, 40), values.astype(">u2").tobytes())
    if kind == "PNG in an older Pillow":
        image = PIL.Image.fromarray(values.astype(np.int32))
        image.format = "PNG"
        return values, image
    return values, encoded(PIL.Image.fromarray(values), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "I;16B", "PNG in an older Pillow"])
def test_16_bit_grey_keeps_its_shades(kind):
    values, image = grey16(kind)
    pixels = np.asarray(decode(image))
    np.testing.assert_array_equal(pixels, np.rint(values / 257)[..., None].repeat(3, axis=2))


def test_16_bit_grey_is_turned_upright():
    values, _ = grey16("PNG")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    pixels = np.asarray(decode(encoded(PIL.Image.fromarray(values), exif=exif)))
    np.testing.assert_array_equal(pixels[..., 0], np.rint(np.rot90(values, -1) / 257))


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_greys_of_unknown_range_are_refused(mode, dtype):
    content = encoded(PIL.Image.fromarray(np.ones((30, 30), dtype)), "TIFF")
    with pytest.raises(ValueError, match=f"row 1: .* 8 or 16 bits a channel, got mode {mode}"):
        decode(content, "row 1")


def test_files_are_turned_upright_and_pil_images_are_not(tmp_path):
    image = noise(40, 60)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    path.write_bytes(encoded(image, exif=exif))
    assert decode(path).size == (40, 60)
    assert decode(path.read_bytes()).size == (40, 60)
    settings = ImageSettings()
    by_path = processor(settings)(str(path), return_tensors="np")
    np.testing.assert_array_equal(load_patches(path, settings)[0], by_path["pixel_values"])
    with PIL.Image.open(path) as opened:
        by_image = processor(settings)(opened, return_tensors="np")
        np.testing.assert_array_equal(load_patches(opened, settings)[0], by_image["pixel_values"])


@pytest.mark.parametrize("settings", SETTINGS)
def test_denormalize_is_the_inverse(settings):
    side = settings.factor
    pixels = np.asarray(noise(3 * side, 5 * side))
    patches, grid = patchify(pixels, settings)
    np.testing.assert_array_equal(denormalize(patches, grid, settings), pixels)
    with pytest.raises(ValueError, match="expected"):
        denormalize(patches[1:], grid, settings)


def test_settings_survive_the_processor_config():
    for settings in SETTINGS:
        assert ImageSettings.from_processor_config(settings.to_processor_config()) == settings
    assert ImageSettings.from_processor_config({}) == ImageSettings()
    sizes = {"size": {"shortest_edge": 784, "longest_edge": 7840}}
    assert ImageSettings.from_processor_config(sizes).max_pixels == 7840


@pytest.mark.parametrize(
    "values", [{"patch_size": 0}, {"min_pixels": 10, "max_pixels": 5}, {"image_mean": (0.5,)}]
)
def test_settings_are_checked(values):
    with pytest.raises(ValueError):
        ImageSettings(**values)


def test_extreme_aspect_ratio_names_ratio_and_record():
    with pytest.raises(ValueError, match=r"row 7.*aspect ratio.*5000"):
        resize(noise(1, 5000), ImageSettings(), "row 7")
    with pytest.raises(ValueError, match="empty"):
        target_size(0, 5, ImageSettings())
    assert resize(noise(1, 200), ImageSettings()).height == 28


@pytest.mark.parametrize(("image_format", "kept"), [("JPEG", 0.5), ("JPEG", 0.9), ("PNG", 0.5)])
def test_truncated_image_names_the_record(tmp_path, image_format, kept):
    content = encoded(noise(200, 200), image_format)
    content = content[: int(len(content) * kept)]
    with pytest.raises(ValueError, match=r"page 3.*cannot read image"):
        decode(content, "page 3")
    path = tmp_path / "cut.img"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"page 3.*cut\.img"):
        decode(path, "page 3")
    with pytest.raises(ValueError, match="page 3"):
        decode(PIL.Image.open(path), "page 3")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_garbage_names_the_record(content):
    with pytest.raises(ValueError, match=r"row 1.*cannot read image"):
        decode(content, "row 1")


def test_whatever_a_decoder_raises_names_the_record(odd_dds):
    with pytest.raises(ValueError, match=r"row 1: cannot read image in memory: Unimplemented"):
        decode(odd_dds, "row 1")
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    content = encoded(noise(40, 60), "JPEG", exif=exif)
    content = content.replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")  # a width that is text
    with pytest.raises(ValueError, match=r"row 1: cannot read image .*not an integer"):
        decode(content, "row 1")


def test_missing_and_remote_files(tmp_path):
    with pytest.raises(ValueError, match=r"row 1: image file not found: .*absent\.png"):
        decode(tmp_path / "absent.png", "row 1")
    with pytest.raises(ValueError, match="local file"):
        decode("https://example.org/a.png", "row 1")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_decompression_bomb(side):
    bomb = encoded(PIL.Image.new("1", (side, side)))
    with pytest.raises(ValueError, match=r"row 1: cannot read image.*pixels"):
        decode(bomb, "row 1")


@pytest.mark.parametrize(
    "array", [np.zeros((28, 28, 3)), np.zeros((28, 30, 3), np.uint8), np.zeros((28, 28), np.uint8)]
)
def test_patchify_checks_its_input(array):
    with pytest.raises((ValueError, TypeError), match=r"image: expected .*, got"):
        patchify(array, ImageSettings())
