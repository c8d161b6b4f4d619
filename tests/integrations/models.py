"""Tiny random models of the three Qwen-VL architectures, and documents with images for them."""

from dataclasses import dataclass

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCAB, IMAGE, VIDEO, START, END = 120, 5, 6, 3, 4
PATCH, MERGE = 4, 2
ARCHITECTURES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_dropout": 0.0,
    "rope_parameters": MROPE,
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def make_model(architecture: str, implementation: str, causal: bool = True):
    """Random weights, the same for every implementation."""
    vision = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": MERGE}
    text = dict(TEXT) if causal else {**TEXT, "is_causal": False}
    if architecture == "qwen2_vl":
        vision |= {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **IDS)
        kind = Qwen2VLForConditionalGeneration
    elif architecture == "qwen2_5_vl":
        # Windows of 16 pixels, 2 x 2 image tokens: several in every image below.
        vision |= {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS)
        kind = Qwen2_5_VLForConditionalGeneration
    else:
        text |= {"head_dim": 16}
        vision |= {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **IDS)
        kind = Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    return model.eval()


@dataclass
class Sample:
    """One document: ids (L,), pixels (N, P), grids (I, 3)."""

    ids: torch.Tensor
    pixels: torch.Tensor
    grids: torch.Tensor


def make_samples(shapes=((3, (4, 6), 5), (7,), (2, (8, 4), 3, (6, 6)), (1,), ((4, 4),))):
    """Documents from sequences of text lengths and (height, width) of images in patches."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for shape in shapes:
        ids, pixels, grids = [], [], []
        for part in shape:
            if isinstance(part, int):
                ids.append(torch.randint(10, VOCAB, (part,), generator=generator))
                continue
            height, width = part
            count = height * width // MERGE**2
            ids.append(torch.tensor([START, *[IMAGE] * count, END]))
            size = (height * width, 3 * 2 * PATCH**2)
            pixels.append(torch.randn(size, generator=generator))
            grids.append([1, height, width])
        samples.append(
            Sample(
                torch.cat(ids),
                torch.cat(pixels) if pixels else torch.zeros(0, 3 * 2 * PATCH**2),
                torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
            )
        )
    return samples


def inputs_of(model, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Padded inputs of a batch of documents; positions are left to the model."""
    length = max(len(s.ids) for s in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, sample in enumerate(samples):
        ids[i, : len(sample.ids)] = sample.ids
        mask[i, : len(sample.ids)] = 1
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}
    if len(samples) > 1:
        inputs["attention_mask"] = mask
    grids = torch.cat([s.grids for s in samples])
    if len(grids):
        inputs |= {"pixel_values": torch.cat([s.pixels for s in samples]), "image_grid_thw": grids}
    return inputs


def positions_of(model, sample: Sample) -> torch.Tensor:
    """(4, L) a text row, then the model's own rotary positions."""
    text = torch.arange(len(sample.ids))
    if not len(sample.grids):
        return text.expand(4, -1)
    rope, _ = model.model.get_rope_index(
        sample.ids[None], (sample.ids[None] == IMAGE).int(), image_grid_thw=sample.grids
    )
    return torch.cat([text[None], rope[:, 0]])


def packed_inputs(model, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """One row of all documents, with positions (4, 1, T); cu_seqlens are left out."""
    ids = torch.cat([s.ids for s in samples])[None]
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "position_ids": torch.cat([positions_of(model, s) for s in samples], dim=1)[:, None],
        "use_cache": False,
    }
    grids = torch.cat([s.grids for s in samples])
    if len(grids):
        inputs |= {"pixel_values": torch.cat([s.pixels for s in samples]), "image_grid_thw": grids}
    return inputs


def boundaries(samples: list[Sample]) -> torch.Tensor:
    """cu_seqlens (B + 1,) int32."""
    lengths = torch.tensor([0, *(len(s.ids) for s in samples)])
    return lengths.cumsum(0).to(torch.int32)
