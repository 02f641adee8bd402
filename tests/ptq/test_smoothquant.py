"""SmoothQuant: the formula by hand, exactness in float, what it is for, and channels that are never used."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.calibrate import InputStats
from qlab.formats import IntAffine
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq.llm_int8 import LLMInt8
from qlab.ptq.method import RTN, Method
from qlab.ptq.smoothquant import SmoothQuant, smooth_scale


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(tokens=256, channels=64, seed=0):
    """Activations of which two channels are 40 times as large, the same in every token."""
    x = random(tokens, channels, seed=seed)
    x[:, [3, 17]] *= 40
    return x


# --- the formula


def test_by_hand():
    amax, w = torch.tensor([16.0, 1.0, 9.0]), torch.tensor([[4.0, 0.25, 0.0], [-1.0, -1.0, 1.0]])
    torch.testing.assert_close(smooth_scale(amax, [w]), torch.tensor([2.0, 1.0, 3.0]))
    torch.testing.assert_close(smooth_scale(amax, [w], 0.75), torch.tensor([8 / 2**0.5, 1.0, 27**0.5]))
    assert smooth_scale(amax, [w], 1.0).tolist() == [16, 1, 9], "all of it into the weights"
    torch.testing.assert_close(smooth_scale(amax, [w], 0.0), torch.tensor([0.25, 1.0, 1.0]))


def test_the_maximum_is_over_all_layers_that_share_the_input():
    amax, q, k = torch.tensor([4.0, 4.0]), torch.tensor([[1.0, 9.0]]), torch.tensor([[-16.0, 1.0], [2.0, 1.0]])
    torch.testing.assert_close(smooth_scale(amax, [q, k]), torch.tensor([0.5, 2 / 3]))
    assert torch.equal(smooth_scale(amax, [k, q]), smooth_scale(amax, [torch.cat([q, k])]))


def test_at_one_half_activations_and_weights_get_the_same_maxima():
    x, w = with_outliers(), random(32, 64, seed=1)
    s = smooth_scale(x.abs().amax(0), [w])
    torch.testing.assert_close((x / s).abs().amax(0), (w * s).abs().amax(0))


@given(st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 3))
def test_the_product_is_the_same_in_float(seed, alpha, layers):
    x = with_outliers(32, 48, seed=seed)
    weights = [random(16 + i, 48, seed=seed + i) * 0.05 for i in range(layers)]
    s = smooth_scale(x.abs().amax(0), weights, alpha)
    for w in weights:
        before, after = x.double() @ w.double().T, (x / s) @ (w * s).T
        assert float((after - before).norm() / before.norm()) < 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_dead_channels(alpha):
    """An input that was never anything but 0, and weights that are."""
    amax, w = torch.tensor([0.0, 2.0, 0.0, 1e-30, 3e38]), torch.tensor([[1.0, 0.0, 0.0, 1e-30, 1e-30]])
    s = smooth_scale(amax, [w], alpha)
    assert s.isfinite().all() and (s >= 1e-5).all()
    assert (torch.zeros(5) / s * (w * s)).isfinite().all()
    floor = torch.tensor(1e-5)
    expected = torch.tensor([0.0**alpha, 2**alpha / 1e-5 ** (1 - alpha)])  # |W| is clamped from below too
    torch.testing.assert_close(s[:2], expected.maximum(floor), rtol=1e-5, atol=0)


def test_dtypes_and_layouts():
    x, w = with_outliers(), random(64, 32, seed=1).T
    amax = x.abs().amax(0)
    s = smooth_scale(amax, [w])
    assert torch.equal(smooth_scale(amax, [w.contiguous()]), s)
    half = smooth_scale(amax.bfloat16(), [w.bfloat16(), w.half()])
    assert half.dtype == s.dtype == torch.float32
    torch.testing.assert_close(half, s, rtol=0.01, atol=0)
    assert smooth_scale(amax.double(), [w.double()]).dtype == torch.float32
    assert not smooth_scale(amax, [w.clone().requires_grad_()]).requires_grad


def test_what_cannot_be_smoothed():
    amax, w = torch.ones(4), torch.ones(2, 4)
    for alpha in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"exponent between 0 and 1, got {alpha}"):
            smooth_scale(amax, [w], alpha)
    for weights in ([], [w, torch.ones(2, 5)], [torch.ones(4)], [torch.ones(0, 4)]):
        with pytest.raises(ValueError, match=r"amax must be \(in,\)"):
            smooth_scale(amax, weights)
    with pytest.raises(ValueError, match=r"amax must be \(in,\)"):
        smooth_scale(torch.ones(1, 4), [w])
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="amax must be finite and not negative"):
            smooth_scale(torch.tensor([1.0, bad, 1.0, 1.0]), [w])
    with pytest.raises(ValueError, match="1 NaN and 0 Inf in 8 values"):
        smooth_scale(amax, [w, torch.tensor([[1.0, 1, 1, 1], [1, 1, math.nan, 1]])])


# --- what it is for


def test_w8a8_of_activations_with_outliers():
    x, w = with_outliers(), random(32, 64, seed=1) * 0.05
    exact, s = x @ w.T, smooth_scale(x.abs().amax(0), [w])

    def error(scale):
        layer = QuantLinear(IntAffine(8).quantize(w if scale is None else w * scale), None, ActQuant(), scale)
        return float((layer(x) - exact).norm() / exact.norm())

    assert error(s) < 0.5 * error(None)
    ends = [error(smooth_scale(x.abs().amax(0), [w], alpha)) for alpha in (0.0, 1.0)]
    assert error(s) < min(ends), "a balance: neither end is best"


# --- the Method


class Codes(Method):
    keep = ("hessian", "amax")

    def check(self, fmt, shape=None):
        raise ValueError(f"not {fmt}")

    def quantize(self, w, fmt, stats, name):
        return fmt.quantize(w), torch.arange(w.shape[1]) // 2


def test_the_method():
    method, fmt = SmoothQuant(alpha=0.3), IntAffine(8)
    assert method.keep == ("amax",) and isinstance(method.codes, RTN)
    assert method.activations.config() == ActQuant(bits=8, granularity="token").config()
    x, weights = with_outliers(), [random(8, 64, seed=1), random(4, 64, seed=2)]
    stats = InputStats(keep=method.keep)
    stats.observe(x)
    assert torch.equal(method.scale(weights, stats, [fmt, fmt]), smooth_scale(x.abs().amax(0), weights, 0.3))
    q, g_idx = method.quantize(weights[0], fmt, stats, "layer")
    assert g_idx is None and torch.equal(q.packed, fmt.quantize(weights[0]).packed)
    method.check(fmt)


def test_codes_of_another_method():
    method, w, fmt = SmoothQuant(codes=Codes()), random(4, 8), IntAffine(4)
    assert method.keep == ("amax", "hessian")
    assert method.quantize(w, fmt, None, "layer")[1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="not IntAffine"):
        method.check(fmt)


def test_codes_with_a_transform_or_activations_of_their_own():
    for codes in (SmoothQuant(), LLMInt8()):
        with pytest.raises(ValueError, match=type(codes).__name__):
            SmoothQuant(codes=codes)
