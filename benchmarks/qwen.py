"""Models of Qwen2.5-VL's published sizes (its config.json) with random weights. Nothing is fetched.

T tokens, N patches, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from moca.data.images import ImageSettings
from moca.model import MocaModel, build_model
from moca.saving import build_tokenizer
from transformers import Qwen2_5_VLConfig

WINDOW = 112  # pixels along a side of the vision tower's windows
INIT_STD = 0.02


@dataclass(frozen=True)
class Tower:
    """The text or the vision tower: width, that of its feed-forward, layers, heads."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int

    def products(self) -> int:
        """Weights of the matrices of a layer."""
        keys = self.width * self.kv_heads // self.heads
        return 2 * self.width**2 + 2 * self.width * keys + 3 * self.width * self.inner


@dataclass(frozen=True)
class Shape:
    """A model.

    Args:
        full_layers: layers of the vision tower that see the whole image; the others see windows.
        sections: of the rotary frequencies, for time, height and width.
    """

    name: str
    vocabulary: int
    text: Tower
    vision: Tower
    full_layers: tuple[int, ...]
    sections: tuple[int, int, int]

    def config(self) -> Qwen2_5_VLConfig:
        start, image, end = special_ids()
        text = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.text.width,
            "intermediate_size": self.text.inner,
            "num_hidden_layers": self.text.layers,
            "num_attention_heads": self.text.heads,
            "num_key_value_heads": self.text.kv_heads,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": list(self.sections),
            },
        }
        vision = {
            "depth": self.vision.layers,
            "hidden_size": self.vision.width,
            "intermediate_size": self.vision.inner,
            "num_heads": self.vision.heads,
            "out_hidden_size": self.text.width,
            "window_size": WINDOW,
            "fullatt_block_indexes": list(self.full_layers),
        }
        return Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=True,
            image_token_id=image,
            video_token_id=tokenizer().convert_tokens_to_ids("<|video_pad|>"),
            vision_start_token_id=start,
            vision_end_token_id=end,
        )

    def flops(
        self,
        documents: Sequence[int],
        images: Sequence[int],
        *,
        counted: int,
        hidden: int,
        patch_dim: int,
    ) -> float:
        """Operations of a step of stage 1, in matrix products (two a weight and row forward, twice
        that backward) and attention (its backward is 2.5 forwards, by convention).

        Args:
            documents: tokens of each.
            images: patches of each.
            counted: tokens with a loss.
            hidden: masked image tokens.
            patch_dim: values of a patch.
        """
        tokens, patches = sum(documents), sum(images)
        text, vision = self.text, self.vision
        layers = text.layers + 1  # with that of the decoder
        merged = 4 * vision.width
        products: float = (
            layers * text.products() * tokens + vision.layers * vision.products() * patches
        )
        products += vision.width * patch_dim * patches
        products += (merged**2 + merged * text.width) * patches / 4
        products += text.width * (self.vocabulary * counted + 4 * patch_dim * hidden)
        window = (WINDOW // ImageSettings().patch_size) ** 2
        full, parts = len(self.full_layers), vision.layers - len(self.full_layers)
        pairs = layers * text.width * sum(length**2 for length in documents)
        pairs += full * vision.width * sum(size**2 for size in images)
        pairs += parts * vision.width * sum(min(size, window) * size for size in images)
        return 6 * products + 14 * pairs


QWEN_3B = Shape(
    "Qwen2.5-VL-3B",
    vocabulary=151936,
    text=Tower(2048, 11008, 36, 16, 2),
    vision=Tower(1280, 3420, 32, 16, 16),
    full_layers=(7, 15, 23, 31),
    sections=(16, 24, 24),
)
TINY = Shape(
    "tiny",
    vocabulary=600,
    text=Tower(64, 96, 2, 4, 2),
    vision=Tower(64, 96, 2, 4, 4),
    full_layers=(1,),
    sections=(2, 3, 3),
)


@lru_cache
def tokenizer() -> Any:
    """Only its special tokens matter: words are drawn as numbers."""
    return build_tokenizer(["a word"], 300)


def special_ids() -> tuple[int, int, int]:
    """Of the tokens at the start of an image, in it, and at its end."""
    names = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    start, image, end = map(tokenizer().convert_tokens_to_ids, names)
    return start, image, end


def build(shape: Shape, attention: str, device: torch.device, dtype: torch.dtype) -> MocaModel:
    """The same weights for every attention implementation, made on the device; activations are
    made again in the backward."""
    config = shape.config()
    config.dtype = dtype
    with torch.device(device):
        torch.manual_seed(0)
        model = build_model(
            config,
            tokenizer(),
            ImageSettings(),
            init_std=INIT_STD,
            attn_implementation=attention,
        )
    model.vlm.gradient_checkpointing_enable()
    return model.train()
