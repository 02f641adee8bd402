"""IntAffine: by hand, its invariants on hostile weights, and torch's own fake-quantize bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats import IntAffine


@st.composite
def weights(draw, rows=st.integers(1, 6), columns=st.integers(1, 40)):
    """A 2-D weight of some dtype, size of numbers and memory layout, now and then constant, zero or with an outlier."""
    shape = draw(rows), draw(columns)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-20, 4))
    kind = draw(st.sampled_from(["normal", "constant", "zero", "positive", "outlier", "zero row", "ties"]))
    if kind == "constant":
        w = torch.full(shape, float(w[0, 0]))
    elif kind == "zero":
        w = torch.zeros(shape)
    elif kind == "positive":
        w = w.abs()
    elif kind == "outlier":
        w[0, 0] *= 1000
    elif kind == "zero row":
        w[0] = 0
    elif kind == "ties":
        w = torch.randint(-8, 8, shape, generator=generator) / 2
    w = w.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    if draw(st.booleans()):
        w = w.t().contiguous().t()
    return w


def every_format(columns):
    """One format of each granularity that fits a weight with `columns` columns."""
    for symmetric, narrow, float_zero_point in [(True, True, 0), (True, False, 0), (False, True, 0), (False, True, 1)]:
        common = dict(symmetric=symmetric, narrow=narrow, float_zero_point=bool(float_zero_point))
        for granularity in [dict(granularity="tensor"), dict(granularity="channel"),
                            dict(granularity="group", group_size=columns), dict(granularity="group", group_size=1),
                            dict(granularity="head", heads=1), dict(granularity="head", heads=columns, head_axis=1)]:  # fmt: skip
            yield common | granularity


# --- by hand


def test_symmetric_by_hand():
    q = IntAffine(bits=3, symmetric=True, granularity="tensor").quantize(torch.tensor([1.5, -3.0, 0.4, 0.6]))
    assert q.params["scale"] == 1.0  # amax 3 / qmax 3
    assert q.codes.tolist() == [2, -3, 0, 1]  # 1.5 is a tie: to the even 2
    assert q.codes.dtype == torch.int8
    assert q.dequantize().tolist() == [2.0, -3.0, 0.0, 1.0]


def test_asymmetric_by_hand():
    q = IntAffine(bits=2, symmetric=False, granularity="tensor").quantize(torch.tensor([-1.0, 2.0, 0.0, 0.6]))
    assert q.params["scale"] == 1.0 and q.params["zero_point"] == 1
    assert q.codes.tolist() == [0, 3, 1, 2]
    assert q.dequantize().tolist() == [-1.0, 2.0, 0.0, 1.0]


def test_all_codes_by_hand():
    """torchao's symmetric: amax / 7.5, so −amax lands on a tie and +amax is clipped by half a step."""
    q = IntAffine(bits=4, symmetric=True, granularity="tensor", narrow=False).quantize(torch.tensor([7.5, -7.5]))
    assert q.params["scale"] == 1.0
    assert q.codes.tolist() == [7, -8]


def test_the_range_is_widened_to_zero():
    q = IntAffine(bits=2, symmetric=False, granularity="tensor").quantize(torch.tensor([1.0, 2.0, 3.0]))
    assert q.params["zero_point"] == 0 and q.dequantize().tolist() == [1.0, 2.0, 3.0]


def test_float_zero_point_uses_every_code():
    q = IntAffine(bits=2, symmetric=False, granularity="tensor", float_zero_point=True).quantize(
        torch.tensor([1.25, 1.5, 1.75, 2.0])
    )
    assert q.codes.tolist() == [0, 1, 2, 3] and abs(float(q.params["zero_point"]) + 5) < 1e-6
    torch.testing.assert_close(q.dequantize(), torch.tensor([1.25, 1.5, 1.75, 2.0]))


def test_param_shapes():
    w = torch.randn(8, 12)
    shapes = {
        "tensor": ({}, ()),
        "channel": ({}, (8,)),
        "group": ({"group_size": 4}, (8, 3)),
        "head": ({"heads": 2}, (2,)),
    }
    for granularity, (more, shape) in shapes.items():
        params = IntAffine(4, False, granularity, **more).fit(w)
        assert {name: tuple(p.shape) for name, p in params.items()} == {"scale": shape, "zero_point": shape}


def test_heads_of_columns_and_rows():
    """Head 1 is a hundred times larger: only its own scale may see that."""
    w = torch.randn(6, 8)
    w[:, 4:] *= 100
    fmt = IntAffine(4, True, "head", heads=2, head_axis=1)
    params = fmt.fit(w)
    assert torch.equal(params["scale"], torch.stack([w[:, :4].abs().max(), w[:, 4:].abs().max()]) / 7)
    expected = torch.cat([IntAffine(4, True, "tensor").quantize(part).dequantize() for part in w.split(4, 1)], 1)
    assert torch.equal(fmt.quantize(w).dequantize(), expected)
    rows = IntAffine(4, True, "head", heads=2, head_axis=0)
    assert torch.equal(rows.quantize(w.t()).dequantize(), fmt.quantize(w).dequantize().t())


def test_bits_per_weight_counts_every_constant():
    w = torch.randn(4, 256)
    assert IntAffine(4, True, "group", 128).quantize(w).bits_per_weight == 4 + 32 / 128
    assert IntAffine(4, False, "group", 128).quantize(w).bits_per_weight == 4 + (32 + 8) / 128
    half = IntAffine(4, False, "group", 128, param_dtype=torch.float16)
    assert half.quantize(w).bits_per_weight == 4 + (16 + 8) / 128
    assert IntAffine(3, True, "channel").quantize(w).nbytes == 4 * 256 * 3 // 8 + 4 * 4


def test_params_kept_in_half_precision_are_the_ones_used():
    w = torch.randn(4, 64)
    fmt = IntAffine(8, True, "channel", param_dtype=torch.float16)
    q = fmt.quantize(w)
    scale = q.params["scale"].float()
    assert torch.equal(q.codes, (w * (1 / scale[:, None])).round().clamp(-127, 127).to(torch.int8))


# --- invariants


@given(weights(), st.integers(1, 8))
def test_invariants(w, bits):
    for settings in every_format(w.shape[1]):
        if bits == 1 and settings["symmetric"] and settings["narrow"]:
            continue
        fmt = IntAffine(bits, **settings)
        q = fmt.quantize(w)
        assert q.shape == w.shape and q.dequantize().dtype == w.dtype
        decoded = q.dequantize(torch.float32)
        assert torch.equal(fmt.decode(q.codes, q.params), decoded)
        low, high = fmt.limits(q.params, q.shape)
        scale = fmt.unblocks(q.params["scale"].unsqueeze(-1).expand(fmt.blocks(w).shape).contiguous(), w.shape)
        inside = (w.float() >= low) & (w.float() <= high)
        # half a step, plus the rounding of float32 itself
        slack = 1e-6 * torch.maximum(w.float().abs(), scale * 2**bits)
        assert ((decoded - w.float()).abs() <= scale / 2 + slack)[inside].all()
        if not settings["float_zero_point"]:
            assert (decoded[w == 0] == 0).all(), "zero must stay zero"
        constant = (fmt.blocks(w) == fmt.blocks(w)[..., :1]).all(-1, keepdim=True).expand(fmt.blocks(w).shape)
        constant = fmt.unblocks(constant.contiguous(), w.shape)
        if fmt.qmax > 0 and w.float().abs()[w != 0].numel() and w.float().abs()[w != 0].min() > 1e-37:
            assert torch.equal(decoded[constant], w.float()[constant]), "constant blocks are exact"
        if fmt.symmetric and fmt.narrow:
            assert torch.equal(fmt.quantize(decoded).codes, q.codes), "idempotent"


@pytest.mark.parametrize("bits", range(1, 9))
def test_more_bits_never_hurt(bits):
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    errors = [(IntAffine(b, False).quantize(w).dequantize() - w).square().mean() for b in (bits, bits + 1) if b < 9]
    assert errors[-1] <= errors[0]


def test_decode_is_differentiable_in_the_params():
    fmt = IntAffine(4, False, "group", group_size=4, float_zero_point=True)
    w = torch.randn(3, 8)
    codes = fmt.encode(w, fmt.fit(w))
    params = {name: p.double().requires_grad_() for name, p in fmt.fit(w).items()}
    fmt.decode(codes, params).sum().backward()
    expected = (fmt.blocks(codes).float() - params["zero_point"].detach().unsqueeze(-1)).sum(-1)
    torch.testing.assert_close(params["scale"].grad, expected.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(params["zero_point"].grad, -4 * params["scale"].detach())


# --- hostile input


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_empty(shape, granularity):
    q = IntAffine(4, False, granularity).quantize(torch.zeros(shape))
    assert q.dequantize().shape == torch.Size(shape)


def test_single_element_and_scalar():
    for w in (torch.tensor([[-0.3]]), torch.tensor(5.0)):
        assert torch.equal(IntAffine(2, False, "tensor").quantize(w).dequantize(), w)


def test_huge_range():
    w = torch.tensor([[-3e38, 3e38, 1e38, 0.0]])
    decoded = IntAffine(8, False).quantize(w).dequantize()
    assert decoded.isfinite().all() and (decoded - w).abs().max() <= 6e38 / 255 / 2 * 1.001


def test_subnormal_weights():
    """1/scale would overflow, and 0 · Inf is NaN: such weights become 0 instead."""
    w = torch.tensor([[1e-40, 0.0, -2e-40, 0.0]])
    assert IntAffine(4).quantize(w).dequantize().tolist() == [[0.0] * 4]


def test_narrow_codes_stay_narrow_when_clipped():
    fmt = IntAffine(4, True, "tensor")
    params = fmt.from_range(torch.tensor(-0.7), torch.tensor(0.7))
    assert fmt.encode(torch.tensor([-9.0, 9.0]), params).tolist() == [-7, 7]


def test_nan_and_inf_are_counted_and_located():
    w = torch.zeros(3, 4)
    w[1, 2], w[2, 0], w[2, 1] = float("nan"), float("inf"), float("-inf")
    for call in (lambda f: f.quantize(w), lambda f: f.fit(w), lambda f: f.encode(w, f.fit(torch.ones(3, 4)))):
        with pytest.raises(
            ValueError, match=r"1 NaN and 2 Inf in 12 values of shape \(3, 4\); the first is nan at index \[1, 2\]"
        ):
            call(IntAffine(4))


def test_integers_are_not_weights():
    with pytest.raises(TypeError, match="int64"):
        IntAffine(4).quantize(torch.ones(2, 2, dtype=torch.long))


def test_groups_must_divide_the_row():
    with pytest.raises(
        ValueError, match=r"group_size=48 does not divide the row: a weight of shape \(4, 128\) has rows of 128"
    ):
        IntAffine(4, True, "group", group_size=48).quantize(torch.zeros(4, 128))


def test_heads_must_divide():
    with pytest.raises(ValueError, match=r"heads=5 along axis 0 does not divide a weight of shape \(12, 8\)"):
        IntAffine(4, True, "head", heads=5).quantize(torch.zeros(12, 8))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(bits=9), "bits=9"),
        (dict(bits=1, symmetric=True), "only 0"),
        (dict(granularity="row"), "'row'"),
        (dict(granularity="group"), "group_size=None"),
        (dict(granularity="channel", group_size=8), "group_size=8"),
        (dict(granularity="group", group_size=0), "at least 1, got 0"),
        (dict(granularity="head"), "heads=None"),
        (dict(symmetric=True, float_zero_point=True), "symmetric"),
        (dict(granularity="head", heads=2, head_axis=2), "got 2"),
    ],
)
def test_contradicting_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        IntAffine(**settings)


def test_a_scale_too_small_for_fp16_is_refused():
    with pytest.raises(ValueError, match="float16"):
        IntAffine(4, param_dtype=torch.float16).quantize(torch.full((2, 4), 1e-12) * torch.arange(4))


def test_a_float_zero_point_beyond_its_dtype_is_refused():
    fmt = IntAffine(4, symmetric=False, granularity="channel", float_zero_point=True, param_dtype=torch.float16)
    w = torch.linspace(1, 1 + 1e-5, 8).view(1, 8)
    with pytest.raises(ValueError, match="zero_point is Inf in torch.float16"):
        fmt.quantize(w)
    torch.testing.assert_close(IntAffine(4, False, "channel", float_zero_point=True).quantize(w).dequantize(), w)
