"""GGUF blocks against the gguf package, byte for byte, and Q4_K against llama.cpp's own quantizer."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats.blocks import Q4_0, Q4_1, Q8_0
from qlab.formats.k_quants import Q4_K
from qlab.formats.microscaling import MXFP4

gguf = pytest.importorskip("gguf")

QUANTIZED = [Q4_0(), Q4_1(), Q8_0()]  # what gguf quantizes besides MXFP4, for which see test_microscaling.py
DECODED = [*QUANTIZED, Q4_K(), MXFP4()]


def kind(fmt):
    return gguf.GGMLQuantizationType[type(fmt).__name__]


def theirs(fmt, w):
    return torch.from_numpy(gguf.quants.quantize(w.float().contiguous().numpy(), kind(fmt)))


def hostile(seed, rows=9, columns=96):
    """Rows of every size that a float16 constant can and cannot hold, with ties, an outlier, zeros, and equal extremes."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * 10.0 ** torch.randint(-36, 5, (rows, 1), generator=g)
    w[0] = torch.randint(-16, 17, (columns,), generator=g) / 4
    w[1] = torch.randint(-254, 255, (columns,), generator=g) / 2  # for Q8_0: d = 1 where 127 is among them
    w[2] = torch.randint(0, 31, (columns,), generator=g) / 2 - 3  # for Q4_1
    w[3], w[4, :40], w[5, 7] = 0, -0.0, w[5, 7] * 1000
    w[6] = w[6].abs().amax() * torch.randint(-1, 2, (columns,), generator=g)
    w[7] = w[7, 0].clone()
    return w.clamp(-4e4, 4e4)


@given(st.integers(0, 2**31), st.sampled_from(QUANTIZED), st.sampled_from([torch.float32, torch.bfloat16]))
def test_bytes_equal_gguf(seed, fmt, dtype):
    w = hostile(seed).to(dtype)
    q = fmt.quantize(w)
    assert torch.equal(fmt.to_bytes(q), theirs(fmt, w))
    expected = torch.from_numpy(gguf.quants.dequantize(fmt.to_bytes(q).numpy(), kind(fmt)))
    assert torch.equal(q.dequantize(torch.float32), expected)


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_every_tie_and_its_neighbours_equal_gguf(fmt):
    """Multiples of d/2 and the float32 numbers beside them, for 300 values of d: the last bit of w · (1/d) decides."""
    n = 255 if fmt.bits == 8 else 33
    halves = torch.arange(-n // 2, n // 2 + 1) / 2
    for scale in torch.rand(300, generator=torch.Generator().manual_seed(0)):
        ties = halves * scale
        w = torch.cat([ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9))])
        blocks = torch.nn.functional.pad(w, (0, -len(w) % 30)).view(-1, 30)
        extremes = torch.stack([halves[-1] * scale, halves[0] * scale]).expand(len(blocks), 2)
        blocks = torch.cat([blocks, extremes], 1)
        assert torch.equal(fmt.to_bytes(fmt.quantize(blocks)), theirs(fmt, blocks))


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("edge", [2.0**-14, 2.0**-24, 2.0**-25, 65504.0])
def test_constants_at_the_edges_of_float16_equal_gguf(fmt, edge):
    """The smallest normal and subnormal, what rounds to 0, and the largest. One step further gguf writes Inf."""
    for factor in (0.999, 1.0, 1.0001):
        w = torch.linspace(-1, 1, 32)
        w *= edge * factor / fmt.fit(w)["scale"].abs()
        if edge * factor > 65520:
            with pytest.raises(ValueError, match="65504"):
                fmt.quantize(w)
        elif isinstance(fmt, Q4_1) and edge > 1:
            with pytest.raises(ValueError, match="min of"):  # 15 steps are beyond float16 before one is
                fmt.quantize(w)
        else:
            assert torch.equal(fmt.to_bytes(fmt.quantize(w)), theirs(fmt, w))


@pytest.mark.parametrize("fmt", DECODED)
def test_any_bytes_decode_as_gguf_decodes_them(fmt):
    """Random bytes: every float16, so Inf and NaN among them, every sub-scale, every code."""
    size = gguf.GGML_QUANT_SIZES[kind(fmt)][1]
    data = torch.randint(0, 256, (500, 3 * size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    if isinstance(fmt, MXFP4):
        data.view(-1, size)[:, 0].clamp_(max=254)  # 255 is NaN in E8M0, which gguf reads as 2¹²⁸
    with np.errstate(invalid="ignore", over="ignore"):
        expected = gguf.quants.dequantize(data.numpy(), kind(fmt))
    ours = fmt.from_bytes(data).dequantize().numpy()
    assert ours.shape == expected.shape and np.array_equal(ours, expected, equal_nan=True)
    assert np.isfinite(ours).mean() > 0.9
    assert torch.equal(fmt.to_bytes(fmt.from_bytes(data)), data)


# What quantize_row_q4_K_ref returned for awkward(0), and the SHA-256 of its bytes for the 54 blocks below: ggml-quants.c as
# vendored in llama-cpp-python 0.3.36, compiled with gcc 12.2 -O2 -ffp-contract=off. The blocks named one by one are those,
# of many thousands, where the last bit of a sum, quotient or root, or the number of steps, changes what is stored.
LLAMA_CPP = bytes.fromhex(
    "6e253e31d21766b9d2136675ffed55b1000b0d1426335578ab591856ab75c42984756566636e7b18aad87b2967a6e5345a8856250b44348b"
    "7cd6d7027c87934e6b985583b92f67b636e6706f6a6b7689999ba6b9ccd884a86d936897e6459cfc65d6c0595466798ca956fabf0d4b83d9"
    "5b19e7b685654e3627a92bb5485c77934875327037866535a50687707b8d88a2"
)
LLAMA_CPP_SHA256 = "97b64ae8d47f04aa8112232202c3452137cc55f3a52385e1207c93266b36c2da"


def awkward(block):
    """The 256 weights of each numbered block: bell-shaped, without pattern, exact in float32, sub-blocks of 5 sizes."""
    i = 256 * torch.as_tensor(block).unsqueeze(-1) + torch.arange(256)
    u = (i * i * 31 + i * 7919) % 2003 + (i * i * 17 + i * 104729) % 1999 + (i * i * 7 + i * 1299709) % 1997
    return (u - 3000) / 1024 * (i // 32 % 5 + 1)


def test_q4_k_equals_llama_cpp():
    fmt = Q4_K()
    assert bytes(fmt.to_bytes(fmt.quantize(awkward(0))).tolist()) == LLAMA_CPP
    normal = awkward([*range(32), 55, 113, 715, 1006, 1035, 12300, 23486, 26531, 28562])
    positive = awkward(range(8)).abs()
    constant = awkward([99, 119, 402, 1063, 1997]).view(-1, 8, 32)[..., :1].abs().expand(-1, 8, 32).flatten(1)
    many = fmt.to_bytes(fmt.quantize(torch.cat([normal, positive, constant])))
    assert hashlib.sha256(many.numpy().tobytes()).hexdigest() == LLAMA_CPP_SHA256


def test_bytes_of_llama_cpp_decode_as_in_gguf():
    data = torch.frombuffer(bytearray(LLAMA_CPP), dtype=torch.uint8)
    ours = Q4_K().from_bytes(data).dequantize()
    assert np.array_equal(ours.numpy(), gguf.quants.dequantize(data.numpy(), kind(Q4_K())))
    w = awkward(0)
    assert (ours - w).norm() < 0.08 * w.norm()
