"""Notebook 01: equations (1), (2) and (3) against qlab.formats.IntAffine."""

import torch

from qlab.formats import IntAffine


def cases():
    generator = torch.Generator().manual_seed(0)
    for bits in range(1, 9):
        fmt = IntAffine(bits, symmetric=False, granularity="tensor")
        yield fmt, torch.randn(64, 33, generator=generator) * 0.05
        yield fmt, torch.rand(200, generator=generator) + 0.5
        yield fmt, torch.arange(-9, 10) / 2 * 0.25


def asymmetric_params(inline):
    for fmt, w in cases():
        scale, zero_point = inline(w, fmt.bits)
        params = fmt.fit(w)
        assert torch.equal(scale, params["scale"]) and int(zero_point) == int(params["zero_point"])


def quantize_affine(inline):
    for fmt, w in cases():
        params = fmt.fit(w)
        codes = inline(w, params["scale"], params["zero_point"].float(), fmt.qmin, fmt.qmax)
        assert torch.equal(codes, fmt.encode(w, params).float())
    narrow = IntAffine(4, granularity="tensor")
    w = torch.linspace(-1, 1, 101)
    tight = narrow.from_range(torch.tensor(-0.3), torch.tensor(0.3))
    assert torch.equal(inline(w, tight["scale"], 0, -7, 7), narrow.encode(w, tight).float())


def dequantize_affine(inline):
    for fmt, w in cases():
        params = fmt.fit(w)
        codes = fmt.encode(w, params)
        assert torch.equal(
            inline(codes.float(), params["scale"], params["zero_point"].float()), fmt.decode(codes, params)
        )


ORACLES = {
    "asymmetric_params": asymmetric_params,
    "quantize_affine": quantize_affine,
    "dequantize_affine": dequantize_affine,
}
