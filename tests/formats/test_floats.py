"""FloatCast: the cast, its bits, its limits."""

import pytest
import torch

from qlab.formats import FloatCast


@pytest.mark.parametrize("name, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_equals_the_cast(name, dtype):
    w = torch.randn(7, 5).t()
    q = FloatCast(name).quantize(w)
    assert torch.equal(q.dequantize(), w.to(dtype).float())
    assert torch.equal(q.codes, w.to(dtype).contiguous().view(torch.int16))
    assert q.bits_per_weight == 16 and q.params == {}


def test_fp16_overflow_is_refused():
    with pytest.raises(ValueError, match="1 of 2 weights lie beyond 65504"):
        FloatCast("fp16").quantize(torch.tensor([1.0, 1e5]))
    assert FloatCast("bf16").quantize(torch.tensor([1e5])).dequantize().item() == pytest.approx(1e5, rel=2**-8)


@pytest.mark.parametrize("shape", [(0,), (), (0, 3), (1,)])
def test_empty_and_single(shape):
    assert FloatCast("bf16").quantize(torch.zeros(shape)).dequantize().shape == shape


def test_unknown_name():
    with pytest.raises(ValueError, match="'fp8'"):
        FloatCast("fp8")
