"""Gradients and forward passes against torch's own fake-quantize, fixed and learnable; where torch and the papers part."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats import IntAffine
from qlab.qat import fake_quantize, learned_step


def hostile(seed, shape=(8, 48)):
    """Weights of a random size with a row of exact ties, an outlier and a zero row."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * 10.0 ** float(torch.randint(-6, 4, (), generator=g))
    w[0] = torch.randint(-31, 32, shape[1:], generator=g) / 2 * w.abs().max()
    w[1, 3] *= 1000
    w[2] = 0
    return w, torch.randn(shape, generator=g)


def backward(y, cotangent, *leaves):
    return torch.autograd.grad((y * cotangent).sum(), leaves)


@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans(), st.sampled_from([0.2, 0.7, 1.0]))
def test_per_tensor(seed, bits, symmetric, share):
    """Output and gradient, bit for bit, where a range clips and where it does not."""
    w, cotangent = hostile(seed)
    fmt = IntAffine(bits, symmetric, "tensor")
    params = fmt.from_range(w.min() * share, w.max() * share)
    zero_point = 0 if symmetric else int(params["zero_point"])
    a, b = w.clone().requires_grad_(), w.clone().requires_grad_()
    ours = fake_quantize(a, fmt, params)
    torchs = torch.fake_quantize_per_tensor_affine(b, float(params["scale"]), zero_point, fmt.qmin, fmt.qmax)
    assert torch.equal(ours, torchs)
    assert torch.equal(*(grad for y, x in ((ours, a), (torchs, b)) for grad in backward(y, cotangent, x)))


@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans(), st.sampled_from([0.2, 0.7, 1.0]))
def test_per_channel(seed, bits, symmetric, share):
    w, cotangent = hostile(seed)
    fmt = IntAffine(bits, symmetric, "channel")
    params = fmt.from_range(w.amin(1) * share, w.amax(1) * share)
    zero_point = torch.zeros(len(w), dtype=torch.int32) if symmetric else params["zero_point"].int()
    a, b = w.clone().requires_grad_(), w.clone().requires_grad_()
    ours = fake_quantize(a, fmt, params)
    torchs = torch.fake_quantize_per_channel_affine(b, params["scale"], zero_point, 0, fmt.qmin, fmt.qmax)
    assert torch.equal(ours, torchs)
    assert torch.equal(*(grad for y, x in ((ours, a), (torchs, b)) for grad in backward(y, cotangent, x)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_gradients_at_every_tie(bits, symmetric):
    """x = (k + 1/2) · scale: at the ends of the grid, half to even decides whether a tie is inside."""
    fmt = IntAffine(bits, symmetric, "tensor")
    zero_point = 0 if symmetric else 2 ** (bits - 1) - 1
    for scale in (0.1, 0.3, 1 / 7, 3.0, 0.5):
        params = {"scale": torch.tensor(scale), "zero_point": torch.tensor(zero_point, dtype=torch.uint8)}
        x = torch.arange(2 * fmt.qmin - 5 - 2 * zero_point, 2 * fmt.qmax + 6) / 2 * params["scale"]
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours = fake_quantize(a, fmt, params if not symmetric else {"scale": params["scale"]})
        torchs = torch.fake_quantize_per_tensor_affine(b, float(params["scale"]), zero_point, fmt.qmin, fmt.qmax)
        one = torch.ones_like(x)
        assert torch.equal(ours, torchs) and torch.equal(*backward(ours, one, a), *backward(torchs, one, b))


def learnable(x, scale, zero_point, fmt, per_channel):
    arguments = (fmt.qmin, fmt.qmax, 1.0)
    if per_channel:
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, 0, *arguments)
    return torch._fake_quantize_learnable_per_tensor_affine(x, scale.view(1), zero_point.view(1), *arguments)


@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans(), st.booleans(), st.sampled_from([0.3, 1.0, 3.0]))
def test_learned_step_forward_equals_torchs(seed, bits, symmetric, per_channel, spread):
    w, _ = hostile(seed)
    fmt = IntAffine(bits, symmetric, "channel" if per_channel else "tensor")
    params = fmt.fit(w)
    scale, zero_point = params["scale"] * spread, params.get("zero_point", torch.zeros_like(params["scale"])).float()
    ours = learned_step(w, fmt, scale, None if symmetric else zero_point, features=1)
    assert torch.equal(ours, learnable(w, scale, zero_point, fmt, per_channel))


@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans())
def test_learned_step_gradients_equal_torchs_but_for_the_last_half_step(seed, bits, per_channel):
    """Inside, and beyond half a step, torch's gradients are the paper's. Between them they are not: see the next test."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 40, generator=g)
    fmt = IntAffine(bits, True, "channel" if per_channel else "tensor")
    scale = fmt.fit(x)["scale"] * 0.5
    v = x / (scale.unsqueeze(1) if per_channel else scale)
    band = (v.abs() > fmt.qmax - 1e-3) & (v.abs() < fmt.qmax + 0.5 + 1e-3)
    x = torch.where(band, 0.1 * x, x)
    cotangent = torch.randn(6, 40, generator=g)
    a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
    b, t = x.clone().requires_grad_(), scale.clone().requires_grad_()
    dx, ds = backward(learned_step(a, fmt, s, None, features=1), cotangent, a, s)
    torch_dx, torch_ds = backward(learnable(b, t, torch.zeros_like(t), fmt, per_channel), cotangent, b, t)
    assert torch.equal(dx, torch_dx)
    torch.testing.assert_close(ds * math.sqrt(fmt.qmax), torch_ds, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("v, paper_dx, paper_ds, torch_dx, torch_ds", [
    (3.3, 0.0, 3.0, 1.0, -0.3),  # beyond Q_P = 3, but round(v) = 3 is a code: torch calls it rounded
    (-3.4, 0.0, -3.0, 1.0, 0.4),
    (3.6, 0.0, 3.0, 0.0, 3.0),
    (2.7, 1.0, 0.3, 1.0, 0.3),
])  # fmt: skip
def test_torchs_learnable_gradient_is_not_the_papers(v, paper_dx, paper_ds, torch_dx, torch_ds):
    """arXiv:1902.08153 compares v itself with −Q_N and Q_P, eqs. (3) and (5); torch compares the rounded code."""
    fmt = IntAffine(3, True, "tensor")
    leaves = [(torch.tensor([v * 0.5], requires_grad=True), torch.tensor(0.5, requires_grad=True)) for _ in range(2)]
    ours = learned_step(leaves[0][0], fmt, leaves[0][1], None, features=1)
    torchs = learnable(*leaves[1], torch.zeros(1), fmt, per_channel=False)
    assert torch.equal(ours, torchs), "the forward passes agree"
    dx, ds = backward(ours, torch.ones(1), *leaves[0])
    assert dx.item() == paper_dx and ds.item() * math.sqrt(3) == pytest.approx(paper_ds, abs=1e-5)
    dx, ds = backward(torchs, torch.ones(1), *leaves[1])
    assert dx.item() == torch_dx and ds.item() == pytest.approx(torch_ds, abs=1e-5)


def test_bitnets_estimator():
    """transformers' WeightQuant for BitNet b1.58: the gradient passes whole, as for a grid that is refitted."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    from qlab.formats import Ternary
    from qlab.qat import FakeQuant

    w, cotangent = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    a, b = w.clone().requires_grad_(), w.clone().requires_grad_()
    ours, theirs = FakeQuant(Ternary("bitnet"), w)(a), bitnet.WeightQuant.apply(b)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert torch.equal(*backward(ours, cotangent, a), *backward(theirs, cotangent, b))
