"""Packing: positions as transformers computes them, documents back to back, batches by cost."""

import numpy as np
import pytest
import torch
import transformers
from moca.data.encode import Encoded, Encoder
from moca.data.packing import batches_by_cost, document_cost, mrope_positions, pack
from moca.data.records import IMAGE_MARKER, Document

IMAGE, START, END = 5, 6, 7
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def random_document(rng, images, merge):
    ids, grids = [], []
    for _ in range(images):
        ids += rng.integers(8, 32, rng.integers(0, 6)).tolist()
        height, width = (rng.integers(1, 6, 2) * merge).tolist()
        grids.append((1, height, width))
        ids += [START, *[IMAGE] * (height * width // merge**2), END]
    ids += rng.integers(8, 32, rng.integers(0 if images else 1, 6)).tolist()
    grids = np.asarray(grids, np.int64).reshape(-1, 3)
    patches = rng.random((grids.prod(axis=1).sum(), 4), np.float32)
    return Encoded(np.asarray(ids, np.int64), patches, grids, "doc")


def tiny_model(family, merge):
    vision = {"spatial_merge_size": merge, "depth": 1}
    if family == "Qwen2VL":
        vision |= {"embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    elif family == "Qwen2_5_VL":
        vision |= {
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": 16,
        }
    else:
        vision |= {
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": 16,
        }
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = getattr(transformers, f"{family}Config")(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    with torch.device("meta"):
        return getattr(transformers, f"{family}Model")(config)


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_positions_equal_those_of_transformers(family, merge):
    model, rng = tiny_model(family, merge), np.random.default_rng(merge)
    for images in (0, 1, 1, 2, 5):
        document = random_document(rng, images, merge)
        ids = torch.from_numpy(document.input_ids)[None]
        expected, _ = model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == IMAGE).int(),
            image_grid_thw=torch.from_numpy(document.grids) if images else None,
        )
        got = mrope_positions(document.input_ids, document.grids, merge, IMAGE)
        np.testing.assert_array_equal(got, expected[:, 0].numpy())


def test_pack_puts_documents_back_to_back():
    rng = np.random.default_rng(0)
    documents = [random_document(rng, images, 2) for images in (2, 0, 1, 3)]
    batch = pack(documents, 2, IMAGE)
    lengths = [len(document) for document in documents]
    assert len(batch) == 4 and batch.max_length == max(lengths)
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    dtypes = (batch.input_ids.dtype, batch.position_ids.dtype, batch.cu_seqlens.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.int32)
    assert (batch.pixel_values.dtype, batch.image_grid_thw.dtype) == (torch.float32, torch.int64)
    assert batch.mm_token_type_ids.dtype == torch.int32
    assert batch.position_ids.shape == (4, sum(lengths))
    for i, document in enumerate(documents):
        span = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
        assert batch.input_ids[span].tolist() == document.input_ids.tolist()
        assert batch.position_ids[0, span].tolist() == list(range(len(document)))
        alone = mrope_positions(document.input_ids, document.grids, 2, IMAGE)
        np.testing.assert_array_equal(batch.position_ids[1:, span].numpy(), alone)
    assert torch.equal(batch.mm_token_type_ids.bool(), batch.input_ids == IMAGE)
    patches = np.concatenate([document.patches for document in documents])
    np.testing.assert_array_equal(batch.pixel_values.numpy(), patches)
    assert batch.image_grid_thw.shape == (6, 3)
    moved = batch.to("meta")
    assert moved.pixel_values.device.type == "meta" and moved.max_length == batch.max_length


def test_image_tokens_cost_more():
    assert document_cost(20, 6) == 20 + 3 * 6 and document_cost(20, 0) == 20


def test_pack_of_real_documents(tokenizer, settings, picture):
    encoder = Encoder(tokenizer, settings)
    documents = [Document(f"fox {IMAGE_MARKER} dog", (picture(),)), Document("only text")]
    encoded = [encoder(document) for document in documents]
    batch = pack(encoded, encoder.merge_size, encoder.image_token_id)
    assert batch.mm_token_type_ids.sum() == 6 and batch.pixel_values.shape == (24, 96)


def test_text_only_pack_keeps_the_width_of_patches(tokenizer, settings):
    encoder = Encoder(tokenizer, settings)
    batch = pack([encoder(Document("only text"))], 2, encoder.image_token_id)
    assert batch.pixel_values.shape == (0, settings.patch_dim)
    assert batch.image_grid_thw.shape == (0, 3)


def test_pack_refuses_what_does_not_match():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least one"):
        pack([], 2, IMAGE)
    document = random_document(rng, 1, 2)
    document.patches = document.patches[1:]
    with pytest.raises(ValueError, match="doc: grids of"):
        pack([document], 2, IMAGE)
    document = random_document(rng, 1, 2)
    document.input_ids = document.input_ids[document.input_ids != IMAGE]
    with pytest.raises(ValueError, match="doc: runs of image tokens"):
        pack([document], 2, IMAGE)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bucket", [1, 7, 1000])
def test_batches_hold_everything_once_within_the_budget(seed, bucket, monkeypatch):
    monkeypatch.setattr("moca.data.packing.BUCKET", bucket)
    costs = np.random.default_rng(3).integers(1, 101, 200)
    batches = batches_by_cost(costs, 100, seed=seed)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(0 < costs[batch].sum() <= 100 for batch in batches)
    assert batches == batches_by_cost(costs.tolist(), 100, seed=seed)


def test_batches_are_full_and_shuffled_by_seed():
    costs = [10] * 40
    assert batches_by_cost(costs, 100, seed=0) != batches_by_cost(costs, 100, seed=1)
    assert len(batches_by_cost(costs, 100, seed=0)) == 4
    assert batches_by_cost([], 10, seed=0) == []


def test_a_document_above_the_budget_is_named():
    with pytest.raises(ValueError, match="document 1 costs 11, above the budget of 10"):
        batches_by_cost([3, 11], 10, seed=0)
