"""HQQ: by hand, against the formulas written out in float64, and on hostile weights."""

import importlib
import math

import pytest
import torch
from torch.nn.functional import softshrink

from qlab.formats import NF4, FloatCast, IntAffine
from qlab.ptq.hqq import HQQ, hqq, shrink_lp


def float_zero(bits=4, group_size=None, **settings):
    return IntAffine(bits, False, "group" if group_size else "channel", group_size, float_zero_point=True, **settings)


def gaussian(seed=0, shape=(32, 128), size=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def written_out(w, bits, group_size, p, beta, kappa, iterations):
    """zero_point (groups,), float64: the two steps as the source states them, and where they stop."""
    w = w.double().reshape(-1, group_size)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    s = (high - low) / (2**bits - 1)
    z, least = -low / s, math.inf
    for _ in range(iterations):
        w_q = (w / s + z).round().clamp(0, 2**bits - 1)
        error = w - s * (w_q - z)
        w_e = error.sign() * (error.abs() - error.abs() ** (p - 1) / beta).clamp(min=0)
        z = (w_q - (w - w_e) / s).mean(1, keepdim=True)
        if not float(error.abs().mean()) < least:
            break
        least, beta = float(error.abs().mean()), beta * kappa
    return z.flatten()


# --- by hand


def test_one_iteration_by_hand():
    w = torch.tensor([[-0.3, 0.0, 0.0, 0.1, 0.6]])  # scale 0.3, codes 0 1 1 1 3, errors 0 0 0 0.1 0
    q = hqq(w, float_zero(2), iterations=1)
    torch.testing.assert_close(q.params["scale"], torch.tensor([0.3]))
    torch.testing.assert_close(q.params["zero_point"], torch.tensor([1 - 0.1 / 0.3 / 5]))
    assert q.codes.tolist() == [[0, 1, 1, 1, 3]]
    shrunk = hqq(w, float_zero(2), iterations=1, p=1.0, beta=20.0)  # of the error 0.1, 0.05 is left to outliers
    torch.testing.assert_close(shrunk.params["zero_point"], torch.tensor([1 - 0.05 / 0.3 / 5]))


def test_shrink_by_hand():
    x = torch.tensor([-1.0, 0.25, 4.0, 0.0])
    torch.testing.assert_close(shrink_lp(x, 2.0, 0.5), torch.tensor([-0.5, 0.0, 3.75, 0.0]))
    x = gaussian()
    torch.testing.assert_close(shrink_lp(x, 4.0, 1.0), softshrink(x, 0.25))


@pytest.mark.parametrize("beta, p", [(10.0, 0.7), (3.0, 0.5), (10.0, 1.0)])
def test_small_errors_are_shrunk_to_nothing(beta, p):
    least = beta ** (-1 / (2 - p))
    assert shrink_lp(torch.tensor([0.999 * least, -0.999 * least]), beta, p).tolist() == [0, 0]
    assert shrink_lp(torch.tensor(1.001 * least), beta, p) > 0 > shrink_lp(torch.tensor(-1.001 * least), beta, p)


# --- the formulas


@pytest.mark.parametrize("size", [0.02, 0.5, 3.0])  # of 3.0, most errors are above the shrinkage, of 0.02 none
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "settings", [(0.7, 10.0, 1.0, 20), (0.5, 3.0, 1.3, 4), (1.0, 20.0, 1.1, 1)], ids=["default", "kappa", "p1"]
)
def test_equals_the_formulas(size, bits, settings):
    p, beta, kappa, iterations = settings
    w = gaussian(bits, size=size)
    q = hqq(w, float_zero(bits, 32), p=p, beta=beta, kappa=kappa, iterations=iterations)
    expected = written_out(w, bits, 32, *settings)
    close = (q.params["zero_point"].flatten() - expected).abs() < 2e-6 * 2**bits
    assert close.double().mean() > 0.97, "all but groups in which float32 rounds a weight to another code"


def test_kappa_and_beta_act_only_on_large_errors():
    """Weights of a language model are so small that nothing is left to outliers: z is then the zero point of no mean error."""
    large, small = gaussian(size=2.0), gaussian(size=0.02)
    fmt = float_zero(3, 64)
    for settings in ({"kappa": 1.5}, {"beta": 2.0}, {"p": 0.4}):
        other = hqq(large, fmt, **settings).params["zero_point"]
        assert not torch.equal(other, hqq(large, fmt).params["zero_point"])
    settings = {"kappa": 1.01, "beta": 8.0, "p": 0.9}
    assert torch.equal(hqq(small, fmt, **settings).params["zero_point"], hqq(small, fmt).params["zero_point"])


def test_a_group_ends_with_no_mean_error():
    w, fmt = gaussian(size=0.02), float_zero(4, 32)
    bias = [(fmt.blocks(q.dequantize()) - fmt.blocks(w)).mean(-1).abs().max() for q in (fmt.quantize(w), hqq(w, fmt))]
    assert bias[1] < 0.1 * bias[0]


@pytest.mark.parametrize("size", [0.02, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_better_than_rounding_to_nearest(size, bits, group_size):
    w, fmt = gaussian(bits, (64, 512), size), float_zero(bits, group_size)
    assert (hqq(w, fmt).dequantize() - w).norm() < (fmt.quantize(w).dequantize() - w).norm()


def test_the_published_ratio_at_4_bits():
    """.0869 of .0908 on a Gaussian, groups of 64."""
    w, fmt = gaussian(shape=(256, 1024), size=0.02), float_zero(4, 64)
    error = [float((q.dequantize() - w).norm() / w.norm()) for q in (fmt.quantize(w), hqq(w, fmt))]
    assert error[0] == pytest.approx(0.0908, rel=0.03)
    assert error[1] / error[0] == pytest.approx(0.0869 / 0.0908, abs=0.01)


def test_scale_is_that_of_min_max_and_codes_are_the_nearest():
    w = gaussian()
    for fmt in (float_zero(3, 32), float_zero(3), IntAffine(3, False, "tensor", float_zero_point=True)):
        q = hqq(w, fmt)
        torch.testing.assert_close(q.params["scale"], fmt.fit(w)["scale"], rtol=5e-7, atol=0)
        assert q.params["zero_point"].shape == q.params["scale"].shape == fmt.fit(w)["scale"].shape
        assert torch.equal(q.codes, fmt.encode(w, q.params)) and q.format is fmt


def test_heads():
    fmt = IntAffine(3, False, "head", heads=4, head_axis=1, float_zero_point=True)
    w = gaussian()
    blocks = hqq(w.view(32, 4, 32).movedim(1, 0).reshape(4, -1), float_zero(3))
    q = hqq(w, fmt)
    assert torch.equal(q.params["zero_point"], blocks.params["zero_point"])
    assert torch.equal(fmt.blocks(q.codes), blocks.codes)


def test_worked_on_in_slices(monkeypatch):
    for w in (gaussian(size=0.02), gaussian(size=2.0)):
        whole = hqq(w, float_zero(3, 32))
        for size in (1, 100, 5 * 32):
            monkeypatch.setattr(importlib.import_module("qlab.ptq.hqq"), "SLICE", size)
            assert torch.equal(hqq(w, float_zero(3, 32)).params["zero_point"], whole.params["zero_point"])
        monkeypatch.undo()


# --- hostile


def test_constant_and_zero_groups_are_exact():
    w = gaussian(shape=(4, 64), size=0.02)
    w[0, :32], w[1], w[2, 32:], w[3] = 0, -0.37, 1e-30, 0.1
    q = hqq(w, float_zero(4, 32))
    same = torch.ones(4, 64, dtype=torch.bool)
    same[0, 32:] = same[2, :32] = False
    assert torch.equal(q.dequantize()[same], w[same])
    assert torch.equal(hqq(w[[0, 2]], float_zero(4, 32)).codes[0, 32:], q.codes[0, 32:])
    assert torch.equal(hqq(torch.zeros(2, 8), float_zero(2)).dequantize(), torch.zeros(2, 8))


def test_tiny_and_huge_weights_stay_finite():
    """No range is widened to fit a scale in float16: a weight times a power of two has the same codes."""
    w = gaussian(size=0.02)
    codes = hqq(w, float_zero(4, 32)).codes
    for power in (-100, -20, -8):
        q = hqq(w * 2.0**power, float_zero(4, 32))
        assert torch.equal(q.codes, codes)
    w[0, 0], w[0, 1], w[1, :32] = 3e38, -3e38, torch.linspace(0, 1e-41, 32)
    for q in (hqq(w, float_zero(4, 32)), hqq(w, float_zero(4))):
        assert q.dequantize().isfinite().all() and q.params["scale"].isfinite().all()


def test_one_column_and_no_weights():
    w = torch.tensor([[0.3], [-2.0], [0.0]])
    assert torch.equal(hqq(w, float_zero(4)).dequantize(), w)
    for shape in ((0, 8), (3, 0)):
        assert hqq(torch.zeros(shape), float_zero(4)).dequantize().shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_worked_on_in_float32(dtype):
    w = gaussian(size=0.02).to(dtype)
    q, wide = hqq(w, float_zero(4, 32)), hqq(w.float(), float_zero(4, 32))
    assert torch.equal(q.codes, wide.codes) and torch.equal(q.params["zero_point"], wide.params["zero_point"])
    assert q.dtype == q.dequantize().dtype == dtype


def test_layouts_of_memory_and_the_weight_itself():
    w = gaussian(shape=(128, 32), size=0.02).requires_grad_()
    before = w.detach().clone()
    q, copied = hqq(w.T, float_zero(4, 32)), hqq(w.T.contiguous(), float_zero(4, 32))
    assert torch.equal(q.codes, copied.codes) and torch.equal(w.detach(), before)
    assert not q.params["zero_point"].requires_grad
    assert torch.equal(hqq(before, float_zero(4, 32)).dequantize().isfinite(), torch.ones(128, 32, dtype=torch.bool))
    assert torch.equal(before, w.detach())


def test_params_kept_in_half_precision():
    w, fmt = gaussian(size=0.02), float_zero(4, 32, param_dtype=torch.float16)
    q = hqq(w, fmt)
    assert {param.dtype for param in q.params.values()} == {torch.float16}
    assert torch.equal(q.codes, fmt.encode(w, q.params)), "codes of the params as kept"
    assert (q.dequantize() - w).norm() < (fmt.quantize(w).dequantize() - w).norm()


def test_weights_that_cannot_be_quantized():
    w = gaussian()
    w[3, 5] = math.nan
    with pytest.raises(ValueError, match=r"1 NaN and 0 Inf .* index \[3, 5\]"):
        hqq(w, float_zero(4, 32))
    with pytest.raises(TypeError, match="floating-point"):
        hqq(torch.ones(2, 8, dtype=torch.long), float_zero(4))
    with pytest.raises(ValueError, match="does not divide the row"):
        hqq(gaussian(), float_zero(4, 48))


@pytest.mark.parametrize(
    "fmt", [IntAffine(4), IntAffine(4, False), NF4(), FloatCast("bf16"), IntAffine(1, False)], ids=repr
)
def test_formats_without_a_float_zero_point(fmt):
    for refused in (lambda: HQQ().check(fmt), lambda: hqq(gaussian(), fmt)):
        with pytest.raises(ValueError, match="HQQ moves the zero point") as error:
            refused()
        assert repr(fmt) in str(error.value)


@pytest.mark.parametrize("setting", [{"p": 0.0}, {"p": 1.1}, {"beta": 0.0}, {"kappa": -1.0}, {"iterations": 0}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match="HQQ needs 0 < p ≤ 1") as error:
        hqq(gaussian(), float_zero(), **setting)
    assert "{}={}".format(*next(iter(setting.items()))) in str(error.value)


def test_the_method():
    method = HQQ(p=0.5, beta=3.0, kappa=1.2, iterations=4)
    fmt, w = float_zero(3, 32), gaussian()
    method.check(fmt)
    q, g_idx = method.quantize(w, fmt, None, "layer")
    expected = hqq(w, fmt, p=0.5, beta=3.0, kappa=1.2, iterations=4)
    assert g_idx is None and torch.equal(q.params["zero_point"], expected.params["zero_point"])
    assert torch.equal(q.codes, expected.codes) and not torch.equal(q.codes, hqq(w, fmt).codes)
    assert method.keep == () and method.activations is None and method.scale([w], None, [fmt]) is None
