"""The merges of one weight, against their definitions; and what of Δ survives them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.adapters.merge_weight import (
    add,
    measure,
    merge_dequantize,
    merge_naive_add,
    merge_naive_codes,
    merge_requantize,
    merge_zero_points,
    stochastic_codes,
    survival,
    to_q4_1,
)
from qlab.formats import (
    FP4,
    NF4,
    NVFP4,
    Q4_0,
    Q4_1,
    Q8_0,
    Binary,
    FloatCast,
    IntAffine,
    KMeans,
    ProductQuantizer,
    QTensor,
    Ternary,
)

SHAPE = (16, 128)
FLOAT_ZEROS = {"symmetric": False, "granularity": "group", "group_size": 32, "float_zero_point": True}
FORMATS = [
    NF4(64), NF4(64, double_quant=True), FP4(32), Q4_0(), Q4_1(), Q8_0(), NVFP4(), Binary(), Ternary(), Ternary("bitnet"),
    IntAffine(4), IntAffine(4, narrow=False), IntAffine(3, **FLOAT_ZEROS), IntAffine(2, symmetric=False, granularity="channel"),
]  # fmt: skip


def draw(seed, shape=SHAPE, size=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def low_rank(seed, w, share):
    """A Δ of rank 4 with ‖Δ‖ = share · ‖w‖."""
    delta = draw(seed, (w.shape[0], 4)) @ draw(seed + 1, (4, w.shape[1]))
    return delta * (share * w.norm() / delta.norm())


def test_the_scalar_demo():
    """16 even levels from −1 to 1: S = −0.22289008 is code 6, −0.2; G = 0.8382505."""
    fmt = IntAffine(4, symmetric=False, granularity="tensor", float_zero_point=True)
    params = fmt.from_range(torch.tensor(-1.0), torch.tensor(1.0))
    s, g = torch.tensor([-0.22289008]), torch.tensor([0.8382505])
    codes = fmt.encode(s, params)
    q = QTensor(fmt, fmt.pack(codes), params, s.shape, s.dtype)
    assert q.codes.item() == 6 and q.dequantize().item() == pytest.approx(-0.2, abs=1e-7)
    assert merge_naive_add(q, g).item() == pytest.approx(6.8382505)
    assert merge_dequantize(q, g).item() == pytest.approx(0.6382505)
    assert merge_naive_codes(q, g).codes.item() == 12  # 0.6382505 lies nearest to −1 + 12 · 2/15 = 0.6


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_and_requantize(fmt, dtype):
    w = draw(0).to(dtype)
    q, delta = fmt.quantize(w), low_rank(1, w.float(), 0.1)
    exact = fmt.dequantize(q) + delta
    assert torch.equal(merge_dequantize(q, delta), exact.to(dtype)) and merge_dequantize(q, delta).dtype == dtype
    assert torch.equal(merge_dequantize(q, delta, torch.float32), exact)
    merged, expected = merge_requantize(q, delta), fmt.quantize(q.dequantize() + delta)
    assert torch.equal(merged.packed, expected.packed) and merged.dtype == dtype and merged.format is fmt
    assert all(torch.equal(param, expected.params[name]) for name, param in merged.params.items())


def test_add_rounds_once():
    w, delta = draw(0).bfloat16(), draw(1).bfloat16() / 300
    assert torch.equal(add(w, delta), (w.float() + delta.float()).bfloat16())
    assert torch.equal(add(w, delta, torch.float32), w.float() + delta.float())
    assert add(w.double(), delta).dtype == torch.float64


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_stochastic_rounding_has_the_right_mean(fmt):
    """Each weight lands on one of the two levels around it, so often that the mean is the weight."""
    w, runs = draw(3), 400
    params, generator = fmt.fit(w), torch.Generator().manual_seed(0)
    stored = fmt.stored(params)
    first, last = getattr(fmt, "qmin", fmt.lowest_code), getattr(fmt, "qmax", fmt.lowest_code + len(fmt.values) - 1)
    every = [torch.full(SHAPE, code, dtype=fmt.code_dtype) for code in range(first, last + 1)]
    levels = torch.stack([fmt.decode(codes, stored) for codes in every]).double()
    target = w.double().clamp(levels.amin(0), levels.amax(0))  # beyond the outermost level: that level
    low = levels.masked_fill(levels > target, -math.inf).amax(0)
    high = levels.masked_fill(levels < target, math.inf).amin(0)
    drawn = torch.stack([fmt.decode(stochastic_codes(fmt, w, params, generator), stored) for _ in range(runs)]).double()
    assert ((drawn == low) | (drawn == high)).all(), "only the two neighbours"
    upper, gap = torch.where(high > low, (target - low) / (high - low), 0), high - low
    sampling = gap * (upper * (1 - upper) / runs).sqrt()
    apart = drawn.mean(0) - target
    assert (apart.abs() <= 5 * sampling + 3 * gap / runs + 1e-7).all()
    assert (gap > 0).float().mean() > 0.5 and abs(apart.sum()) <= 5 * sampling.square().sum().sqrt() + 1e-4


@pytest.mark.parametrize("fmt", [NF4(64), IntAffine(4), FP4(64), Q4_0()], ids=str)
def test_what_is_on_a_level_stays_there(fmt):
    q = fmt.quantize(draw(4))
    codes = stochastic_codes(fmt, fmt.dequantize(q), q.params, torch.Generator().manual_seed(1))
    assert torch.equal(fmt.decode(codes, q.params), fmt.dequantize(q)) and codes.dtype == q.codes.dtype
    if isinstance(fmt, FP4):
        assert 8 not in codes, "−0 is no code of bitsandbytes"


def test_stochastic_merge_keeps_a_small_delta_on_average():
    """Where nearest rounding keeps nothing of Δ, the mean of stochastic merges is Ŵ + Δ."""
    w = draw(5)
    delta, q, runs = low_rank(6, w, 0.01), NF4(64).quantize(w), 300
    generator = torch.Generator().manual_seed(2)
    mean = torch.stack([merge_requantize(q, delta, generator).dequantize() for _ in range(runs)]).double().mean(0)
    nearest, averaged = merge_requantize(q, delta).dequantize(), measure(q.dequantize(), delta, mean)
    assert measure(q.dequantize(), delta, nearest).kept < 0.05 and averaged.kept == pytest.approx(1, abs=0.03)
    assert averaged.error < 0.35 < 0.9 < measure(q.dequantize(), delta, nearest).error
    seeded = [merge_requantize(q, delta, torch.Generator().manual_seed(seed)).packed for seed in (7, 7, 8)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize("fmt", [KMeans(4), ProductQuantizer(4), FloatCast("bf16")], ids=str)
def test_codes_without_levels_are_refused(fmt):
    q = fmt.quantize(draw(0))
    for merged in (lambda: merge_requantize(q, draw(1), torch.Generator()), lambda: merge_naive_codes(q, draw(1))):
        with pytest.raises(ValueError, match="fixed levels"):
            merged()


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS if isinstance(f, IntAffine) and not isinstance(f, Ternary)], ids=str
)
def test_naive_codes_on_even_codes_is_a_grid_that_does_not_move(fmt):
    q, delta = fmt.quantize(draw(0)), low_rank(1, draw(0), 0.2)
    merged = merge_naive_codes(q, delta)
    away = merged.codes.int() - fmt.encode(q.dequantize() + delta, q.params).int()
    assert away.abs().max() <= 1 and (away != 0).float().mean() < 1e-3  # but for ties
    assert merged.params is q.params and (merged.codes != q.codes).any() and merged.codes.max() <= fmt.qmax


def test_naive_codes_on_nf4_is_another_weight():
    """Steps of 2/15 of absmax are not those between NF4's levels."""
    w = draw(0)
    q, delta = NF4(64).quantize(w), low_rank(1, w, 0.3)
    step = 2 * q.params["absmax"].repeat_interleave(64).view(SHAPE) / 15
    expected = (q.codes + delta / step).round().clamp(0, 15)
    assert torch.equal(merge_naive_codes(q, delta).codes, expected.to(torch.uint8))
    errors = [
        measure(q.dequantize(), delta, m(q, delta).dequantize()).error for m in (merge_naive_codes, merge_requantize)
    ]
    assert errors[0] > 1.3 * errors[1]
    assert torch.equal(merge_naive_add(q, delta, torch.float32), q.codes + delta)
    empty = NF4(64).quantize(torch.zeros(SHAPE))
    assert torch.equal(merge_naive_codes(empty, delta).codes, empty.codes), "a block without a range has no steps"


@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4]), st.sampled_from([0.01, 0.1, 0.5]))
def test_zero_points_take_up_what_is_constant_in_a_group(seed, bits, share):
    q = IntAffine(bits, **FLOAT_ZEROS).quantize(draw(seed))
    delta = low_rank(seed, torch.ones(16, 4), share * float(q.dequantize().norm()) / 8)  # (out, groups)
    merged = merge_zero_points(q, delta / q.params["scale"])
    spread = delta.repeat_interleave(32, 1)
    assert measure(q.dequantize(), spread, merged.dequantize()).error < 1e-4
    assert merged.packed is q.packed and torch.equal(merged.params["scale"], q.params["scale"])
    assert merged.bits_per_weight == bits + 2  # float32 scale and zero point for 32 weights


def test_zero_points_are_as_exact_as_they_are_stored():
    q = IntAffine(4, **FLOAT_ZEROS).quantize(draw(0))
    delta = draw(1, (16, 4), 0.01 * 0.02)
    errors = []
    for dtype in (None, torch.float16, torch.bfloat16, torch.uint8):
        merged = merge_zero_points(q, delta / q.params["scale"], dtype)
        errors.append(measure(q.dequantize(), delta.repeat_interleave(32, 1), merged.dequantize()).error)
        assert merged.params["zero_point"].dtype == (dtype or torch.float32)
        assert merged.format.float_zero_point == (dtype != torch.uint8) and q.format.float_zero_point
    assert errors == sorted(errors) and errors[0] < 1e-4 and errors[1] > 0.01 and errors[2] > 0.1 and errors[3] > 1


def test_zero_points_refusals():
    q = IntAffine(4, **FLOAT_ZEROS).quantize(draw(0))
    with pytest.raises(ValueError, match=r"\(16, 4\), got \(16, 1\)"):
        merge_zero_points(q, torch.zeros(16, 1))
    with pytest.raises(ValueError, match="torch.float16.*keep them in torch.float32"):
        merge_zero_points(q, torch.full((16, 4), 1e6), torch.float16)
    for fmt in (IntAffine(4, symmetric=False, granularity="group", group_size=32), IntAffine(4), NF4(), Q4_1()):
        with pytest.raises(ValueError, match="has none"):
            merge_zero_points(fmt.quantize(draw(0)), torch.zeros(16, 4))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("float_zero_point", [True, False])
def test_q4_1_blocks(bits, group_size, float_zero_point):
    settings = {**FLOAT_ZEROS, "group_size": group_size, "float_zero_point": float_zero_point}
    q = IntAffine(bits, **settings).quantize(draw(0))
    blocks = to_q4_1(q)
    assert torch.equal(blocks.codes, q.codes) and blocks.bits_per_weight == 5
    scale, zero_point = q.params["scale"], q.params["zero_point"].float()
    wide = [
        param.repeat_interleave(group_size, 1).view(SHAPE) for param in (scale.half(), (-scale * zero_point).half())
    ]
    assert torch.equal(blocks.dequantize(), q.codes * wide[0].float() + wide[1].float())
    half = 2.0**-11  # the relative error of a float16
    bound = half * (
        q.codes * scale.repeat_interleave(group_size, 1) + (scale * zero_point).abs().repeat_interleave(group_size, 1)
    )
    assert ((blocks.dequantize() - q.dequantize()).abs() <= bound * 1.001 + 1e-7).all()
    data = Q4_1().to_bytes(blocks)
    assert torch.equal(Q4_1().from_bytes(data).dequantize(), blocks.dequantize())


@pytest.mark.parametrize(
    "fmt",
    [NF4(32), IntAffine(4), IntAffine(8, **FLOAT_ZEROS), IntAffine(4, **{**FLOAT_ZEROS, "group_size": 16})],
    ids=str,
)
def test_q4_1_refuses_other_formats(fmt):
    with pytest.raises(ValueError, match="Q4_1 holds codes 0 … 15"):
        to_q4_1(fmt.quantize(draw(0)))


def test_q4_1_refuses_what_float16_cannot_hold():
    with pytest.raises(ValueError, match="65504"):
        to_q4_1(IntAffine(4, **FLOAT_ZEROS).quantize(draw(0) + 1e5))


def test_measures():
    w_hat, delta = draw(0), draw(1, size=0.001)
    point = measure(w_hat, delta, w_hat + 0.25 * delta, torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5]))
    assert point.kept == pytest.approx(0.25, abs=1e-4) and point.error == pytest.approx(0.75, abs=1e-4)
    assert point.codes_changed == 0.25 and point.size == pytest.approx(float(delta.norm() / w_hat.norm()))
    nothing = measure(w_hat, torch.zeros(SHAPE), w_hat)
    assert (
        nothing.size == 0
        and math.isnan(nothing.kept)
        and math.isnan(nothing.error)
        and math.isnan(nothing.codes_changed)
    )


@pytest.mark.parametrize(
    "share, kept, error, original",
    [(0.01, 0.01, 1.07, 9.2), (0.03, 0.05, 1.07, 3.1), (0.1, 0.83, 0.77, 0.92), (0.3, 0.99, 0.32, 0.31)],
)
def test_a_small_delta_does_not_survive_nf4(share, kept, error, original):
    w = draw(0, (256, 512))
    point = survival(w, low_rank(1, w, share), NF4(64))
    assert point.size == pytest.approx(share, rel=0.01) and point.kept == pytest.approx(kept, abs=0.05)
    assert point.error == pytest.approx(error, rel=0.05) and point.original == pytest.approx(original, rel=0.02)


def test_survival_is_what_it_says():
    w = draw(0)
    delta, fmt = low_rank(1, w, 0.2), IntAffine(3)
    q = fmt.quantize(w)
    merged = fmt.quantize(q.dequantize() + delta)
    point = survival(w, delta, fmt)
    assert point.codes_changed == float((merged.codes != q.codes).double().mean()) > 0
    assert point.error == pytest.approx(float((merged.dequantize() - q.dequantize() - delta).norm() / delta.norm()))
    assert point.original == pytest.approx(float((w - q.dequantize()).norm() / delta.norm()))
    drawn = survival(w, delta, fmt, torch.Generator().manual_seed(0))
    assert drawn.error > point.error and drawn.kept == pytest.approx(1, abs=0.3)
