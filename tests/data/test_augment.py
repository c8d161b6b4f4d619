"""Random changes to training images: what each one does, and that nothing else happens."""

import numpy as np
import PIL.Image
import pytest
from moca.data.augment import ImageChanges, augment_images, drop_tokens
from moca.data.encode import Encoded
from moca.data.records import IMAGE_MARKER, Document


def document(pixels: np.ndarray) -> Document:
    return Document(IMAGE_MARKER, (PIL.Image.fromarray(pixels),))


def changed(pixels: np.ndarray, seed: int = 0, **changes: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    result = augment_images(document(pixels), rng, ImageChanges(**changes))
    return np.asarray(result.images[0]).astype(int)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def spot(height: int = 61, width: int = 81, size: int = 4) -> np.ndarray:
    """A dark square in the middle of a white image."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    row, column = height // 2, width // 2
    pixels[row - size : row + size + 1, column - size : column + size + 1] = 0
    return pixels


def darkness(pixels: np.ndarray) -> tuple[float, float, float]:
    """How much is dark, and the row and column of its middle."""
    dark = 255.0 - pixels[..., 0]
    rows, columns = np.indices(dark.shape)
    total = dark.sum()
    return total / 255, (dark * rows).sum() / total, (dark * columns).sum() / total


def test_nothing_asked_for_changes_nothing(noise):
    given = document(noise)
    assert augment_images(given, np.random.default_rng(0), ImageChanges()) is given


def test_flip_mirrors_left_to_right(noise):
    assert (changed(noise, flip=1.0) == noise[:, ::-1]).all()


def test_flip_happens_with_its_probability(noise):
    flipped = [(changed(noise, seed, flip=0.25) == noise[:, ::-1]).all() for seed in range(200)]
    assert 30 <= sum(flipped) <= 70


def test_shift_moves_by_at_most_its_fraction():
    moved = np.array([darkness(changed(spot(), seed, shift=0.2)) for seed in range(50)])
    assert np.allclose(moved[:, 0], 81, rtol=1e-2)
    for axis, side in ((1, 61), (2, 81)):
        away = np.abs(moved[:, axis] - side // 2)
        assert away.max() <= 0.2 * side + 0.5
        assert away.max() > 0.15 * side


def test_zoom_changes_the_size_by_at_most_its_fraction():
    sizes = [darkness(changed(spot(), seed, zoom=0.5))[0] / 81 for seed in range(50)]
    assert 0.5**2 * 0.9 <= min(sizes) < 0.5
    assert 1.8 < max(sizes) <= 1.5**2 * 1.1


def test_rotation_keeps_the_middle_and_the_size():
    pixels = spot()
    pixels[30, 40:60] = 0
    turned = changed(pixels, rotate=45.0)
    assert (turned[30, 55:60] > 128).all()
    assert turned[30, 40, 0] < 128
    assert darkness(turned)[0] == pytest.approx(darkness(pixels)[0], rel=0.05)


def test_what_comes_into_view_is_white():
    black = np.zeros((40, 40, 3), np.uint8)
    turned = changed(black, rotate=45.0)
    assert (turned == 255).any()
    assert (turned[15:25, 15:25] == 0).all()


def test_dropping_tokens_spares_the_special_ones():
    ids = np.arange(1000)
    encoded = Encoded(ids, np.zeros((0, 4), np.float32), np.zeros((0, 3), np.int64))
    kept = drop_tokens(encoded, np.random.default_rng(0), 0.5, np.arange(100)).input_ids
    assert (kept[:100] == np.arange(100)).all()
    assert 400 <= len(kept) - 100 <= 500
