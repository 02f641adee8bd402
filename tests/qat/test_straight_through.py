"""The straight-through estimator: bits of the stored weight forward, the documented gradient backward, for every format."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.formats import (
    FP4,
    MXFP4,
    NF4,
    NVFP4,
    Q4_0,
    Q4_1,
    Q4_K,
    Q8_0,
    Binary,
    FloatCast,
    IntAffine,
    KMeans,
    ProductQuantizer,
    Ternary,
)
from qlab.qat import fake_quantize, inside, straight_through

GROUP = {"granularity": "group", "group_size": 32}
FORMATS = [
    IntAffine(8), IntAffine(4, granularity="tensor"), IntAffine(2, False, **GROUP), IntAffine(3, narrow=False),
    IntAffine(4, False, float_zero_point=True, param_dtype=torch.float16, **GROUP), IntAffine(4, granularity="head", heads=2),
    NF4(64), NF4(48, double_quant=True), FP4(32), FloatCast("fp16"), FloatCast("bf16"), Binary(), Binary("group", 32),
    Ternary("twn"), Ternary("twn", "channel"), Ternary("bitnet"), KMeans(2), KMeans(2, "channel"),
    ProductQuantizer(4, bits=2), Q4_0(), Q4_1(), Q8_0(), Q4_K(), MXFP4(), NVFP4(),
]  # fmt: skip
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=repr)


@st.composite
def weights(draw):
    """(4, 256), some dtype, magnitude and memory layout; zero rows, ties, an outlier."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(4, 256, generator=g) * 10.0 ** draw(st.integers(-6, 3))
    kind = draw(st.sampled_from(["normal", "positive", "outlier", "zero row", "all zero", "ties"]))
    if kind == "positive":
        w = w.abs()
    elif kind == "outlier":
        w[0, 0] *= 60
    elif kind == "zero row":
        w[1] = 0
    elif kind == "all zero":
        w = torch.zeros(4, 256)
    elif kind == "ties":
        w = torch.randint(-4, 5, (4, 256), generator=g) / 2
    w = w.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    return w.t().contiguous().t() if draw(st.booleans()) else w


@every_format
@settings(max_examples=12)
@given(w=weights())
def test_forward_has_the_bits_of_the_stored_weight(fmt, w):
    before = w.clone()
    w_hat = fake_quantize(w, fmt, fmt.fit(w))
    assert w_hat.dtype == w.dtype and torch.equal(w_hat, fmt.quantize(w).dequantize()) and torch.equal(w, before)


@every_format
def test_decode_of_encode_where_params_are_stored_as_they_are(fmt):
    w = torch.randn(4, 256)
    params = fmt.fit(w)
    stored = fmt.stored(params)
    if all(name in params and torch.equal(stored[name].float(), params[name].float()) for name in stored):
        assert torch.equal(fake_quantize(w, fmt, params), fmt.decode(fmt.encode(w, params), params))


@every_format
def test_gradient_is_one_inside_the_limits_and_zero_outside(fmt):
    if isinstance(fmt, FloatCast):
        pytest.skip("a cast clips nothing that it does not refuse")
    g = torch.Generator().manual_seed(1)
    params = fmt.fit(torch.randn(4, 256, generator=g) * 0.5)
    w = (torch.randn(4, 256, generator=g) * 1.5).requires_grad_()
    cotangent = torch.randn(4, 256, generator=g)
    (fake_quantize(w, fmt, params) * cotangent).sum().backward()
    low, high = fmt.limits(fmt.stored(params), w.shape)
    if isinstance(fmt, IntAffine) and "threshold" not in params:
        slack = fmt.unblocks(params["scale"].float().unsqueeze(-1).expand_as(fmt.blocks(w)), w.shape) / 2
        low, high = low - slack, high + slack
    expected = (w >= low) & (w <= high)
    assert 0 < expected.float().mean() < 1, "both cases must occur"
    assert torch.equal(w.grad, cotangent * expected)


@every_format
def test_without_clip_every_weight_gets_its_gradient(fmt):
    w, cotangent = torch.randn(4, 256).requires_grad_(), torch.randn(4, 256)
    (fake_quantize(w, fmt, fmt.fit(w.detach() / 3), clip=False) * cotangent).sum().backward()
    assert torch.equal(w.grad, cotangent)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if not isinstance(fmt, (FloatCast, MXFP4, NVFP4, Q4_K))
                                 and not getattr(fmt, "double_quant", False)], ids=repr)  # fmt: skip
def test_gradient_of_the_params_is_that_of_decode(fmt):
    w, cotangent = torch.randn(4, 256), torch.randn(4, 256)
    fitted = fmt.fit(w)
    learned = [name for name in fmt.stored(fitted) if fitted[name].is_floating_point()]

    def leaves():
        return {name: (p.float().clone().requires_grad_() if name in learned else p) for name, p in fitted.items()}

    ours, reference = leaves(), leaves()
    (fake_quantize(w, fmt, ours) * cotangent).sum().backward()
    (fmt.decode(fmt.encode(w, fitted), reference) * cotangent).sum().backward()
    for name in learned:
        assert ours[name].grad.abs().sum() > 0
        torch.testing.assert_close(ours[name].grad, reference[name].grad, rtol=2e-3, atol=1e-4)  # float16 zero points


def test_gradients_of_float16_constants_do_not_underflow():
    w = torch.randn(2, 32)
    params = {"scale": Q4_0().fit(w)["scale"].requires_grad_()}
    (fake_quantize(w, Q4_0(), params) * 1e-9).sum().backward()
    assert (params["scale"].grad != 0).all() and params["scale"].grad.dtype == torch.float32


def test_by_hand():
    w = torch.tensor([[-1.8, -0.74, 0.76, 1.74, 1.76]], requires_grad=True)
    fmt, scale = IntAffine(2, granularity="tensor"), torch.tensor(1.0, requires_grad=True)  # codes −1, 0, 1
    w_hat = fake_quantize(w, fmt, {"scale": scale})
    (w_hat * torch.tensor([1.0, 10, 100, 1000, 10000])).sum().backward()
    assert w_hat.tolist() == [[-1, -1, 1, 1, 1]]
    assert w.grad.tolist() == [[0, 10, 100, 0, 0]], "round(1.74) = 2 is no code"
    assert scale.grad.item() == -1 - 10 + 100 + 1000 + 10000


@pytest.mark.parametrize("fmt", [IntAffine(4), IntAffine(4, False), NF4(256), Binary()], ids=repr)
def test_what_formats_refuse_is_refused(fmt):
    params = fmt.fit(torch.randn(2, 256))
    w = torch.ones(2, 256)
    w[1, 7] = float("nan")
    with pytest.raises(ValueError, match="1 NaN"):
        fake_quantize(w, fmt, params)
    with pytest.raises(TypeError, match="int64"):
        fake_quantize(torch.ones(2, 256, dtype=torch.long), fmt, params)


def test_empty_weights():
    w = torch.zeros(0, 4, requires_grad=True)
    fake_quantize(w, IntAffine(4), IntAffine(4).fit(w)).sum().backward()
    assert w.grad.shape == (0, 4) and inside(w.detach(), IntAffine(4), IntAffine(4).fit(w)).shape == (0, 4)


def test_straight_through_keeps_bits_that_the_detach_trick_loses():
    x, x_hat = torch.tensor([1e8, 0.1], requires_grad=True), torch.tensor([0.3, 1e9])
    assert torch.equal(straight_through(x, x_hat), x_hat)
    assert not torch.equal(x + (x_hat - x).detach(), x_hat)


def test_second_derivatives_see_the_identity():
    w = torch.randn(3, 4, requires_grad=True)
    fmt = IntAffine(8)
    (grad,) = torch.autograd.grad(fake_quantize(w, fmt, fmt.fit(w.detach())).pow(3).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), w)
    torch.testing.assert_close(second, 6 * fmt.quantize(w).dequantize())
