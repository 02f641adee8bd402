"""Notebook 06: output error, LLM.int8(), SmoothQuant's scale, GPTQ's loop and AWQ's search against qlab.ptq."""

import torch

from qlab.calibrate import InputStats, output_error
from qlab.formats import NF4, IntAffine
from qlab.nn import ActQuant
from qlab.ptq import gptq as qlab_gptq
from qlab.ptq import search_scale
from qlab.ptq import smooth_scale as qlab_smooth_scale


def layers():
    """(weight (out, in), inputs (tokens, in), their statistics): with outlier channels, and channels that move together."""
    generator = torch.Generator().manual_seed(6)
    for out, columns, tokens in ((5, 8, 40), (24, 64, 500), (40, 32, 300)):
        x = torch.randn(tokens, columns, generator=generator)
        x[:, 1] = 0.9 * x[:, 0] + 0.1 * x[:, 1]
        x[:, 2] *= 12
        stats = InputStats(("amax", "mean_abs", "hessian"))
        stats.observe(x)
        yield torch.randn(out, columns, generator=generator) * 0.05, x, stats


def error_of(function):
    for w, x, stats in layers():
        difference = IntAffine(3).quantize(w).dequantize() - w
        torch.testing.assert_close(function(difference, stats.hessian), output_error(difference, stats.hessian))
        from_inputs = (x @ difference.T).square().mean(0)
        torch.testing.assert_close(function(difference, stats.hessian), from_inputs, rtol=1e-4, atol=0)


def int8_product(function):
    for w, x, _ in layers():
        for threshold in (3.0, 6.0, 1e9):
            for values in (x, x.abs(), 0 * x):
                expected = ActQuant(8, threshold=threshold)(values) @ IntAffine(8).quantize(w).dequantize().T
                torch.testing.assert_close(function(values, w, threshold), expected, rtol=1e-4, atol=1e-5)


def smooth_scale(function):
    for w, _, stats in layers():
        for weights in ([w], [w, -3 * w.flip(1)], [w[:2], w.roll(1, 1)]):
            for alpha in (0, 0.25, 0.5, 0.9, 1):
                expected = qlab_smooth_scale(stats.amax, weights, alpha)
                torch.testing.assert_close(function(stats.amax, weights, alpha), expected)


def gptq(function):
    for w, _, stats in layers():
        for bits in (2, 3, 4):
            for damping in (0.01, 0.1):
                q, _ = qlab_gptq(w, stats.hessian, IntAffine(bits), damping=damping)
                before, states = w.clone(), [now.clone() for now in function(w, stats.hessian, bits, damping)]
                assert len(states) == w.shape[1] and torch.equal(w, before)
                # A weight on the border of two codes may fall either way, and changes the rest of its row.
                assert (states[-1] - q.dequantize()).abs().lt(1e-5).float().mean() > 0.97
                half = w.shape[1] // 2
                assert torch.equal(states[half - 1][:, :half], states[-1][:, :half])
                assert not torch.equal(states[half - 1][:, half:], w[:, half:])


def awq_errors(function):
    for w, x, stats in layers():
        for fmt in (IntAffine(3), IntAffine(2, granularity="group", group_size=8), NF4(8)):
            search = search_scale([w], stats.mean_abs, stats.hessian, fmt)
            errors = function(w, x, lambda v, fmt=fmt: fmt.quantize(v).dequantize())
            torch.testing.assert_close(errors.double(), search.errors, rtol=1e-2, atol=0)


FUNCTIONS = (error_of, int8_product, smooth_scale, gptq, awq_errors)
ORACLES = {function.__name__: function for function in FUNCTIONS}
