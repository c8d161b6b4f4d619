"""Self-tests of a model that was made bidirectional, on tokens drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

LENGTH = 8  # tokens of a test document
# Agreement of a pack with separate forwards, relative to the largest value: rounding only.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def check_bidirectional(model: PreTrainedModel) -> None:
    """Raise unless the last token of a document changes the hidden state of its first.

    Raises:
        RuntimeError: the model is still causal, or its hidden states are not finite.
    """
    ids = _token_ids(model, 2 * LENGTH)
    other = ids[:LENGTH].clone()
    other[-1] = ids[-1]
    with _quiet(model):
        first = _states(model, ids[:LENGTH])[0]
        again = _states(model, ids[:LENGTH])[0]
        moved = _states(model, other)[0]
    if not first.isfinite().all():
        raise RuntimeError(
            f"the hidden states of this {type(model).__name__} are not finite: its weights hold "
            f"NaN or infinity, or values that are too large for {model.dtype}"
        )
    noise = (first - again).abs().max()
    if not (first - moved).abs().max() > noise:
        raise RuntimeError(
            f"{type(model).__name__} with attn_implementation="
            f"{model.config.get_text_config()._attn_implementation!r} is still causal: the last "
            "token does not change the first hidden state"
        )


def check_isolated(model: PreTrainedModel, packed_kwargs: Callable[[Tensor], dict]) -> None:
    """Raise unless documents in one pack do not see each other and match separate forwards.

    Raises:
        RuntimeError: they do.
    """
    ids = _token_ids(model, 3 * LENGTH)
    left, right, other = ids.split([LENGTH, LENGTH - 3, LENGTH + 3])
    other = other[: len(right)]
    with _quiet(model):
        packed = _packed_states(model, (left, right), packed_kwargs)
        changed = _packed_states(model, (left, other), packed_kwargs)
        separate = torch.cat([_states(model, left), _states(model, right)])
    scale = separate.abs().max()
    tolerance = TOLERANCE.get(model.dtype, 1e-3) * scale
    if (packed - changed)[: len(left)].abs().max() > 0.01 * tolerance:
        raise RuntimeError(
            f"{type(model).__name__}: documents of one pack see each other: changing the second "
            "changes the hidden states of the first"
        )
    difference = (packed - separate).abs().max()
    if not difference <= tolerance:
        raise RuntimeError(
            f"{type(model).__name__}: a pack of two documents differs from separate forwards by "
            f"{float(difference / scale):.2g} of the largest value"
        )


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; puts back every module's mode and the random state."""
    training = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _token_ids(model: PreTrainedModel, count: int) -> Tensor:
    """(count,) int64 distinct where possible, none of them standing for an image or a video."""
    config = model.config
    special = {
        value
        for name in (*vars(config), *vars(config.get_text_config()))
        if name.endswith("_token_id") and isinstance(value := getattr(config, name, None), int)
    }
    vocabulary = min(config.get_text_config().vocab_size, 4096)
    ids = torch.tensor([i for i in range(vocabulary) if i not in special])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return ids[order].repeat(-(-count // len(ids)))[:count]


def _states(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """(T, D) float32 last hidden states of one row of tokens."""
    row = ids[None].to(model.device)
    return model.base_model(input_ids=row, use_cache=False, **kwargs)[0][0].float()


def _packed_states(
    model: PreTrainedModel, documents: tuple[Tensor, ...], packed_kwargs: Callable[[Tensor], dict]
) -> Tensor:
    lengths = torch.tensor([0, *map(len, documents)], dtype=torch.int32)
    cu_seqlens = lengths.cumsum(0, dtype=torch.int32).to(model.device)
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])[None].to(model.device)
    ids = torch.cat(documents)
    return _states(model, ids, position_ids=positions, **packed_kwargs(cu_seqlens))
