"""The model over packed batches, its tokenizer and its special layers."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from moca.data.encode import Encoder
from moca.data.images import ImageSettings
from moca.data.packing import pack
from moca.data.records import Document
from moca.model import MocaModel, PatchProjection, build_model, split_documents, tiny_config
from moca.saving import MASK_TOKEN, SPECIAL_TOKENS, Settings, build_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen3VLConfig,
)


@pytest.fixture
def batch(tiny_model, pictures):
    encoder = Encoder(tiny_model.tokenizer, tiny_model.image_settings)
    items = ["the quick fox", pictures[0], ["a", pictures[1], "b", pictures[2]], "z"]
    encoded = [encoder(Document.of(item)) for item in items]
    return pack(encoded, tiny_model.image_settings.merge_size, tiny_model.vlm.config.image_token_id)


def test_embeddings_are_normalised_means(tiny_model, batch):
    hidden = tiny_model.hidden_states(batch)
    assert hidden.shape == (len(batch.input_ids), tiny_model.hidden_size)
    bounds = batch.cu_seqlens.tolist()
    means = [hidden[a:b].mean(dim=0) for a, b in itertools.pairwise(bounds)]
    want = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    torch.testing.assert_close(tiny_model.embed(batch), want)
    torch.testing.assert_close(tiny_model(batch), want)


def test_documents_do_not_depend_on_their_pack(tiny_model, batch):
    parts = split_documents(batch, tiny_model.image_settings)
    assert [len(part) for part in parts] == [1] * 4
    assert sum(len(part.pixel_values) for part in parts) == len(batch.pixel_values)
    want = torch.cat([tiny_model.embed(part) for part in parts])
    torch.testing.assert_close(tiny_model.embed(batch), want)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_other_architectures(kind, tiny_tokenizer, pictures, tmp_path):
    base = tiny_config(tiny_tokenizer, hidden=64, layers=2, heads=2)
    text = {
        key: value
        for key, value in base.text_config.to_dict().items()
        if key not in ("model_type", "dtype", "layer_types", "sliding_window")
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 64, "hidden_size": 64}
        make = Qwen2VLConfig
    else:
        vision |= {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        text |= {"head_dim": 32}
        make = Qwen3VLConfig
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = make(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{name: getattr(base, name) for name in ids},
    )
    settings = ImageSettings(patch_size=8, min_pixels=256, max_pixels=5120)
    model = build_model(config, tiny_tokenizer, settings)
    encoder = Encoder(tiny_tokenizer, settings)
    encoded = [encoder(Document.of(item)) for item in ("text", ["a", pictures[0], "b"])]
    packed = pack(encoded, 2, model.vlm.config.image_token_id)
    want = model.embed(packed)
    model.save_pretrained(tmp_path / "model")
    loaded = MocaModel.from_pretrained(tmp_path / "model", attn_implementation="eager")
    torch.testing.assert_close(loaded.embed(packed), want, atol=1e-4, rtol=1e-4)


def test_patch_projection_is_the_convolution():
    torch.manual_seed(0)
    for bias in (False, True):
        convolution = torch.nn.Conv3d(3, 16, (2, 4, 4), stride=(2, 4, 4), bias=bias)
        projection = PatchProjection(copy.deepcopy(convolution))
        assert dict(projection.state_dict()).keys() == dict(convolution.state_dict()).keys()
        patches = torch.randn(9, 3, 2, 4, 4, requires_grad=True)
        want, got = convolution(patches).view(9, 16), projection(patches)
        torch.testing.assert_close(got, want)
        want.square().sum().backward()
        d_patches, patches.grad = patches.grad, None
        got.square().sum().backward()
        torch.testing.assert_close(patches.grad, d_patches)
        torch.testing.assert_close(projection.weight.grad, convolution.weight.grad)


def test_patch_projection_refuses_other_convolutions():
    with pytest.raises(ValueError, match="stride is its kernel"):
        PatchProjection(torch.nn.Conv3d(3, 16, (2, 4, 4), stride=(2, 2, 2)))


def test_state_names_are_those_of_transformers(tiny_model):
    plain = AutoModelForImageTextToText.from_config(tiny_model.vlm.config)
    assert tiny_model.vlm.state_dict().keys() == plain.state_dict().keys()


def test_run_layer_attends_inside_documents(tiny_model, batch):
    layer = copy.deepcopy(tiny_model.language_model.layers[0])
    hidden = tiny_model.hidden_states(batch).detach()
    states = tiny_model.run_layer(layer, hidden, batch)
    changed = hidden.clone()
    changed[-1] += 1
    again = tiny_model.run_layer(layer, changed, batch)
    start = int(batch.cu_seqlens[-2])
    torch.testing.assert_close(again[:start], states[:start])
    assert not torch.allclose(again[start], states[start])


def test_run_layer_is_the_layer_of_the_tower(tiny_model, batch):
    embedded = {}
    first, second = tiny_model.language_model.layers
    first.register_forward_pre_hook(lambda module, args: embedded.update(states=args[0][0]))
    hidden = tiny_model.hidden_states(batch)
    states = embedded["states"]
    for layer in (first, second):
        states = tiny_model.run_layer(layer, states, batch)
    torch.testing.assert_close(tiny_model.language_model.norm(states), hidden)


def test_causal_model_with_last_pooling(tiny_tokenizer, tiny_settings, tmp_path):
    config = tiny_config(tiny_tokenizer, hidden=64, layers=2, heads=2, vision_layers=1)
    model = build_model(config, tiny_tokenizer, tiny_settings, bidirectional=False, pooling="last")
    encoder = Encoder(tiny_tokenizer, tiny_settings)
    long, short = (
        pack([encoder(Document.of(text))], 2, model.vlm.config.image_token_id)
        for text in ("the quick brown fox", "the quick")
    )
    size = len(short.input_ids)
    assert torch.equal(long.input_ids[:size], short.input_ids)
    states = model.hidden_states(long)
    torch.testing.assert_close(states[:size], model.hidden_states(short))
    want = torch.nn.functional.normalize(states[-1:], dim=-1)
    torch.testing.assert_close(model.embed(long), want)
    model.save_pretrained(tmp_path / "model")
    loaded = MocaModel.from_pretrained(tmp_path / "model")
    assert loaded.settings == Settings(bidirectional=False, pooling="last")
    torch.testing.assert_close(loaded.embed(long), want)
    converted = MocaModel.from_pretrained(tmp_path / "model", bidirectional=True, pooling="mean")
    assert not torch.allclose(converted.hidden_states(long)[:size], states[:size])


def test_gradients_reach_every_parameter(tiny_model, batch):
    tiny_model.embed(batch).square().mul(torch.arange(tiny_model.hidden_size)).sum().backward()
    missing = [name for name, p in tiny_model.named_parameters() if p.grad is None]
    assert missing == []


def test_small_branches_leave_states_near_their_tokens(tiny_tokenizer, tiny_settings):
    config = tiny_config(tiny_tokenizer, hidden=128, layers=2, heads=2, vision_layers=1)
    encoded = Encoder(tiny_tokenizer, tiny_settings)(Document.of("the quick brown fox"))
    near = []
    for scale in (1.0, 0.01):
        model = build_model(
            copy.deepcopy(config), tiny_tokenizer, tiny_settings, branch_scale=scale
        )
        batch = pack([encoded], 2, model.vlm.config.image_token_id)
        with torch.inference_mode():
            tokens = model.language_model.embed_tokens(batch.input_ids)
            states = model.hidden_states(batch)
        near.append(torch.nn.functional.cosine_similarity(tokens, states).mean())
    assert near[0] < 0.8 and near[1] > 0.99


def test_build_model_is_seeded_and_scaled(tiny_tokenizer, tiny_settings):
    config = tiny_config(tiny_tokenizer, hidden=128, layers=1, heads=2, vision_layers=1)
    state = torch.get_rng_state()
    first, second, other = (
        build_model(copy.deepcopy(config), tiny_tokenizer, tiny_settings, init_std=0.05, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    weights = [m.language_model.layers[0].mlp.up_proj.weight for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    for weight in (weights[0], first.vlm.model.visual.blocks[0].mlp.up_proj.weight):
        assert abs(weight.std().item() - 0.05) < 0.002


def test_settings_that_do_not_fit_are_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"\(8, 2, 2\), got \(14, 2, 2\)"):
        MocaModel(tiny_model.vlm, tiny_tokenizer, ImageSettings())
    with pytest.raises(ValueError, match="'mean' or 'last', got 'max'"):
        Settings(pooling="max")


def test_an_empty_pooling_is_not_the_saved_one(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="'mean' or 'last', got ''"):
        MocaModel.from_pretrained(tmp_path / "model", pooling="")


@pytest.mark.parametrize("place", ["./nothere", "no/such/folder", "~/nothere", "/nothere"])
def test_a_folder_that_is_not_there_is_no_name_of_the_hub(place):
    with pytest.raises(FileNotFoundError, match=f"{place}: there is no such folder"):
        MocaModel.from_pretrained(place)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"bidirectional": "false"}', "moca.json: bidirectional: expected true or false, got 'f"),
        ('{"temperature": "warm"}', "moca.json: temperature: expected a number or null, got 'warm"),
        ('{"pooling": 3}', "moca.json: pooling: expected 'mean' or 'last', got 3"),
        ('{"pool": "mean"}', r"moca.json: unknown keys \['pool'\]"),
        ("[1]", "moca.json: expected names and values, got list"),
    ],
)
def test_settings_of_another_type_are_refused(tiny_model, tmp_path, text, message):
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "moca.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        MocaModel.from_pretrained(tmp_path / "model")


def test_weights_that_are_not_finite_are_told(tiny_model, tmp_path):
    with torch.no_grad():
        tiny_model.language_model.layers[1].mlp.up_proj.weight[3] = float("nan")
    tiny_model.save_pretrained(tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"hidden states of this .* are not finite"):
        MocaModel.from_pretrained(tmp_path / "model")


class TestTokenizer:
    def test_special_tokens_are_whole(self, tiny_tokenizer):
        for token in SPECIAL_TOKENS:
            assert tiny_tokenizer.tokenize(f"a{token}b").count(token) == 1
        assert tiny_tokenizer.mask_token == MASK_TOKEN
        assert len(set(tiny_tokenizer.all_special_ids)) == len(SPECIAL_TOKENS)

    @pytest.mark.parametrize(
        ("text", "want"),
        [
            ("naïve café 😀\n\t x", "naïve café 😀 x"),
            ("日本語 text", "日本語 text"),
            ("  Leading", "leading"),
            ("\x00\x7f", "\x00\x7f"),
        ],
    )
    def test_every_letter_comes_back(self, tiny_tokenizer, text, want):
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tiny_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == " " + want

    def test_a_word_is_the_same_wherever_it_stands(self, tiny_tokenizer, tmp_path):
        forms = ["text", "Text", "TEXT", " text ", "<|im_end|>text", "\ntext<|im_end|>"]
        tiny_tokenizer.save_pretrained(tmp_path)
        for tokenizer in (tiny_tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            found = {tuple(t for t in tokenizer.tokenize(f) if t[0] != "<") for f in forms}
            assert len(found) == 1, found
            assert set(tokenizer.tokenize("\n text\n\nText")) == set(found.pop())

    def test_size(self):
        words = [f"{a}{b}{c}" for a in "abcde" for b in "fghij" for c in "klmno"]
        tokenizer = build_tokenizer([" ".join(words)], vocab_size=300)
        assert len(tokenizer) == 300
        assert max(tokenizer.get_vocab().values()) == 299

    def test_markers_in_the_corpus_are_not_learnt(self):
        tokenizer = build_tokenizer(["<|vision_start|><|image_pad|><|vision_end|>"] * 50, 300)
        learnt = [token for token in tokenizer.get_vocab() if token not in SPECIAL_TOKENS]
        assert not [token for token in learnt if "im" in token or "<|" in token]

    def test_too_small_is_refused(self):
        with pytest.raises(ValueError, match=r"at least 265, got 100"):
            build_tokenizer(["text"], 100)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_mask_token_is_added_to_a_checkpoint(tiny_settings, tmp_path, spare, tied):
    # A checkpoint that has never heard of a mask: the token's own row does not exist.
    trained = build_tokenizer(["some text to learn from"] * 3, 280)
    vocabulary = {t: i for t, i in trained.get_vocab().items() if t not in SPECIAL_TOKENS}
    merges = json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]
    plain = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in merges],
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token != MASK_TOKEN],
    )
    assert plain.mask_token is None
    config = tiny_config(plain, hidden=64, layers=1, heads=2, vision_layers=1)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    config.text_config.vocab_size = len(plain) + spare
    used = len(plain)
    vlm = AutoModelForImageTextToText.from_config(config, attn_implementation="moca_fast")
    before = vlm.get_input_embeddings().weight.detach().clone()
    model = MocaModel(vlm, plain, tiny_settings)
    assert model.mask_token_id == used
    rows = used + max(spare, 1)
    for weight in (model.language_model.embed_tokens.weight, model.lm_head_weight):
        assert weight.shape[0] == rows == config.text_config.vocab_size
        np.testing.assert_allclose(
            weight[used].detach(), weight[:used].mean(dim=0).detach(), atol=1e-6
        )
    torch.testing.assert_close(model.language_model.embed_tokens.weight[:used], before[:used])
    assert (model.lm_head_weight is model.language_model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "model")
    loaded = MocaModel.from_pretrained(tmp_path / "model")
    assert loaded.mask_token_id == used
    torch.testing.assert_close(loaded.lm_head_weight, model.lm_head_weight)
