"""Small models and corpora shared by the tests of the system."""

import importlib.util
import os
from pathlib import Path

import PIL.Image
import pytest
import tiny
import torch
from moca.data.images import ImageSettings
from moca.model import MocaModel, build_model, tiny_config
from moca.saving import build_tokenizer

TORCHVISION = Path(__file__).parents[2] / ".cache" / "torchvision"
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Layers are like a stack of slides or clothes on your body.",
    "A naïve café; 12 cafés and 345 emoji: 😀 🚀.\n\nNew paragraph, with\ttabs.",
)


@pytest.fixture(scope="session")
def torchvision_folder() -> str:
    """The folder of a torchvision that only sentence-transformers' processors see.

    It lies outside the environment, because its registry wheel does not import beside a CPU build
    of torch, and transformers tries to import whatever torchvision it finds.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return ""
    folder = Path(os.environ.get("MOCA_TEST_TORCHVISION", TORCHVISION))
    if not (folder / "torchvision").is_dir():
        pytest.fail(
            f"no torchvision in {folder}; run\n"
            f"pip install --no-deps --target {folder} torchvision==0.28.0"
        )
    return str(folder)


@pytest.fixture(scope="session")
def tiny_settings() -> ImageSettings:
    return ImageSettings(patch_size=8, min_pixels=16 * 16, max_pixels=20 * 16 * 16)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return build_tokenizer(TEXTS * 4, vocab_size=400)


@pytest.fixture
def tiny_model(tiny_tokenizer, tiny_settings) -> MocaModel:
    config = tiny_config(
        tiny_tokenizer,
        hidden=64,
        layers=2,
        heads=2,
        vision_hidden=64,
        vision_layers=2,
        vision_heads=2,
    )
    return build_model(config, tiny_tokenizer, tiny_settings)


@pytest.fixture(scope="session")
def pictures() -> list[PIL.Image.Image]:
    """Smooth pictures of several sizes, so that resampling is no source of noise."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for width, height in ((64, 48), (150, 90), (33, 100)):
        coarse = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8)
        image = PIL.Image.fromarray(coarse.numpy())
        images.append(image.resize((width, height), PIL.Image.Resampling.BICUBIC))
    return images


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    """Paths of the miniature model and of its corpora, for training."""
    folder = tmp_path_factory.mktemp("data")
    paths = {name: str(path) for name, path in tiny.write_data(folder).items()}
    return {**paths, "model": str(tiny.write_model(folder / "model"))}
