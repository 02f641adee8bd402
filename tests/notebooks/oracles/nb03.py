"""Notebook 03: clipping ranges and their errors against qlab.calibrate and qlab.formats."""

import math

import torch

from qlab.calibrate import MSE, Entropy, MinMax, Percentile, kl_divergences
from qlab.formats import IntAffine, QTensor
from qlab.metrics import error_shares, mse


def activations():
    """Normal, one-sided, with outliers of both signs, and with ties: floating point, 2-D."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 50, generator=generator)
    spiked = x.clone()
    spiked[7, 3], spiked[:, 9] = -40.0, 6.0
    yield from (x, spiked, -spiked, torch.nn.functional.gelu(spiked), torch.arange(-60.0, 60).view(4, 30) / 8)


def observed(observer, x):
    observer.observe(x)
    return observer


def clip_and_round(function):
    for x in activations():
        for bits in range(2, 9):
            fmt = IntAffine(bits, granularity="tensor")
            for share in (1.0, 0.7, 0.1):
                threshold = share * x.abs().max()
                params = fmt.from_range(-threshold, threshold)
                q = QTensor(fmt, fmt.pack(fmt.encode(x, params)), params, x.shape, x.dtype)
                total, shares = mse(x, q.dequantize()), error_shares(x, q)
                clipping, rounding = function(x, threshold, bits)
                assert math.isclose(clipping, total * shares["clipping"], abs_tol=1e-9 * total)
                assert math.isclose(rounding, total * shares["rounding"], abs_tol=1e-9 * total)


def min_max(function):
    for x in activations():
        assert function(x) == observed(MinMax(), x).threshold()


def percentile(function):
    for x in activations():
        for p, one_in in ((90, 10), (99, 100), (99.9, 1000)):
            ours, observer = float(function(x, one_in)), observed(Percentile(p), x)
            below = [int(compare(x.abs(), ours).sum()) * one_in for compare in (torch.lt, torch.le)]
            assert below[0] < x.numel() * (one_in - 1) <= below[1]
            assert observer.threshold() == (ours // observer.seen.width + 1) * observer.seen.width


def mse_threshold(function):
    """qlab measures on the middles of bins: on values that are middles of bins the two grids give the same choice."""
    for x in activations():
        for bits in (2, 4, 8):
            middles, counts = observed(MSE(bits), x).seen.centers()
            x = middles.repeat_interleave(counts)
            errors = observed(MSE(bits), x).errors().flip(0)  # ascending thresholds
            share = float(function(x, bits) / x.abs().max())
            assert math.isclose(errors[round(100 * share) - 1], errors.min(), rel_tol=1e-3)


def kl_divergence(function):
    for x in activations():
        for levels, start in ((8, 16), (16, 40), (128, 128)):
            counts = observed(Entropy(levels=8, start_bin=8, bins=512), x).seen.magnitudes
            before = counts.clone()
            for kept, expected in zip(*kl_divergences(counts, levels, start, stride=7), strict=True):
                kl, p, q = function(counts, int(kept), levels)
                assert math.isclose(kl, float(expected), rel_tol=1e-9, abs_tol=1e-12)
                assert len(p) == len(q) == kept and math.isclose(p.sum(), 1) and math.isclose(q.sum(), 1)
            assert torch.equal(counts, before)


FUNCTIONS = (clip_and_round, min_max, percentile, mse_threshold, kl_divergence)
ORACLES = {function.__name__: function for function in FUNCTIONS}
