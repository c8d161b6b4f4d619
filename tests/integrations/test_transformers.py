"""moca_fast attention inside transformers models, against their eager attention."""

import copy

import pytest
import torch
from models import (
    ARCHITECTURES,
    boundaries,
    inputs_of,
    make_model,
    make_samples,
    packed_inputs,
)
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForImageTextToText,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma3TextModel,
    Llama4TextConfig,
    Llama4TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    StaticCache,
    T5Config,
    T5EncoderModel,
)
from transformers.masking_utils import causal_mask_function, or_masks, sdpa_mask

from moca_fast.integrations import transformers as integration
from moca_fast.integrations.transformers import (
    attention_forward,
    make_bidirectional,
    pack_vision,
    packed_kwargs,
)

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
IMPLEMENTATIONS = ("eager", "moca_fast")
SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind, config, implementation):
    torch.manual_seed(0)
    model = kind._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def random_ids(*shape, vocab=60):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(2))


def separate_states(model, samples):
    return torch.cat([model.model(**inputs_of(model, [s]))[0][0] for s in samples])


def packed_states(model, samples):
    return model.model(**packed_inputs(model, samples), **packed_kwargs(boundaries(samples)))[0][0]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pack_matches_separate_eager_documents(architecture, causal):
    eager = make_model(architecture, "eager", causal)
    ours = make_model(architecture, "moca_fast")
    pack_vision(ours) if causal else make_bidirectional(ours)
    samples = make_samples()
    want, got = separate_states(eager, samples), packed_states(ours, samples)
    torch.testing.assert_close(got, want, **TOLERANCE)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    for states in (want, got):
        (states * weight).sum().backward()
    expected = dict(eager.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None, name
            continue
        scale = expected[name].grad.abs().max().clamp(min=1)
        torch.testing.assert_close(
            parameter.grad / scale, expected[name].grad / scale, **TOLERANCE, msg=name
        )
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_batch_matches_eager(architecture):
    samples = make_samples()
    eager = make_model(architecture, "eager", causal=False)
    ours = make_bidirectional(make_model(architecture, "moca_fast"))
    inputs = inputs_of(eager, samples)
    keep = inputs["attention_mask"].bool()
    want, got = eager.model(**inputs)[0], ours.model(**inputs)[0]
    torch.testing.assert_close(got[keep], want[keep], **TOLERANCE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vision_windows_run_in_one_call(architecture, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[3].num_queries)
        return original(*args, **kwargs)

    original = integration.attention
    monkeypatch.setattr(integration, "attention", counted)
    model = make_model(architecture, "moca_fast")
    samples = [s for s in make_samples() if len(s.grids)]
    pixels = torch.cat([s.pixels for s in samples])
    grids = torch.cat([s.grids for s in samples])
    with torch.no_grad():
        want = model.model.visual(pixels, grid_thw=grids).pooler_output
        separate = len(calls)
        calls.clear()
        assert pack_vision(model) == 2
        got = model.model.visual(pixels, grid_thw=grids).pooler_output
        assert calls == [len(pixels)] * 2
        assert separate > 2 * len(grids) - 1
        torch.testing.assert_close(got, want, **TOLERANCE)
        pack_vision(model)
        torch.testing.assert_close(model.model.visual(pixels, grid_thw=grids).pooler_output, got)
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            calls.clear()
            again = model.model.visual(pixels, grid_thw=grids).pooler_output
            torch.testing.assert_close(again, want, **TOLERANCE)
            assert not calls


def test_vision_hook_takes_positional_arguments():
    model = make_model("qwen3_vl", "moca_fast")
    layer = model.model.visual.blocks[0].attn
    hidden, bounds = torch.randn(20, 64), torch.tensor([0, 8, 20], dtype=torch.int32)
    rotary = (torch.ones(20, 16), torch.zeros(20, 16))
    want = layer(hidden, bounds, rotary)
    pack_vision(model)
    torch.testing.assert_close(layer(hidden, bounds, rotary), want, **TOLERANCE)


def test_hooks_follow_a_copy():
    model = make_bidirectional(make_model("qwen2_5_vl", "moca_fast"))
    samples = make_samples()
    twin = make_bidirectional(copy.deepcopy(model))
    torch.testing.assert_close(packed_states(twin, samples), packed_states(model, samples))


def test_gradient_checkpointing_gives_the_same_gradients():
    samples = make_samples()
    gradients = []
    for checkpointing in (False, True):
        model = make_bidirectional(make_model("qwen2_5_vl", "moca_fast")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        packed_states(model, samples).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_training_after_inference_mode():
    model = make_bidirectional(make_model("qwen2_5_vl", "moca_fast"))
    samples = make_samples()
    inputs, bounds = packed_inputs(model, samples), boundaries(samples)
    with torch.inference_mode():
        want = model.model(**inputs, **packed_kwargs(bounds))[0]
        model.model(**inputs_of(model, samples[:2]))
    got = model.model(**inputs, **packed_kwargs(bounds))[0]
    got.sum().backward()
    torch.testing.assert_close(got, want)


def test_vision_training_after_inference_mode():
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        image_size=12, patch_size=4,
    )  # fmt: skip
    model, pixels = build(SiglipVisionModel, config, "moca_fast"), torch.randn(2, 3, 12, 12)
    with torch.inference_mode():
        want = model(pixels).last_hidden_state
    got = model(pixels).last_hidden_state
    got.sum().backward()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", ["in place", "through data", "through numpy"])
def test_mask_follows_a_reused_buffer(write, inference):
    model = build(Qwen2ForCausalLM, Qwen2Config(**SMALL, is_causal=False), "moca_fast").model
    ids, old, new = random_ids(1, 9), [0, 4, 9], [0, 6, 9]

    def states(bounds):
        return model(ids, use_cache=False, **packed_kwargs(bounds))[0]

    with torch.inference_mode(inference):
        want = states(torch.tensor(new, dtype=torch.int32))
        buffer = torch.tensor(old, dtype=torch.int32)
        states(buffer)
        target = {"in place": buffer, "through data": buffer.data, "through numpy": buffer.numpy()}
        target[write][1] = new[1]
        assert torch.equal(states(buffer), want)


def test_masks_elsewhere_are_kept_by_version(monkeypatch):
    """On an accelerator, for which a device without values stands in: they cannot be compared."""
    monkeypatch.setattr(integration, "_make_mask", lambda *args: object())

    def mask_of(bounds):
        return integration._packed_mask(bounds, 9, False, None)

    bounds = torch.zeros(3, dtype=torch.int32, device="meta")
    first = mask_of(bounds)
    assert mask_of(bounds) is first
    bounds.zero_()
    assert mask_of(bounds) is not first
    with torch.inference_mode():
        uncounted = torch.zeros(3, dtype=torch.int32, device="meta")
        assert mask_of(uncounted) is not mask_of(uncounted)


def test_autocast():
    model = make_bidirectional(make_model("qwen2_5_vl", "moca_fast"))
    samples = make_samples()
    want = packed_states(model, samples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = packed_states(model, samples)
    got.float().sum().backward()
    assert torch.nn.functional.cosine_similarity(got.float(), want, dim=-1).min() > 0.99


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_positions_that_restart_never_leak(architecture):
    model = make_bidirectional(make_model(architecture, "moca_fast"))
    ids, rows = random_ids(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    want = torch.cat([model.model(part)[0] for part in ids.split([4, 5], dim=1)], dim=1)
    for positions in (rows, rows.expand(4, 1, -1)):
        got = model.model(ids, position_ids=positions, use_cache=False)[0]
        torch.testing.assert_close(got, want, **TOLERANCE)
    with pytest.raises(ValueError, match="where they begin"):
        model.model(ids, position_ids=rows.expand(3, 1, -1), use_cache=False)


@pytest.mark.parametrize("implementation", ["moca_fast", "sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bidirectional_survives_a_plain_reload(architecture, implementation, tmp_path):
    model = make_model(architecture, implementation).train()
    state = torch.get_rng_state()
    make_bidirectional(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    model.eval()
    sample = make_samples()[:1]
    want = model.model(**inputs_of(model, sample))[0]
    model.save_pretrained(tmp_path)
    for other in ("sdpa", "eager", "moca_fast"):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=other)
        assert loaded.config.get_text_config().is_causal is False
        torch.testing.assert_close(loaded.model(**inputs_of(loaded, sample))[0], want, **TOLERANCE)


def test_still_causal_is_refused():
    def always_causal(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("always_causal", always_causal)
    AttentionMaskInterface.register("always_causal", sdpa_mask)
    model = build(Qwen2ForCausalLM, Qwen2Config(**SMALL), "always_causal")
    with pytest.raises(RuntimeError, match="still causal"):
        make_bidirectional(model)


def test_leaking_pack_is_refused(monkeypatch):
    def leaking(cu_seqlens, total, causal, window):
        bounds = torch.tensor([0, total], dtype=torch.int32)
        return integration.SpanMask.full(bounds)

    monkeypatch.setattr(integration, "_make_mask", leaking)
    model = build(Qwen2ForCausalLM, Qwen2Config(**SMALL), "moca_fast")
    with pytest.raises(RuntimeError, match="see each other"):
        make_bidirectional(model)


def test_wrong_pack_is_refused(monkeypatch):
    monkeypatch.setattr(
        integration, "packed_kwargs", lambda cu_seqlens: packed_kwargs(cu_seqlens[[0, 0, 1, 2]])
    )
    monkeypatch.setattr(
        integration,
        "_make_mask",
        lambda cu_seqlens, total, causal, window: integration.SpanMask.causal(cu_seqlens, total),
    )
    model = build(Qwen2ForCausalLM, Qwen2Config(**SMALL), "moca_fast")
    with pytest.raises(RuntimeError, match="differs from separate forwards"):
        make_bidirectional(model)


@pytest.mark.parametrize(
    "kind, config", [(Qwen2ForCausalLM, Qwen2Config), (LlamaForCausalLM, LlamaConfig)]
)
class TestTextModels:
    """Generic language models with attn_implementation="moca_fast"."""

    def pair(self, kind, config, **settings):
        config = config(**SMALL, **settings)
        return build(kind, config, "eager"), build(kind, config, "moca_fast")

    @pytest.mark.parametrize("side", ["left", "right", "none", "holes"])
    @pytest.mark.parametrize("is_causal", [True, False])
    def test_padding(self, kind, config, side, is_causal):
        eager, ours = self.pair(kind, config, is_causal=is_causal)
        ids, mask = random_ids(3, 11), torch.ones(3, 11, dtype=torch.int64)
        if side == "right":
            mask[0, 4:], mask[2, 9:] = 0, 0
        if side == "left":
            mask[0, :4], mask[2, :9] = 0, 0
        if side == "holes":
            mask[0, 3:5], mask[1, 0], mask[2, 7:9] = 0, 0, 0
        keep = mask.bool()
        given = None if side == "none" else mask
        want = eager.model(ids, attention_mask=given)[0]
        got = ours.model(ids, attention_mask=given)[0]
        torch.testing.assert_close(got[keep], want[keep], **TOLERANCE)

    def test_padding_rows_are_zero(self, kind, config):
        _, ours = self.pair(kind, config)
        rows = []
        layer = ours.model.layers[0].self_attn.o_proj
        layer.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
        ours.model(random_ids(2, 5), attention_mask=mask)
        assert (rows[0][mask == 0] == 0).all()
        assert (rows[0][mask == 1] != 0).any(dim=-1).all()

    @pytest.mark.parametrize("padded", [False, True])
    def test_generation(self, kind, config, padded):
        eager, ours = self.pair(kind, config)
        mask = torch.ones(2, 6, dtype=torch.int64)
        if padded:
            mask[0, :3] = 0
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        settings |= {"output_logits": True, "return_dict_in_generate": True}
        want = eager.generate(random_ids(2, 6), attention_mask=mask, **settings)
        got = ours.generate(random_ids(2, 6), attention_mask=mask, **settings)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)

    def test_static_cache(self, kind, config):
        eager, ours = self.pair(kind, config)
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        settings |= {"cache_implementation": "static", "disable_compile": True}
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        want = eager.generate(random_ids(2, 5), attention_mask=mask, **settings)
        got = ours.generate(random_ids(2, 5), attention_mask=mask, **settings)
        assert torch.equal(got, want)

    def test_chunked_prefill(self, kind, config):
        eager, ours = self.pair(kind, config)
        ids = random_ids(2, 9)
        want = eager.model(ids)[0][:, 5:]
        first = ours.model(ids[:, :5], use_cache=True)
        got = ours.model(ids[:, 5:], past_key_values=first.past_key_values)[0]
        torch.testing.assert_close(got, want, **TOLERANCE)

    def test_causal_position_packing_is_honoured(self, kind, config):
        eager, ours = self.pair(kind, config)
        ids, positions = random_ids(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        want = torch.cat([eager.model(part)[0] for part in ids.split([4, 5], dim=1)], dim=1)
        got = ours.model(ids, position_ids=positions, use_cache=False)[0]
        torch.testing.assert_close(got, want, **TOLERANCE)

    def test_bidirectional_position_packing_does_not_leak(self, kind, config):
        eager, ours = self.pair(kind, config, is_causal=False)
        ids = random_ids(2, 9)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
        first = torch.cat([eager.model(part)[0] for part in ids[:1].split([4, 5], dim=1)], dim=1)
        second = torch.cat([eager.model(part)[0] for part in ids[1:].split([2, 7], dim=1)], dim=1)
        for cache in (False, True):
            got = ours.model(ids, position_ids=positions, use_cache=cache)[0]
            torch.testing.assert_close(got, torch.cat([first, second]), **TOLERANCE)

    @pytest.mark.parametrize("additive", [False, True])
    def test_dense_mask(self, kind, config, additive):
        eager, ours = self.pair(kind, config)
        visible = torch.ones(9, 9, dtype=torch.bool).tril()
        visible[2:5, 2:5] = True  # an image whose tokens see each other
        bias = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        want = eager.model(random_ids(1, 9), attention_mask=bias)[0]
        got = ours.model(random_ids(1, 9), attention_mask=bias if additive else visible[None, None])
        torch.testing.assert_close(got[0], want, **TOLERANCE)

    def test_dense_mask_with_gaps_is_refused(self, kind, config):
        _, ours = self.pair(kind, config)
        visible = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        visible[0, 0, 3, 1] = False
        with pytest.raises(ValueError, match="gaps at query 3"):
            ours.model(random_ids(1, 4), attention_mask=visible)

    def test_mask_of_biases_is_refused(self, kind, config):
        _, ours = self.pair(kind, config)
        with pytest.raises(ValueError, match="bias on the scores"):
            ours.model(random_ids(1, 4), attention_mask=torch.full((1, 1, 4, 4), -0.5))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [1, 3])
def test_sliding_window(is_causal, window):
    config = Qwen2Config(
        **SMALL,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=1,
        is_causal=is_causal,
    )
    eager, ours = (build(Qwen2ForCausalLM, config, name) for name in ("eager", "moca_fast"))
    assert set(ours.config.layer_types) == {"full_attention", "sliding_attention"}
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    want, got = (m.model(ids, attention_mask=mask, use_cache=False)[0] for m in (eager, ours))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **TOLERANCE)
    parts = ids[:1].split([5, 7], dim=1)
    want = torch.cat([eager.model(part, use_cache=False)[0] for part in parts], dim=1)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    got = ours.model(ids[:1], position_ids=positions, use_cache=False, **packed_kwargs(bounds))[0]
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("new_tokens", [1, 5])
@pytest.mark.parametrize(
    "kind, config",
    [
        (LlamaForCausalLM, LlamaConfig(**SMALL)),
        (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=4)),
        (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=8)),
    ],
    ids=["full", "shorter window", "longer window"],
)
def test_static_cache_filled_by_the_prompt(kind, config, new_tokens):
    sdpa, ours = (build(kind, config, name) for name in ("sdpa", "moca_fast"))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    settings |= {"cache_implementation": "static", "disable_compile": True}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    want = sdpa.generate(random_ids(2, 6), attention_mask=mask, **settings)
    got = ours.generate(random_ids(2, 6), attention_mask=mask, **settings)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)


@pytest.mark.parametrize("kind, config", [
    (LlamaForCausalLM, LlamaConfig(**SMALL)),
    (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=4)),
], ids=["full", "window"])  # fmt: skip
def test_static_cache_without_generate(kind, config):
    sdpa, ours = (build(kind, config, name).model for name in ("sdpa", "moca_fast"))
    caches = StaticCache(config, max_cache_len=12), StaticCache(config, max_cache_len=12)
    for ids in random_ids(2, 9).split([3, 4, 1, 1], dim=1):
        want, got = (
            m(ids, past_key_values=c)[0] for m, c in zip((sdpa, ours), caches, strict=True)
        )
        torch.testing.assert_close(got, want, **TOLERANCE)


def test_encoder_with_padding():
    config = BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    eager, ours = (build(BertModel, config, name) for name in ("eager", "moca_fast"))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    want, got = (m(random_ids(2, 5), attention_mask=mask)[0] for m in (eager, ours))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("length", [4, 6])
def test_encoder_decoder_cross_attention(length):
    config = BartConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    eager, ours = (build(BartModel, config, name) for name in ("eager", "moca_fast"))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    inputs = {"input_ids": random_ids(2, 6), "attention_mask": mask}
    inputs["decoder_input_ids"] = random_ids(2, length)
    torch.testing.assert_close(ours(**inputs)[0], eager(**inputs)[0], **TOLERANCE)


def test_dropout_is_refused():
    config = Qwen2Config(**SMALL, attention_dropout=0.1)
    model = build(Qwen2ForCausalLM, config, "moca_fast")
    model(random_ids(1, 4))
    with pytest.raises(ValueError, match=r"dropout 0, got 0\.1"):
        model.train()(random_ids(1, 4))


def test_position_bias_is_refused():
    config = T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    try:
        model = build(T5EncoderModel, config, "moca_fast")
    except ValueError:
        return  # transformers itself says that T5 takes no other attention
    with pytest.raises(ValueError, match="position_bias"):
        model(random_ids(1, 4))


def test_contradictions_are_refused():
    model = build(Qwen2ForCausalLM, Qwen2Config(**SMALL), "moca_fast")
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    kwargs = packed_kwargs(bounds)
    with pytest.raises(ValueError, match="attention mask, got both"):
        model.model(random_ids(1, 5), attention_mask=torch.ones(1, 5), **kwargs)
    with pytest.raises(ValueError, match="to be equal"):
        model.model(random_ids(1, 5), **{**kwargs, "cu_seq_lens_k": bounds.clamp(max=4)})
    cache = model.model(random_ids(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot use a cache"):
        model.model(random_ids(1, 5), past_key_values=cache, **kwargs)
    with pytest.raises(ValueError, match=r"before the 4 tokens"):
        model.model(random_ids(1, 4), use_cache=False, **kwargs)
    kwargs["cu_seq_lens_q"] = None
    with pytest.raises(ValueError, match="cu_seq_lens_q beside cu_seq_lens_k, got none"):
        model.model(random_ids(1, 5), use_cache=False, **kwargs)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, 4, 4, dtype=torch.int64),
        torch.ones(1, 4, 4),
        torch.ones(3, 4),
        torch.ones(2, 3),
        torch.ones(1, 1, 4, 3, dtype=torch.bool),
        torch.ones(1, 2, 4, 4, dtype=torch.bool),
    ],
    ids=lambda mask: f"{tuple(mask.shape)} {mask.dtype}",
)
def test_masks_that_do_not_fit_are_refused(mask):
    query = torch.randn(2, 2, 4, 16)
    with pytest.raises(ValueError, match=r"expected an attention mask \(2, 4\), or one .* got"):
        attention_forward(torch.nn.Module(), query, query, query, mask)


LENGTHS = (8, 10)
PACKED_MASKS = {
    "chunks": lambda: (Llama4TextModel, Llama4TextConfig(
        **SMALL, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48,
        head_dim=16, pad_token_id=0,
    )),
    "windows to both sides": lambda: (ModernBertModel, ModernBertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, local_attention=4,
        layer_types=["sliding_attention", "full_attention"],
    )),
    "a mask function": lambda: (Gemma3TextModel, Gemma3TextConfig(
        **SMALL, use_bidirectional_attention=True, sliding_window=4, head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED_MASKS)
def test_packed_batches_keep_the_masks_of_their_models(name):
    kind, config = PACKED_MASKS[name]()
    eager, ours = (build(kind, config, implementation) for implementation in IMPLEMENTATIONS)
    ids = random_ids(1, sum(LENGTHS))
    want = torch.cat([eager(part)[0] for part in ids.split(LENGTHS, dim=1)], dim=1)
    bounds = torch.tensor([0, 8, 18], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    inputs = packed_kwargs(bounds) | ({} if kind is ModernBertModel else {"use_cache": False})
    got = ours(ids, position_ids=positions, **inputs)[0]
    torch.testing.assert_close(got, want, **TOLERANCE)
    if kind is not ModernBertModel:
        with pytest.raises(ValueError, match=r"made of .* position_ids that restart"):
            ours(ids, **inputs)


def test_masks_that_a_compiler_cannot_look_into_are_refused(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    plain = integration.request_mask(1, 4, 4)
    assert plain.packed(bounds, None) == (True, None)
    for mask, window in (
        (plain, 3),
        (integration.request_mask(1, 4, 4, use_vmap=True), None),
        (integration.request_mask(1, 4, 4, mask_function=or_masks(causal_mask_function)), None),
    ):
        with pytest.raises(ValueError, match=r"no plain one, and torch\.compile does not show"):
            mask.packed(bounds, window)


def test_packed_images_see_themselves():
    """Gemma3's image tokens see their whole image; the rest is causal."""
    text = dict(
        **SMALL, head_dim=16, sliding_window=16, layer_types=["full_attention"] * 2,
        query_pre_attn_scalar=16,
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 32,
        "num_attention_heads": 2, "patch_size": 8,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=59,
        image_token_id=59, boi_token_index=58, eoi_token_index=57,
    )  # fmt: skip
    kind = Gemma3ForConditionalGeneration
    eager, ours = (build(kind, config, implementation) for implementation in IMPLEMENTATIONS)
    ids = random_ids(1, 20, vocab=50)
    ids[:, 2:6] = ids[:, 12:16] = 59
    inputs = {"input_ids": ids, "token_type_ids": (ids == 59).long()}
    pictures = torch.randn(2, 3, 32, 32)
    want = torch.cat(
        [
            eager(pixel_values=pictures[i : i + 1], **{k: v[:, part] for k, v in inputs.items()})[0]
            for i, part in enumerate((slice(0, 9), slice(9, 20)))
        ],
        dim=1,
    )
    bounds = torch.tensor([0, 9, 20], dtype=torch.int32)
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    inputs |= {"pixel_values": pictures, "position_ids": positions, "use_cache": False}
    got = ours(**inputs, **packed_kwargs(bounds))[0]
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_masks_made_outside_of_the_inner_model():
    """PaliGemma makes the masks itself and hands them to its language model."""
    text = dict(**SMALL, model_type="gemma", head_dim=16)
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 32,
        "num_attention_heads": 2, "patch_size": 8, "model_type": "siglip_vision_model",
    }  # fmt: skip
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=59, image_token_id=59,
        projection_dim=32,
    )  # fmt: skip
    ids = random_ids(1, 20, vocab=50)
    ids[:, :16] = 59
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32), "attention_mask": torch.ones_like(ids)}
    inputs["token_type_ids"] = torch.zeros_like(ids)
    want, got = (
        build(PaliGemmaForConditionalGeneration, config, name)(ids, **inputs)[0]
        for name in IMPLEMENTATIONS
    )
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_text_boundaries_in_an_unpacked_vision_tower_are_refused():
    layer = make_model("qwen2_vl", "moca_fast").model.visual.blocks[0].attn
    query = torch.randn(1, 4, 5, 16)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="pack_vision"):
        attention_forward(
            layer, query, query, query, None, is_causal=False, **packed_kwargs(bounds)
        )


def test_compiles_without_graph_breaks():
    model = make_bidirectional(build(Qwen2ForCausalLM, Qwen2Config(**SMALL), "moca_fast")).model
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    inputs = {"position_ids": positions, "use_cache": False, **packed_kwargs(bounds)}
    want = model(random_ids(1, 9), **inputs)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(random_ids(1, 9), **inputs)[0]
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    gradient = model.embed_tokens.weight.grad
    model.embed_tokens.weight.grad = None
    want.square().sum().backward()
    torch.testing.assert_close(gradient, model.embed_tokens.weight.grad)


def test_packed_kwargs():
    kwargs = packed_kwargs(torch.tensor([0, 2, 9], dtype=torch.int32))
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == 7
    assert kwargs["cu_seq_lens_q"] is kwargs["cu_seq_lens_k"]


def test_base_model_is_made_bidirectional(tmp_path):
    make_model("qwen2_5_vl", "moca_fast").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="moca_fast")
    make_bidirectional(model)
    assert model.config.text_config.is_causal is False


@pytest.mark.parametrize("positions", [None, torch.arange(6)[None]], ids=["", "position_ids"])
@pytest.mark.parametrize("rows", [None, torch.ones(1, 6, dtype=torch.bool)], ids=["", "mask"])
@pytest.mark.parametrize("causal", [True, False])
def test_sliding_window_of_a_direct_call(causal, rows, positions):
    q = torch.randn(1, 2, 6, 16)
    out, _ = attention_forward(
        torch.nn.Module(), q, q, q, rows, is_causal=causal, sliding_window=2, position_ids=positions
    )
    ahead = torch.arange(6)[:, None] - torch.arange(6)
    visible = (ahead >= 0) & (ahead < 2) if causal else ahead.abs() <= 2
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=visible)
    torch.testing.assert_close(out, want.transpose(1, 2))
