"""MXFP4 against gguf (every byte) and torchao (where and why they differ); NVFP4 against torchao, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats.microscaling import MXFP4, NVFP4

gguf = pytest.importorskip("gguf")
mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")

DTYPES = [torch.float32, torch.bfloat16]


def gguf_bytes(w):
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(gguf.quants.quantize(w.float().numpy(), gguf.GGMLQuantizationType.MXFP4))


def torchao_mxfp4(w):
    """(scale bytes (…, n_blocks), codes (…, in)) of torchao's to_mx."""
    scale, packed = mx.to_mx(w, torch.float4_e2m1fn_x2, 32)
    return scale.view(torch.uint8), mx.unpack_uint4(packed)


def hostile(seed, smallest=-37):
    """Rows of many sizes, with the ties of every scale, an outlier, zeros of both signs, and powers of 2."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(8, 96, generator=g) * 10.0 ** torch.randint(smallest, 37, (8, 1), generator=g)
    w[0] = torch.randint(-32, 33, (96,), generator=g) / 4
    w[1, 0], w[2], w[3, :40], w[3, 1] = w[1, 0] * 30, 0, -0.0, -1e-30
    w[4] = 2.0 ** torch.randint(-20, 5, (96,), generator=g)
    return w


@given(st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_mxfp4_bytes_equal_gguf(seed, dtype):
    w = hostile(seed).to(dtype)
    q = MXFP4().quantize(w)
    data = MXFP4().to_bytes(q)
    assert torch.equal(data, gguf_bytes(w))
    expected = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(q.dequantize(torch.float32), torch.from_numpy(expected))


def test_mxfp4_just_below_powers_of_2_equals_gguf():
    """⌊log2 amax⌋ in float32: from 1 to 60 steps below a power of 2, depending on its size, log2 rounds up to it."""
    amax = torch.tensor([2.0**power for power in range(-124, 128)])
    w, above = torch.zeros(64, len(amax), 32), torch.zeros(64)
    for steps in range(64):
        w[steps, :, 3] = amax
        w[steps, :, 4:9] = amax[:, None] * torch.tensor([0.9, -0.5, 0.3, -0.1, 0.02])
        above[steps] = (MXFP4().fit(w[steps])["scale"].float().squeeze(-1) * 4 > amax).sum()
        amax = amax.nextafter(torch.tensor(0.0))
    assert torch.equal(MXFP4().to_bytes(MXFP4().quantize(w)), gguf_bytes(w))
    assert above[0] == 0 and above[1] > 200 and 0 < above[40] < 200 and above[63] == 0


def test_mxfp4_below_the_smallest_scale():
    """amax < 2⁻¹²⁵ asks for an exponent below 0: we take 0, torchao too, gguf lets the byte wrap around to a huge scale."""
    w = torch.full((1, 32), 2.0**-126)
    assert MXFP4().quantize(w).params["scale"].view(torch.uint8) == 0
    assert torchao_mxfp4(w)[0] == 0
    assert gguf_bytes(w)[0, 0] == 255
    assert torch.equal(MXFP4().quantize(w).dequantize(), w)


@given(st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_mxfp4_differs_from_torchao_only_at_ties(seed, dtype):
    """torchao: ties to even, −0 kept. So three ties in seven go up there and down here, and our 0 is its −0."""
    w = hostile(seed, smallest=-30).to(dtype)
    scale, codes = torchao_mxfp4(w)
    q = MXFP4().quantize(w)
    ours = q.params["scale"].view(torch.uint8)
    amax = w.float().view(8, 3, 32).abs().amax(-1)
    same = amax.frexp().mantissa < 1 - 2.0**-17  # closer to a power of 2, log2 may round up to it (the test above)
    assert torch.equal(ours[same], scale[same])
    same, differ = same.repeat_interleave(32, -1), q.codes != codes
    x = (w.float().view(8, 3, 32) / q.params["scale"].float().unsqueeze(-1)).view(w.shape)
    tie = (x.abs().unsqueeze(-1) == torch.tensor([0.75, 1.75, 3.5])).any(-1)
    minus_zero = x.signbit() & (x.abs() <= 0.25)
    assert torch.equal(differ[same], (tie | minus_zero)[same])
    assert (q.codes[tie & same] + 1 == codes[tie & same]).all() and (codes[minus_zero & same] == 8).all()


def test_mxfp4_ties_counted():
    """On 2²⁰ normal weights no tie falls, so only −0 differs; on a grid of quarters 15% are ties of the three kinds."""
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    _, codes = torchao_mxfp4(w)
    q = MXFP4().quantize(w)
    assert torch.equal(q.codes[codes != 8], codes[codes != 8]) and (q.codes[codes == 8] == 0).all()
    grid = torch.tensor([6.0] + [k / 4 for k in range(-15, 16)]).expand(1, 32).contiguous()
    _, codes = torchao_mxfp4(grid)
    assert ((MXFP4().quantize(grid).codes & 7) != (codes & 7)).sum() == 6  # ±0.75, ±1.75, ±3.5 of 32


def torchao_nvfp4(w, tensor_scale):
    scale, packed = nvfp4.nvfp4_quantize(w, 16, tensor_scale)
    return scale.view(w.shape[0], -1), nvfp4.unpack_uint4(packed).view(w.shape)


@given(st.integers(0, 2**31), st.sampled_from(DTYPES), st.integers(-28, 34))
def test_nvfp4_equals_torchao_bit_for_bit(seed, dtype, size):
    w = hostile(seed, smallest=-6)
    w = (w / w.abs().max() * 10.0**size).to(dtype)
    tensor_scale = nvfp4.per_tensor_amax_to_scale(w.abs().max())
    scale, codes = torchao_nvfp4(w, tensor_scale)
    q = NVFP4().quantize(w)
    assert torch.equal(q.params["tensor_scale"], tensor_scale)
    assert torch.equal(q.params["scale"].view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(q.codes, codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_dequantizes_as_torchao(dtype):
    w = hostile(0, smallest=-6).to(dtype)
    tensor_scale = nvfp4.per_tensor_amax_to_scale(w.abs().max())
    expected = nvfp4.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=tensor_scale).dequantize(dtype)
    assert torch.equal(NVFP4().quantize(w).dequantize(), expected)


def test_nvfp4_of_zeros_is_zero_where_torchao_divides_by_zero():
    w = torch.zeros(1, 32)
    scale, _ = torchao_nvfp4(w, nvfp4.per_tensor_amax_to_scale(w.abs().max()))
    assert scale.float().isnan().all()
    assert torch.equal(NVFP4().quantize(w).dequantize(), w)
