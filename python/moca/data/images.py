"""Images: decode, resize and cut into patches, exactly as the Qwen2-VL image processor does.

A resized image of ``gh x gw`` patches becomes rows of ``P = 3 * temporal * patch * patch`` values,
ordered so that the ``merge x merge`` patches of one vision token are consecutive (arXiv
2409.12191). N patches, P values a patch, H W pixels.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

import moca_fast
from moca.data.records import ImageLike

# The limit of the Qwen2-VL processor: longer images cannot be resized to whole patches sensibly.
MAX_ASPECT_RATIO = 200
# Pillow's own threshold for a suspicious image; a quarter of a gigabyte once decoded.
MAX_DECODED_PIXELS = 89_478_485


@dataclass(frozen=True)
class ImageSettings:
    """How images become patches.

    Args:
        patch_size: side of a patch in pixels.
        merge_size: patches along each side of one vision token.
        temporal_patch_size: frames a patch spans; a still image is repeated.
        min_pixels: smallest resized area in pixels.
        max_pixels: largest resized area in pixels.
        image_mean: mean of each channel, RGB in [0, 1].
        image_std: standard deviation of each channel.

    Raises:
        ValueError: a size that is not positive, or min_pixels above max_pixels.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, float, float] = moca_fast.CLIP_MEAN
    image_std: tuple[float, float, float] = moca_fast.CLIP_STD

    def __post_init__(self) -> None:
        sizes = ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels")
        for field in sizes:
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        for field in ("image_mean", "image_std"):
            values = tuple(float(value) for value in getattr(self, field))
            if len(values) != 3:
                raise ValueError(f"{field} must have 3 values, got {len(values)}")
            object.__setattr__(self, field, values)

    @property
    def factor(self) -> int:
        """Side of one vision token in pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """P, the values of one patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_processor_config(cls, config: Mapping[str, Any]) -> ImageSettings:
        """Read a Qwen2-VL ``preprocessor_config.json``; what it leaves out keeps its default."""
        size = config.get("size") or {}
        values = {
            "min_pixels": config.get("min_pixels") or size.get("shortest_edge"),
            "max_pixels": config.get("max_pixels") or size.get("longest_edge"),
        }
        names = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
        values |= {name: config.get(name) for name in names}
        return cls(**{name: value for name, value in values.items() if value is not None})

    def to_processor_config(self) -> dict[str, Any]:
        """The ``preprocessor_config.json`` that makes transformers do the same."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": int(PIL.Image.Resampling.BICUBIC),
            "rescale_factor": 1 / 255,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_patch_size,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
        }


def decode(image: ImageLike, name: str = "") -> PIL.Image.Image:
    """Decode an image to RGB, with any transparency laid over white and 16-bit grey made 8-bit.

    Files and bytes are turned upright by their EXIF orientation. A PIL image is taken as it is,
    because the transformers processors do the same.

    Args:
        image: encoded bytes, a path or a PIL image.
        name: the record it belongs to, for error messages.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ValueError: missing, truncated, unreadable, far too large, or of integers or floats of
            unknown range (mode I or F); names the record.
    """
    where = f"{name}: " if name else ""
    label = "in memory"
    if isinstance(image, PIL.Image.Image):
        return _decoded(image, upright=False, message=f"{where}cannot read image {label}")
    if isinstance(image, bytes):
        source: Any = io.BytesIO(image)
    else:
        path = os.fspath(image)
        if str(path).startswith(("http://", "https://", "data:")):
            raise ValueError(f"{where}image must be a local file, got {str(path)[:80]!r}")
        if not os.path.isfile(path):
            raise ValueError(f"{where}image file not found: {path}")
        source, label = path, str(path)
    try:
        opened = PIL.Image.open(source)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{where}cannot read image {label}: its format is unknown") from error
    except Exception as error:  # of damaged files, decoders raise of every kind
        raise ValueError(f"{where}cannot read image {label}: {error}") from error
    with opened:
        return _decoded(opened, upright=True, message=f"{where}cannot read image {label}")


def _decoded(image: PIL.Image.Image, *, upright: bool, message: str) -> PIL.Image.Image:
    width, height = image.size
    if width * height > MAX_DECODED_PIXELS:
        raise ValueError(
            f"{message}: {width} x {height} pixels is above the limit of {MAX_DECODED_PIXELS}"
        )
    try:
        # Pillow opens 16 bits as 32 of some formats; a turned image does not know its format.
        sixteen = image.mode.startswith("I;16") or (
            image.mode == "I" and image.format in ("PNG", "PPM")
        )
        image = PIL.ImageOps.exif_transpose(image) if upright else image
        if sixteen:
            return _eight_bits(image).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(
                f"expected 8 or 16 bits a channel, got mode {image.mode}, whose range is unknown"
            )
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"{message}: {error}") from error


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """A 16-bit greyscale image in 8 bits; Pillow's own conversion makes it white."""
    values = np.asarray(image)
    if (clear := image.info.get("transparency")) is not None:
        values = np.where(values == clear, 65535, values)
    return PIL.Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def target_size(
    height: int, width: int, settings: ImageSettings, name: str = ""
) -> tuple[int, int]:
    """The size to resize to: multiples of the vision token, area in bounds, aspect ratio kept.

    Args:
        height: pixels.
        width: pixels.
        settings: bounds and patch sizes.
        name: the record, for error messages.

    Returns:
        (height, width) in pixels.

    Raises:
        ValueError: an aspect ratio above 200, or an empty image.
    """
    where = f"{name}: " if name else ""
    if min(height, width) < 1:
        raise ValueError(f"{where}an image of {width} x {height} pixels is empty")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(
            f"{where}the aspect ratio of an image must be at most {MAX_ASPECT_RATIO}, "
            f"got {ratio:g} ({width} x {height} pixels)"
        )
    factor, area = settings.factor, height * width
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > settings.max_pixels:
        shrink = math.sqrt(area / settings.max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / area)
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def resize(image: PIL.Image.Image, settings: ImageSettings, name: str = "") -> PIL.Image.Image:
    """Resize to `target_size` with bicubic filtering.

    Args:
        image: an RGB image.
        settings: bounds and patch sizes.
        name: the record, for error messages.

    Raises:
        ValueError: an aspect ratio above 200.
    """
    height, width = target_size(image.height, image.width, settings, name)
    return image.resize((width, height), PIL.Image.Resampling.BICUBIC)


def patchify(array: np.ndarray, settings: ImageSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Normalise an image and cut it into patches.

    Args:
        array: (H, W, 3) uint8, both sides a multiple of ``patch_size * merge_size``.
        settings: patch sizes, mean and standard deviation.

    Returns:
        patches (N, P) float32 and the grid (1, H / patch_size, W / patch_size).

    Raises:
        ValueError: another shape.
        TypeError: another dtype.
    """
    patches = moca_fast.patchify(
        torch.from_numpy(np.require(array, requirements="W")),  # torch warns of read-only arrays
        patch_size=settings.patch_size,
        merge_size=settings.merge_size,
        temporal_patch_size=settings.temporal_patch_size,
        mean=settings.image_mean,
        std=settings.image_std,
    )
    grid = 1, array.shape[0] // settings.patch_size, array.shape[1] // settings.patch_size
    return patches.numpy(), grid


def denormalize(
    patches: np.ndarray, grid: tuple[int, int, int] | np.ndarray, settings: ImageSettings
) -> np.ndarray:
    """Turn the patches of one image back into pixels, for reports: the inverse of `patchify`.

    Args:
        patches: (N, P) float; values outside the range of pixels are clipped. Frames are averaged.
        grid: (1, gh, gw) with gh * gw = N.
        settings: what they were made with.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: patches that do not fill the grid.
    """
    patch, merge = settings.patch_size, settings.merge_size
    _, rows, columns = (int(side) for side in grid)
    if patches.shape != (rows * columns, settings.patch_dim):
        raise ValueError(f"expected {(rows * columns, settings.patch_dim)}, got {patches.shape}")
    values = np.asarray(patches, np.float32).reshape(len(patches), 3, -1, patch**2).mean(axis=2)
    mean = np.asarray(settings.image_mean, np.float32)[:, None]
    std = np.asarray(settings.image_std, np.float32)[:, None]
    values = values * std + mean
    pixels = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
    blocks = pixels.reshape(rows // merge, columns // merge, merge, merge, 3, patch, patch)
    return blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
