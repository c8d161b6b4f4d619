"""The rotary functions of transformers' models, replaced in the layers of one model."""

import copy

import pytest
import torch
from models import ARCHITECTURES, boundaries, inputs_of, make_model, make_samples, packed_inputs
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    NemotronConfig,
    NemotronModel,
)

from moca_fast import use_backend
from moca_fast.integrations import _rotary
from moca_fast.integrations.transformers import make_bidirectional, packed_kwargs, use_mrope

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
LAYERS = 4  # two of text and two of vision


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """Turns dims (2 i, 2 i + 1), as some models do."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x):
        across = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos + across * sin

    return turned(q), turned(k)


class OtherAttention(nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of q in every call of the op."""
    shapes, original = [], _rotary.mrope

    def counted(q, *rest):
        shapes.append(tuple(q.shape))
        return original(q, *rest)

    monkeypatch.setattr(_rotary, "mrope", counted)
    return shapes


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "moca_fast"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_stay_the_same(architecture, implementation, calls):
    model, other = (make_model(architecture, implementation) for _ in range(2))
    assert use_mrope(other) == LAYERS
    calls.clear()
    inputs = inputs_of(model, make_samples())
    keep = inputs["attention_mask"].bool()
    want, got = (m.model(**inputs)[0][keep] for m in (model, other))
    assert len(calls) == LAYERS and all(len(shape) == 3 for shape in calls)
    torch.testing.assert_close(got, want, **TOLERANCE)
    for states in (want, got):
        states.square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if parameter.grad is not None:
            scale = expected[name].grad.abs().max().clamp(min=1)
            torch.testing.assert_close(
                parameter.grad / scale, expected[name].grad / scale, **TOLERANCE, msg=name
            )


def test_packed_documents(calls):
    model, other = (
        make_bidirectional(make_model("qwen2_5_vl", "moca_fast"), check=False) for _ in range(2)
    )
    use_mrope(other)
    samples = make_samples()
    want, got = (
        m.model(**packed_inputs(m, samples), **packed_kwargs(boundaries(samples)))[0]
        for m in (model, other)
    )
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert len(calls) == LAYERS + 2  # and two by which the functions were compared


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_copies_of_q_and_k(architecture, monkeypatch):
    """What the layers pass on is laid out as the kernels want it."""
    model, strides = make_model(architecture, "eager"), []
    use_mrope(model)
    original = _rotary.mrope

    def watched(q, k, cos, sin):
        strides.extend((x.stride()[1:], (x.shape[2], 1)) for x in (q, k))
        return original(q, k, cos, sin)

    monkeypatch.setattr(_rotary, "mrope", watched)
    model.model(**inputs_of(model, make_samples()))
    assert len(strides) == 2 * LAYERS and all(got == want for got, want in strides)


def test_only_this_model_changes(calls, tmp_path):
    model, other = (make_model("qwen3_vl", "eager") for _ in range(2))
    use_mrope(model)
    assert use_mrope(model) == LAYERS  # again
    calls.clear()
    inputs = inputs_of(model, make_samples()[:1])
    other.model(**inputs)
    assert calls == []
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.language_model.layers[0].self_attn.q_proj.weight.zero_()
    assert not torch.equal(twin.model(**inputs)[0], model.model(**inputs)[0])
    assert len(calls) == 2 * LAYERS
    model.save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(plain.model(**inputs)[0], other.model(**inputs)[0])


def test_autocast():
    model, other = (make_model("qwen2_5_vl", "sdpa") for _ in range(2))
    use_mrope(other)
    inputs = inputs_of(model, make_samples()[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = (m.model(**inputs)[0] for m in (model, other))
    assert torch.nn.functional.cosine_similarity(got.float(), want.float(), dim=-1).min() > 0.99


def test_named_backend():
    model = make_model("qwen2_vl", "eager")
    inputs = inputs_of(model, make_samples()[:1])
    want = model.model(**inputs)[0]
    use_mrope(model)
    with use_backend("reference"):
        torch.testing.assert_close(model.model(**inputs)[0], want, **TOLERANCE)


def test_compiles_without_graph_breaks():
    model = make_model("qwen2_5_vl", "sdpa")
    use_mrope(model)
    text, ids = model.model.language_model, torch.arange(10, 19)[None]
    want = text(ids, use_cache=False)[0]
    torch._dynamo.reset()
    compiled = torch.compile(text, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False)[0], want)


@pytest.mark.parametrize(
    ("config", "kind"), [(GPTNeoXConfig, GPTNeoXModel), (NemotronConfig, NemotronModel)]
)
def test_tables_narrower_than_a_head(config, kind, calls):
    """Whose functions turn the first columns of a head, a quarter and a half of the 16 here."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = kind(config(vocab_size=20, **sizes, **heads)).eval()
    other = copy.deepcopy(model)
    assert use_mrope(other) == 2
    calls.clear()
    ids = torch.arange(18).view(2, 9)
    want, got = (m(ids)[0] for m in (model, other))
    assert len(calls) == 2 and all(dim in (4, 8) for *_, dim in calls)
    torch.testing.assert_close(got, want, **TOLERANCE)
    for states in (want, got):
        states[..., ::2].sum().backward()
    for parameter, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, **TOLERANCE)


def test_another_rotation_of_part_of_a_head_is_refused(monkeypatch):
    module = OtherAttention()

    def last_columns(q, k, cos, sin):
        if cos.shape[-1] == q.shape[-1]:
            return _rotary.rotate_rows(q, k, cos, sin)
        return tuple(x.flip(-1) for x in _rotary.rotate_rows(q.flip(-1), k.flip(-1), cos, sin))

    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", last_columns)
    with pytest.raises(RuntimeError, match="OtherAttention is another rotation"):
        use_mrope(module)
    assert "forward" not in vars(module)


def test_another_rotation_is_refused():
    module = OtherAttention()
    with pytest.raises(RuntimeError, match="OtherAttention is another rotation"):
        use_mrope(module)
    assert "forward" not in vars(module)


def test_models_without_rotary_functions_are_refused():
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="got none in BertModel"):
        use_mrope(BertModel(config))


def test_wrapped_forwards_are_refused():
    model = make_model("qwen2_vl", "eager")
    layer = model.model.language_model.layers[1].self_attn
    layer.forward = layer.forward
    with pytest.raises(ValueError, match="Qwen2VLAttention to run the forward of its class"):
        use_mrope(model)
    assert not any("forward" in vars(m) for m in model.modules() if m is not layer)
