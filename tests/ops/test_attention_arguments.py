"""attention refuses what it cannot compute, and says what it expected and what came."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moca_fast import SpanMask, attention, explain


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def case(**changes):
    values = {"q": torch.randn(7, 4, 16), "k": torch.randn(7, 2, 16), "v": torch.randn(7, 2, 16)}
    return {**values, "mask": SpanMask.full(cu(4, 3)), **changes}


BAD = {
    "q dims": (case(q=torch.randn(7, 64)), ValueError, r"q: expected shape \(T, H, D\), got"),
    "k dim": (case(k=torch.randn(7, 2, 24)), ValueError, r"k: expected shape \(K, Hkv, 16\)"),
    "v rows": (case(v=torch.randn(6, 2, 16)), ValueError, r"v: expected shape \(7, 2, 16\)"),
    "heads": (case(q=torch.randn(7, 3, 16)), ValueError, "3 heads of q to be a multiple .* got 2"),
    "no heads": (case(q=torch.randn(7, 0, 16)), ValueError, "0 heads of q"),
    "dim 12": (case(q=torch.randn(7, 4, 12)), ValueError, "multiple of 8 from 16 to 256, got 12"),
    "dim 264": (case(q=torch.randn(7, 4, 264)), ValueError, "from 16 to 256, got 264"),
    "dtype": (case(k=torch.randn(7, 2, 16).half()), TypeError, "k: expected dtype float32, got"),
    "integers": (case(q=torch.ones(7, 4, 16).int()), TypeError, "q: expected dtype float32 or"),
    "device": (case(k=torch.randn(7, 2, 16, device="meta")), ValueError, "expected device cpu"),
    "not a tensor": (case(q=[[1.0]]), TypeError, "q: expected a tensor, got list"),
    "mask type": (case(mask=torch.ones(7, 7)), TypeError, "mask: expected a SpanMask, got Tensor"),
    "mask size": (case(mask=SpanMask.full(cu(6))), ValueError, "expected 7 queries and 7 keys"),
    "lse flag": (case(return_lse=3), TypeError, "return_lse: expected True or False, got 3"),
    "flag": (case(deterministic="x"), TypeError, "deterministic: expected True or False, got 'x'"),
    "mask device": (
        case(mask=SpanMask.full(cu(7)).to("meta")),
        ValueError,
        "mask: expected device cpu, got meta",
    ),
}
SCALES = {
    "a": (TypeError, "expected a number or a 0-d tensor, got 'a'"),
    "0.5": (TypeError, "got '0.5'"),
    1j: (TypeError, "got 1j"),
    True: (TypeError, "got True"),
    torch.ones(2): (TypeError, r"got torch.float32, \(2,\)"),
    torch.tensor(True): (TypeError, r"got torch.bool, \(\)"),
    math.nan: (ValueError, "expected a finite number, got nan"),
    torch.tensor(-math.inf): (ValueError, "expected a finite number, got -inf"),
}


@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_bad_scales(scale):
    error, message = SCALES[scale]
    with pytest.raises(error, match=f"moca_fast.attention: softmax_scale: .*{message}"):
        attention(**case(softmax_scale=scale))
    with pytest.raises(error, match="attention: softmax_scale"):
        explain("attention", **case(softmax_scale=scale))


@pytest.mark.parametrize("scale", [2, np.float32(2), torch.tensor(2.0), torch.tensor(2)], ids=repr)
def test_scales_of_other_types(scale):
    arguments = case()
    want = attention(**arguments, softmax_scale=2.0)
    assert torch.equal(attention(**arguments, softmax_scale=scale), want)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        attention(**arguments)


def test_unchecked_spans_do_not_reach_memory():
    """Masks whose values were not validated are refused by the kernel, not read past the end."""
    start = torch.zeros(7, dtype=torch.int32)
    for end in (start + 9, start.scatter(0, torch.tensor([2]), 5), start - 1):
        arguments = case(mask=SpanMask(start, end.int(), validate=False))
        with pytest.raises(ValueError, match="non-decreasing ends inside 0 to 7"):
            attention(**arguments)


def test_float64_needs_the_reference():
    arguments = {n: x.double() if n != "mask" else x for n, x in case().items()}
    assert attention(**arguments).dtype == torch.float64
    with pytest.raises(ValueError, match="cannot run this call: dtype float64"):
        attention(**arguments, backend="cpu")
