"""Notebook 11: the merges of a number and of a matrix, and the share of Δ that rounding keeps, against qlab.adapters."""

import math

import torch

from qlab.adapters import (
    merge_dequantize,
    merge_naive_add,
    merge_naive_codes,
    merge_requantize,
    survival,
)
from qlab.adapters.merge_weight import code_range
from qlab.formats import NF4, IntAffine


def groups_of(bits, group_size):
    return IntAffine(bits, symmetric=False, granularity="group", group_size=group_size, float_zero_point=True)


def merge_number(function):
    generator = torch.Generator().manual_seed(11)
    for low, high, bits in ((-1.0, 1.0, 4), (-1.0, 1.0, 3), (-0.5, 1.5, 2), (-3.0, 0.25, 8)):
        fmt = IntAffine(bits, symmetric=False, granularity="tensor", float_zero_point=True)
        w = low + (high - low) * torch.rand(40, generator=generator)
        q = fmt.quantize(torch.cat([torch.tensor([low, high]), w]))  # the ends set the range
        delta = torch.randn(42, generator=generator)
        ours = [function(x, d, low, high, bits) for x, d in zip(w, delta[2:], strict=True)]
        expected = {
            "code": q.codes.float(),
            "stands for": q.dequantize(),
            "naive: code + Δ": merge_naive_add(q, delta),
            "dequantize first": merge_dequantize(q, delta),
        }
        assert ours[0].keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(torch.stack([one[name] for one in ours]), values[2:], rtol=1e-5, atol=1e-6)


def five_merges(function):
    generator = torch.Generator().manual_seed(12)
    for shape, block, size in (((8, 128), 64, 0.3), ((5, 64), 32, 0.03), ((16, 256), 128, 0.01), ((3, 64), 64, 2.0)):
        w = torch.randn(shape, generator=generator) * 0.02
        delta = torch.randn(shape, generator=generator) * 0.02 * size
        q = NF4(block).quantize(w)
        expected = {
            "naive: codes + Δ": merge_naive_add(q, delta),
            "naive: move the codes": merge_naive_codes(q, delta).dequantize(),
            "re-quantize": merge_requantize(q, delta).dequantize(),
            "original": w + delta,
            "dequantize first": merge_dequantize(q, delta),
        }
        ours = function(w, delta, NF4(block).levels, block)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], weight) for name, weight in expected.items())


def kept_on_even_steps(function):
    """Against rounding itself: weights on the levels of a grid whose ends do not move."""
    generator = torch.Generator().manual_seed(13)
    fmt = groups_of(8, 4096)
    for rho in (0.5, 0.8, 1.0, 1.5, 3.0):
        w = torch.rand(32, 4096, generator=generator)
        w[:, 0], w[:, 1] = -1.0, 2.0
        q = fmt.quantize(w)
        delta = torch.randn(w.shape, generator=generator) * (rho * q.params["scale"] / math.sqrt(12))
        delta[:, :2] = 0
        moved = merge_requantize(q, delta).dequantize() - q.dequantize()
        assert abs(function(rho) - float((moved * delta).sum() / delta.square().sum())) < 0.01
    assert function(0.1) < 1e-12 and abs(function(20) - 1) < 1e-12


def expected_kept(function):
    generator = torch.Generator().manual_seed(14)
    for fmt, tolerance in ((groups_of(4, 64), 0.02), (groups_of(4, 32), 0.02), (NF4(), 0.02), (NF4(128), 0.02)):
        w = torch.randn(512, 256, generator=generator)
        q, (first, last) = fmt.quantize(w), code_range(fmt)
        n = fmt.blocks(w).shape[-1]

        def laid_out(x, fmt=fmt, n=n):
            return fmt.blocks(x).reshape(-1, n)

        every = [laid_out(fmt.decode(torch.full_like(q.codes, c), q.params))[:, 0] for c in range(first, last + 1)]
        ladder, w_hat, x = torch.stack(every, 1), laid_out(q.dequantize()), laid_out(w)
        if isinstance(fmt, NF4):
            v = (w_hat / w_hat.abs().amax(1, keepdim=True)).square()
            ends = (x.abs().argmax(1, keepdim=True),)
        else:
            t = (w_hat - ladder[:, :1]) / (ladder[:, -1:] - ladder[:, :1])
            v = t.square() + (1 - t).square()
            ends = x.argmax(1, keepdim=True), x.argmin(1, keepdim=True)
        for rho in (0.4, 0.7, 1.0, 2.0):
            sigma = rho * float((w - q.dequantize()).square().mean().sqrt())
            delta = sigma * torch.randn(w.shape, generator=generator)
            kept = function(ladder, w_hat, torch.full_like(w_hat, sigma), v)
            assert kept.shape == w_hat.shape
            for end in ends:
                kept.scatter_(1, end, 1.0)
            assert abs(float(kept.mean()) - survival(w, delta, fmt).kept) < tolerance, (fmt, rho)


ORACLES = {
    "merge_number": merge_number,
    "five_merges": five_merges,
    "kept_on_even_steps": kept_on_even_steps,
    "expected_kept": expected_kept,
}
