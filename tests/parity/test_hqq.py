"""HQQ against the hqq package: codes, scale and zero point, bit for bit."""

import pytest
import torch
from hqq.core import optimize, quantize
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats import IntAffine
from qlab.ptq.hqq import hqq


def float_zero(bits, group_size):
    return IntAffine(bits, False, "group" if group_size else "channel", group_size, float_zero_point=True)


def weight(seed, size, shape=(64, 256)):
    """Gaussian, with outliers in one row, a row of few distinct values and one that is all positive."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w[0, ::50] *= 30
    w[1] = (w[1] * 2).round()
    w[2] = w[2].abs() + 1
    return w * size


def same(w, bits, group_size):
    """Ours and theirs, and whether they are equal."""
    q = hqq(w, float_zero(bits, group_size))
    codes, meta = quantize.Quantizer.quantize(w, nbits=bits, group_size=group_size, axis=1, bitpack=False, device="cpu")
    shape = q.params["scale"].shape
    assert torch.equal(q.params["scale"], meta["scale"].view(shape))
    assert torch.equal(q.params["zero_point"], meta["zero"].view(shape))
    assert torch.equal(q.codes.to(w.dtype), codes.view(w.shape))


@pytest.mark.parametrize("size", [0.02, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("group_size", [16, 64, 128, None])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_equals_the_package(bits, group_size, size):
    same(weight(bits, size), bits, group_size)


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 3, 4]), st.sampled_from([32, 64, None]), st.floats(-1.5, 2))
def test_equals_the_package_on_any_size(seed, bits, group_size, exponent):
    same(weight(seed, 10.0**exponent, (16, 64)), bits, group_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype):
    same(weight(0, 0.1).to(dtype), 4, 64)


def test_a_layer_of_a_real_size():
    """More weights than are worked on at a time."""
    same(weight(0, 0.02, (512, 1024)), 4, 64)


@pytest.mark.parametrize("solver, kappa", [("legacy", 1.0), ("v2", 1.3)])
def test_settings(solver, kappa):
    """The default solver takes no notice of kappa, the other one does; without its stop it takes the same steps."""
    w = weight(0, 2.0)
    groups = w.view(-1, 64)
    low, high = groups.aminmax(dim=1, keepdim=True)
    inverse = 3 / (high - low)
    settings = {"lp_norm": 0.5, "beta": 3.0, "kappa": kappa, "iters": 4, "tol": 0.0}
    settings |= {"early_stop": False, "scale_gridsearch": False}
    solve = getattr(optimize, f"optimize_weights_proximal_{solver}")
    _, _, zero = solve(groups, inverse, -low * inverse, [0, 3], axis=1, device="cpu", opt_params=settings)

    def ours(**settings):
        return hqq(w, float_zero(2, 64), p=0.5, beta=3.0, **settings).params["zero_point"].view(-1, 1)

    assert torch.equal(ours(kappa=kappa, iterations=4), zero)
    assert not torch.equal(ours(kappa=kappa, iterations=3), zero), "the error fell to the last step"
    assert not torch.equal(ours(kappa=1.1, iterations=4), zero)


def test_small_ranges_keep_their_codes():
    """The package widens a range below 15 / 20000 and gives up on one below 0.0001, for the sake of float16 scales."""
    w = weight(0, 1.0, (8, 64))[3:]
    for size in (3e-5, 1e-6):
        codes, meta = quantize.Quantizer.quantize(w * size, nbits=4, group_size=64, axis=1, bitpack=False, device="cpu")
        theirs = ((codes - meta["zero"]) * meta["scale"]).view(w.shape) / size
        ours = hqq(w * size, float_zero(4, 64)).dequantize() / size
        assert (ours - w).norm() < 0.1 * w.norm() < 0.3 * (theirs - w).norm()
