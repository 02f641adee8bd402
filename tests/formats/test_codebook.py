"""NF4 and FP4: by hand, their invariants, and the bits that double quantization saves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qlab.formats import FP4, NF4, dynamic_map, normal_float_levels


@pytest.mark.parametrize("fmt", [NF4(), NF4(double_quant=True), FP4(), FP4(double_quant=True)])
@pytest.mark.parametrize("shape", [(0,), (0, 8), (1, 1), (5,), (7, 33)])
def test_shapes_and_dtypes(fmt, shape):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        w = torch.randn(shape).to(dtype)
        q = fmt.quantize(w)
        assert q.codes.shape == w.shape and q.dequantize().shape == w.shape and q.dequantize().dtype == dtype
        assert torch.equal(fmt.decode(q.codes, q.params), q.dequantize(torch.float32))


def test_by_hand():
    q = NF4(block_size=4).quantize(torch.tensor([0.0, 4.0, -4.0, 0.3, -2.0, 0.0]))
    assert q.params["absmax"].tolist() == [4.0, 2.0]  # the last block is short
    assert q.codes.tolist() == [7, 15, 0, 8, 0, 7]  # 0.3/4 = 0.075 lies nearest to level 8, 0.0796
    assert q.dequantize().tolist()[:3] == [0.0, 4.0, -4.0]
    assert q.nbytes == 3 + 2 * 4


@given(st.integers(0, 2**31), st.integers(1, 300), st.sampled_from([1, 2, 64]), st.sampled_from([NF4, FP4]))
def test_every_weight_gets_the_nearest_level_of_its_block(seed, n, block_size, cls):
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 30 - 15)
    w[n // 2 :] *= -100
    fmt = cls(block_size)
    q = fmt.quantize(w)
    grid = (q.params["absmax"][:, None] * fmt.levels).repeat_interleave(block_size, 0)[:n]
    error = (q.dequantize() - w).abs()
    assert (error <= (grid - w[:, None]).abs().amin(1) + 1e-6 * w.abs().max()).all()
    assert torch.equal(fmt.quantize(q.dequantize()).dequantize(), q.dequantize()), "idempotent"


@pytest.mark.parametrize("fmt", [NF4(8), FP4(8)])
def test_zero_and_constant_blocks_are_exact(fmt):
    w = torch.cat([torch.zeros(8), torch.full((8,), 3.3), torch.full((8,), -0.1)])
    assert torch.equal(fmt.quantize(w).dequantize(), w)


def test_double_quantization_saves_what_the_paper_says():
    w = torch.randn(1024, 1024)
    assert NF4(64).quantize(w).bits_per_weight == 4 + 32 / 64
    assert NF4(64, double_quant=True).quantize(w).bits_per_weight == pytest.approx(
        4 + 8 / 64 + 32 / (64 * 256), abs=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fmt", [NF4(64), FP4(64), NF4(16, double_quant=True), NF4(1), NF4(5), NF4(4096)], ids=repr)
@pytest.mark.parametrize("n", [1, 127, 128, 129, 1024, 1025, 4999, 5000])
def test_tiles_give_what_the_whole_gives(monkeypatch, fmt, dtype, n):
    monkeypatch.setattr("qlab.formats.codebook.CPU_TILE", 128)
    w = torch.randn(n, generator=torch.Generator().manual_seed(n)) * torch.linspace(0.01, 3, n)
    q = fmt.quantize(w)
    assert torch.equal(q.dequantize(dtype), fmt.decode(q.codes, q.params).to(dtype))


class LargestFloat32(TorchDispatchMode):
    """How many float32 numbers the largest tensor held that was made meanwhile."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.size = max(self.size, made.numel())
        return made


def test_a_16_bit_weight_is_never_held_in_float32():
    q = NF4(64).quantize(torch.randn(1024, 1024))
    with LargestFloat32() as largest:
        q.dequantize(torch.bfloat16)
    assert 0 < largest.size <= 2**17 < q.shape.numel()
    with LargestFloat32() as largest:
        q.dequantize(torch.float32)
    assert largest.size == q.shape.numel(), "what this test would see"


def test_decode_is_differentiable_in_absmax():
    fmt, w = NF4(4), torch.randn(3, 4)
    absmax = fmt.fit(w)["absmax"].requires_grad_()
    codes = fmt.encode(w, {"absmax": absmax.detach()})
    fmt.decode(codes, {"absmax": absmax}).sum().backward()
    torch.testing.assert_close(absmax.grad, fmt.levels[codes.long()].sum(1))


def test_levels():
    levels = normal_float_levels()
    assert (levels < 0).sum() == 7 and (levels > 0).sum() == 8 and levels[7] == 0
    assert len(normal_float_levels(bits=3)) == 8
    assert len(dynamic_map()) == 256 and dynamic_map().unique().numel() == 256


def test_nan_is_refused():
    w = torch.ones(2, 3)
    w[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"1 NaN and 0 Inf .* index \[1, 1\]"):
        NF4().quantize(w)


def test_block_size_must_be_positive():
    with pytest.raises(ValueError, match="got 0"):
        NF4(0)
