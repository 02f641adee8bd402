"""Notebook 04: floats bit by bit, NF4's levels, NF4 and double quantization against qlab.formats, bit for bit."""

import torch

from qlab.formats import FP4, NF4, dynamic_map, normal_float_levels, pack


def weights():
    """Random weights of several sizes and dtypes, with outliers, zeros and exact midpoints between levels."""
    generator = torch.Generator().manual_seed(4)
    for shape in ((64,), (12, 128), (300, 512)):
        w = torch.randn(shape, generator=generator) * 0.02
        flat = w.view(-1)
        levels = NF4().levels
        flat[0], flat[1:16], flat[20] = 1.0, (levels[1:] + levels[:-1]) / 2, 0.0
        yield from (w, -w, 1e20 * w, w.to(torch.bfloat16), w.to(torch.float16))
    yield torch.zeros(128)


def float_value(function):
    w = torch.cat([torch.randn(4096), 1e-40 * torch.randn(64), torch.tensor([0.0, -0.0, 1e30, 3e-5, 65504.0])])
    for dtype, integer, exponent, mantissa in (
        (torch.float32, torch.int32, 8, 23),
        (torch.bfloat16, torch.int16, 8, 7),
        (torch.float16, torch.int16, 5, 10),
    ):
        cast = w.to(dtype)
        cast = cast[cast.isfinite()]
        assert torch.equal(function(cast.view(integer).long(), exponent, mantissa), cast.double())
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert function(torch.arange(16), 2, 1).tolist() == e2m1 + [-v for v in e2m1]


def nf4_levels(function):
    assert torch.equal(function(), NF4().levels) and torch.equal(function(), normal_float_levels())
    for p in (0.9, 0.95, 0.99):
        assert torch.equal(function(p), normal_float_levels(offset=p))


def nf4_quantize(function):
    for w in weights():
        for block_size in (32, 64):
            for fmt in (NF4(block_size), FP4(block_size)):
                q, levels = fmt.quantize(w), fmt.levels.sort().values
                codes, absmax = function(w, levels, block_size)
                assert torch.equal(absmax, q.params["absmax"])
                assert torch.equal(levels[codes.int()], fmt.levels[q.codes.int()])
                assert fmt.name == "FP4" or torch.equal(codes, q.codes)


def nf4_dequantize(function):
    for w in weights():
        for fmt in (NF4(32), NF4(64), FP4(64)):
            q = fmt.quantize(w)
            back = function(q.codes, q.params["absmax"], fmt.levels, fmt.block_size)
            assert back.shape == w.shape and torch.equal(back, q.dequantize(torch.float32))


def pack_nibbles(function):
    codes = torch.randint(0, 16, (6, 32), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    assert torch.equal(function(codes), pack(codes, 4))


def double_quantize(function):
    for w in weights():
        params = NF4(64, double_quant=True).quantize(w).params
        codes, scale, mean = function(NF4(64).fit(w)["absmax"], dynamic_map())
        assert torch.equal(codes, params["absmax_code"]) and torch.equal(scale, params["absmax_scale"])
        assert torch.equal(mean, params["absmax_offset"])


def undo_double_quantize(function):
    for w in weights():
        fmt = NF4(64, double_quant=True)
        params = fmt.quantize(w).params
        back = function(params["absmax_code"], params["absmax_scale"], params["absmax_offset"], dynamic_map())
        assert torch.equal(back, fmt.absmax(params))


FUNCTIONS = (
    float_value, nf4_levels, nf4_quantize, nf4_dequantize, pack_nibbles, double_quantize, undo_double_quantize,
)  # fmt: skip
ORACLES = {function.__name__: function for function in FUNCTIONS}
