"""The embedding model: a Qwen-VL model of transformers, its tokenizer and its image settings.

The method is MoCa (arXiv 2506.23115): attention is bidirectional inside a document, and a
document's embedding is the normalised mean of its token states. Nothing here subclasses
transformers, so the parameters keep the names that every other tool expects.

B documents, T packed tokens, D hidden size, N patches, P values a patch, I images.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2_5_VLConfig

import moca_fast
from moca.config import Precision
from moca.data.images import ImageSettings
from moca.data.packing import PackedBatch
from moca.saving import Settings, add_mask_token, read_directory, write_directory
from moca_fast.integrations.transformers import (
    NAME,
    make_bidirectional,
    pack_vision,
    packed_kwargs,
    use_mrope,
)


def resolve_precision(precision: str) -> str:
    """ "auto" is bf16 where the hardware multiplies it, else fp32.

    Raises:
        ValueError: none of "auto", "fp32" and "bf16".
    """
    if precision not in (names := get_args(Precision)):
        raise ValueError(f"precision: expected one of {names}, got {precision!r}")
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


class PatchProjection(nn.Module):
    """The patch embedding as a matrix product.

    A convolution whose stride is its kernel is a linear map of each patch; as `Conv3d` it is slow
    on CPUs. Holds the convolution's own parameters, so their names and shapes stay.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        if convolution.stride != convolution.kernel_size or any(convolution.padding):
            raise ValueError(
                "expected a patch embedding whose stride is its kernel and which has no padding, "
                f"got {convolution}"
            )
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        """(N, channels, frames, height, width) patches to (N, D)."""
        return nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class MocaModel(nn.Module):
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL model over packed batches.

    Args:
        vlm: `Qwen*VLForConditionalGeneration`; changed in place.
        tokenizer: its tokenizer.
        image_settings: how images become patches.
        bidirectional: let every token see its whole document; otherwise attention stays causal.
        pooling: "mean" or "last" (the usual one of causal models).

    Raises:
        ValueError: the tokenizer or the image settings do not fit the model, or an unknown pooling.
        RuntimeError: the model is still causal, documents of one pack see each other, or hidden
            states are not finite.
    """

    def __init__(
        self,
        vlm: PreTrainedModel,
        tokenizer: Any,
        image_settings: ImageSettings,
        *,
        bidirectional: bool = True,
        pooling: str = "mean",
    ) -> None:
        super().__init__()
        self.vlm = vlm
        self.tokenizer = tokenizer
        self.image_settings = image_settings
        self.settings = Settings(bidirectional=bidirectional, pooling=pooling)
        _check_images(vlm.config.vision_config, image_settings)
        add_mask_token(vlm, tokenizer)
        embed = vlm.model.visual.patch_embed
        if isinstance(embed.proj, nn.Conv3d):
            embed.proj = PatchProjection(embed.proj)
        if bidirectional:
            make_bidirectional(vlm)
        else:
            pack_vision(vlm)
        if vlm.config.get_text_config()._attn_implementation == NAME:
            use_mrope(vlm)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        *,
        attn_implementation: str = NAME,
        dtype: str | torch.dtype | None = None,
        bidirectional: bool | None = None,
        pooling: str | None = None,
    ) -> MocaModel:
        """Load a directory that `save_pretrained` wrote, or any Qwen-VL checkpoint.

        Args:
            directory: a local directory or the name of a hub repository. No code in it is run.
            attn_implementation: "moca_fast", or "sdpa" or "eager", which take one document at a
                time.
            dtype: of the weights; default as saved.
            bidirectional, pooling: override what the directory says. A checkpoint that was not
                saved here is taken for a causal one to be made bidirectional, with mean pooling.

        Raises:
            OSError, ValueError: a directory that is missing, incomplete or of another kind.
            RuntimeError: the model is still causal, or documents of one pack see each other.
        """
        folder = Path(directory)
        if (folder / "model/config.json").is_file() and not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder}: expected a model, got the folder of a run; did you mean {folder}/model?"
            )
        tokenizer, image_settings, settings = read_directory(directory)
        try:
            vlm = AutoModelForImageTextToText.from_pretrained(
                directory, attn_implementation=attn_implementation,
                dtype="auto" if dtype is None else dtype, trust_remote_code=False,
            )  # fmt: skip
        except SafetensorError as error:
            raise ValueError(f"{directory}: its weights are damaged: {error}") from error
        if bidirectional is None:
            bidirectional = settings.bidirectional
        if pooling is None:
            pooling = settings.pooling
        model = cls(vlm, tokenizer, image_settings, bidirectional=bidirectional, pooling=pooling)
        model.settings = Settings(bidirectional, pooling, settings.temperature)
        return model

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write a directory that this class, transformers and sentence-transformers can load.

        It takes the place of `directory` once it is complete.

        Raises:
            FileExistsError: `directory` holds what is no part of an earlier saved model.
        """
        write_directory(
            Path(directory), self.vlm, self.tokenizer, self.image_settings, self.settings
        )

    @property
    def language_model(self) -> Any:
        """The text tower: `.layers`, `.embed_tokens`, `.norm`, `.rotary_emb`."""
        return self.vlm.model.language_model

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.vlm.config.get_text_config().hidden_size

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, D), the matrix that turns hidden states into scores of tokens."""
        return self.vlm.get_output_embeddings().weight

    @property
    def mask_token_id(self) -> int:
        """The token that hides others in masked language modelling."""
        return self.tokenizer.mask_token_id

    @property
    def device(self) -> torch.device:
        return self.vlm.device

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """The last hidden states of packed documents: (T, D) in the dtype of the model."""
        if self.vlm.config.get_text_config()._attn_implementation != NAME:
            parts = [self._states(part) for part in split_documents(batch, self.image_settings)]
            return torch.cat(parts)
        return self._states(batch, **packed_kwargs(batch.cu_seqlens, batch.max_length))

    def embed(self, batch: PackedBatch) -> Tensor:
        """One unit vector a document: (B, D) float32."""
        hidden = self.hidden_states(batch)
        return moca_fast.pool(hidden, batch.cu_seqlens, mode=self.settings.pooling, normalize=True)

    def forward(self, batch: PackedBatch) -> Tensor:
        """As `embed`, so that wrappers of modules (data parallel, compile) find it."""
        return self.embed(batch)

    def run_layer(self, layer: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Run one more decoder layer over the hidden states of a packed batch: (T, D) to (T, D).

        The layer is of the text tower's kind, a copy of one of its layers for example; it attends
        as they do.

        Raises:
            ValueError: the model was not loaded with attn_implementation="moca_fast".
        """
        if self.vlm.config.get_text_config()._attn_implementation != NAME:
            raise ValueError(f"run_layer needs a model with attn_implementation={NAME!r}")
        states = hidden[None]
        position_ids = batch.position_ids[1:, None]
        return layer(
            states,
            attention_mask=None,
            position_embeddings=self.language_model.rotary_emb(states, position_ids),
            is_causal=not self.settings.bidirectional,
            **packed_kwargs(batch.cu_seqlens, batch.max_length),
        )[0]

    def _states(self, batch: PackedBatch, **kwargs: Any) -> Tensor:
        images: dict[str, Any] = {}
        if len(batch.image_grid_thw):
            images = {"pixel_values": batch.pixel_values, "image_grid_thw": batch.image_grid_thw}
        output = self.vlm.model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[:, None],
            mm_token_type_ids=batch.mm_token_type_ids[None],
            use_cache=False,
            **images,
            **kwargs,
        )
        return output.last_hidden_state[0]


def split_documents(batch: PackedBatch, settings: ImageSettings) -> list[PackedBatch]:
    """The documents of a packed batch as batches of one."""
    bounds = batch.cu_seqlens.tolist()
    sizes = (batch.image_grid_thw.prod(dim=1) // settings.merge_size**2).tolist()
    patches = [0, *(batch.image_grid_thw.prod(dim=1).cumsum(0)).tolist()]
    parts, image = [], 0
    for begin, end in itertools.pairwise(bounds):
        first, missing = image, int(batch.mm_token_type_ids[begin:end].sum())
        while missing > 0:
            missing -= sizes[image]
            image += 1
        parts.append(
            PackedBatch(
                input_ids=batch.input_ids[begin:end],
                position_ids=batch.position_ids[:, begin:end],
                cu_seqlens=batch.cu_seqlens.new_tensor([0, end - begin]),
                max_length=end - begin,
                pixel_values=batch.pixel_values[patches[first] : patches[image]],
                image_grid_thw=batch.image_grid_thw[first:image],
                mm_token_type_ids=batch.mm_token_type_ids[begin:end],
            )
        )
    return parts


def tiny_config(
    tokenizer: Any,
    *,
    hidden: int = 256,
    layers: int = 3,
    heads: int = 4,
    vision_hidden: int = 192,
    vision_layers: int = 3,
    vision_heads: int = 6,
    patch_size: int = 8,
    merge_size: int = 2,
    max_length: int = 2048,
) -> Qwen2_5_VLConfig:
    """A miniature Qwen2.5-VL for training from scratch on a small corpus.

    Args:
        tokenizer: its length is the vocabulary, its special tokens are the model's.
        hidden, layers, heads: width, depth and attention heads of the text tower.
        vision_hidden, vision_layers, vision_heads: the same of the vision tower, in which every
            layer sees the whole image: images of this size need no windows.
        patch_size: side of a patch in pixels.
        merge_size: patches along each side of one image token.
        max_length: most positions.
    """
    half = hidden // heads // 2  # rotary frequencies of a head: a quarter time, the rest split
    time = half - 2 * (half * 3 // 8)
    ids = {token: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for token in _CONFIG_TOKENS}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": _feed_forward(hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": True,
        "bos_token_id": ids["im_start"],
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["endoftext"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [time, half * 3 // 8, half * 3 // 8],
        },
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": vision_hidden,
        "intermediate_size": _feed_forward(vision_hidden),
        "num_heads": vision_heads,
        "out_hidden_size": hidden,
        "patch_size": patch_size,
        "spatial_merge_size": merge_size,
        "window_size": 8 * patch_size * merge_size,
        "fullatt_block_indexes": list(range(vision_layers)),
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )


def build_model(
    config: Qwen2_5_VLConfig,
    tokenizer: Any,
    image_settings: ImageSettings,
    *,
    init_std: float = 0.05,
    branch_scale: float = 1.0,
    seed: int = 0,
    attn_implementation: str = NAME,
    **kwargs: Any,
) -> MocaModel:
    """A model with random weights: normal with `init_std` for matrices, drawn from `seed`.

    Args:
        config: for example of `tiny_config`.
        branch_scale: factor on the first values of the matrices that write into the residual
            stream of the text tower. Where it is small, the states of a text are nearly the
            embeddings of its tokens, and texts with words in common are alike before any training.
        attn_implementation: as for `MocaModel.from_pretrained`.
        tokenizer, image_settings, kwargs: as for `MocaModel`.
    """
    parts: tuple[Any, ...] = (config, config.get_text_config(), config.vision_config)
    for part in parts:
        part.initializer_range = init_std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = AutoModelForImageTextToText.from_config(
            config, attn_implementation=attn_implementation
        )
    with torch.no_grad():
        for layer in vlm.model.language_model.layers:
            for branch in (layer.self_attn, layer.mlp):
                [*_, output] = [m for m in branch.modules() if isinstance(m, nn.Linear)]
                output.weight.mul_(branch_scale)
    return MocaModel(vlm.eval(), tokenizer, image_settings, **kwargs)


_CONFIG_TOKENS = (
    *("endoftext", "im_start", "im_end"),
    *("image_pad", "video_pad", "vision_start", "vision_end"),
)


def _feed_forward(hidden: int) -> int:
    """Width of a gated feed-forward block: 8/3 of the hidden size, in whole steps of 64."""
    return -(-hidden * 8 // (3 * 64)) * 64


def _check_images(vision: Any, settings: ImageSettings) -> None:
    want = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    got = (settings.patch_size, settings.merge_size, settings.temporal_patch_size)
    if want != got:
        raise ValueError(
            "expected image settings with the model's (patch_size, merge_size, "
            f"temporal_patch_size) {want}, got {got}"
        )
