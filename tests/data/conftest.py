"""What the data tests share: a tiny tokenizer of the Qwen kind, and pictures of noise."""

import io
import struct

import numpy as np
import PIL.Image
import pytest
import tokenizers
from moca.data.images import ImageSettings
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]


@pytest.fixture(scope="session")
def tokenizer():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 4], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def settings():
    return ImageSettings(patch_size=4, merge_size=2, min_pixels=8 * 8, max_pixels=40 * 40)


@pytest.fixture(scope="session")
def odd_dds():
    """A picture of an unknown format: Pillow raises NotImplementedError when it opens it."""
    head = struct.pack("<4s7I44x", b"DDS ", 124, 0x1007, 4, 4, 0, 0, 0)
    return head + struct.pack("<II4s20x20x", 32, 4, b"ABCD")


@pytest.fixture(scope="session")
def picture():
    """Makes PNG bytes of noise: ``picture(height, width, seed=0)``."""

    def make(height=16, width=24, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return make
