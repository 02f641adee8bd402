"""LSQ and LSQ+: forward bits of the format, gradients of the papers' formulas in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.formats import NF4, Binary, IntAffine, Ternary
from qlab.qat import LSQ, LSQActivations, first_step, learned_step


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def paper(x, s, qmin, qmax, cotangent):
    """Eqs. (1) to (5) case by case, float64: x̂, ∂/∂x, ∂/∂s with g = 1/√(N·Q_P). x: (blocks, n), s: (blocks,)."""
    x, s, cotangent = x.double(), s.double().unsqueeze(1), cotangent.double()
    v, q_n, q_p = x / s, -qmin, qmax
    x_hat = s * v.clamp(-q_n, q_p).round()
    low, high = v <= -q_n, v >= q_p
    ds = torch.where(low, -float(q_n), torch.where(high, float(q_p), v.round() - v))
    g = 1 / math.sqrt(x.shape[1] * q_p)
    return x_hat, cotangent * ~(low | high), (cotangent * ds).sum(1) * g


GRIDS = [IntAffine(bits, True, "channel", narrow=narrow) for bits in (2, 3, 4, 8) for narrow in (True, False)]
GRIDS += [Ternary("bitnet", "channel"), IntAffine(2, False), IntAffine(8, False)]  # the last two: unsigned


@pytest.mark.parametrize("fmt", GRIDS, ids=repr)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.3, 1.0, 4.0]), magnitude=st.sampled_from([1e-6, 1.0, 1e4]))
def test_gradients_are_the_papers(fmt, seed, spread, magnitude):
    x = random(5, 24, seed=seed) * magnitude
    x[0, 0] *= 50
    s = (first_step(x, fmt) * spread).requires_grad_()
    x.requires_grad_()
    cotangent = random(5, 24, seed=seed + 1)
    y = learned_step(x, fmt, s, None, features=24)
    (y * cotangent).sum().backward()
    x_hat, dx, ds = paper(x.detach(), s.detach(), fmt.qmin, fmt.qmax, cotangent)
    torch.testing.assert_close(y.double(), x_hat, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(x.grad.double(), dx, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(s.grad.double(), ds, rtol=1e-4, atol=1e-4 / math.sqrt(fmt.qmax))
    params = {"scale": s.detach()}
    if not fmt.symmetric:
        params["zero_point"] = torch.zeros(5, dtype=torch.uint8)
    assert torch.equal(y, fmt.decode(fmt.encode(x, params), params))


def test_by_hand():
    """Codes −1, 0, 1 with s = 1; v on the ends counts as clipped."""
    fmt, s = IntAffine(2, granularity="tensor"), torch.tensor(1.0, requires_grad=True)
    x = torch.tensor([-3.0, -1.0, -0.75, 0.25, 0.75, 1.0, 1.25], requires_grad=True)
    gradients = []
    for one in range(7):
        s.grad = x.grad = None
        learned_step(x, fmt, s, None, features=4)[one].backward()
        gradients.append(s.grad.item() * 2)  # 1 / √(4 · 1) = 1 / 2
        assert x.grad[one] == (one in (2, 3, 4))
    assert gradients == [-1.0, -1.0, -0.25, -0.25, 0.25, 1.0, 1.0]


@pytest.mark.parametrize("float_zero_point", [True, False])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), bits=st.integers(2, 8))
def test_lsq_plus_gradients(float_zero_point, seed, bits):
    """Against autograd through s · (clamp(round(x / s + z)) − z) in float64, with rounding as the identity backward."""
    fmt = IntAffine(bits, False, "channel", float_zero_point=float_zero_point)
    x = random(4, 30, seed=seed) + 0.7
    params = fmt.fit(x * 0.7)
    s, z = params["scale"].clone().requires_grad_(), (params["zero_point"].float() + 0.2).requires_grad_()
    cotangent = random(4, 30, seed=seed + 1)
    a = x.clone().requires_grad_()
    y = learned_step(a, fmt, s, z, features=30)
    (y * cotangent).sum().backward()
    used = z.detach() if float_zero_point else z.detach().round().clamp(0, fmt.qmax)
    b, s64, z64 = (t.detach().double().requires_grad_() for t in (x, s, used))

    def straight(t):
        return t + (t.round() - t).detach()

    v = b / s64[:, None]
    code = straight(v + z64[:, None]) if float_zero_point else straight(v) + z64[:, None]
    inside = (v + z64[:, None] > 0) & (v + z64[:, None] < fmt.qmax)
    ends = (v + z64[:, None] >= fmt.qmax).double() * fmt.qmax
    expected = s64[:, None] * (torch.where(inside, code, ends) - z64[:, None])
    (expected * cotangent.double()).sum().backward()
    g = 1 / math.sqrt(30 * fmt.qmax)
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(s.grad.double(), s64.grad * g, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(z.grad.double(), z64.grad * g, rtol=1e-4, atol=1e-6)
    stored = {"scale": s.detach(), "zero_point": used if float_zero_point else used.to(torch.uint8)}
    assert torch.equal(y, fmt.decode(fmt.encode(x, stored), stored))


def test_the_offset_of_lsq_plus_is_minus_s_z():
    """∂x̂/∂β at fixed s is 1 where clipped, 0 elsewhere: ∂x̂/∂z = −s · ∂x̂/∂β."""
    fmt = IntAffine(2, False, "tensor", float_zero_point=True)
    s, z = torch.tensor(0.5), torch.tensor(1.25, requires_grad=True)
    x = torch.tensor([-2.0, 0.1, 2.0])
    (grad,) = torch.autograd.grad(learned_step(x, fmt, s, z, features=1).sum(), z)
    assert grad.item() * math.sqrt(3) == pytest.approx(2 * -0.5)


def test_groups_are_channels_of_the_regrouped_weight():
    w, cotangent = random(6, 12), random(6, 12, seed=1)
    gradients = []
    for fmt, shape in ((IntAffine(3, granularity="group", group_size=4), (6, 12)), (IntAffine(3), (18, 4))):
        x = w.view(shape).clone().requires_grad_()
        s = (first_step(x, fmt) * 0.8).requires_grad_()
        learned_step(x, fmt, s, None, features=4).backward(cotangent.view(shape))
        gradients.append((x.grad.flatten(), s.grad.flatten()))
    assert all(map(torch.equal, *gradients))


def test_first_step():
    x = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    assert first_step(x, IntAffine(8)).tolist() == pytest.approx([4 / math.sqrt(127), 1.0])
    assert first_step(x, IntAffine(8, False, "tensor")).item() == pytest.approx(2 / math.sqrt(255))


@pytest.mark.parametrize("fmt, shape", [
    (IntAffine(3, granularity="tensor"), ()), (IntAffine(3), (6,)), (IntAffine(3, granularity="group", group_size=4), (6, 3)),
    (IntAffine(3, granularity="head", heads=2), (2,)), (IntAffine(2, param_dtype=torch.float16), (6,)), (Ternary(), ()),
    (IntAffine(3, narrow=False), (6,)),
], ids=repr)  # fmt: skip
def test_weights(fmt, shape):
    w = random(6, 12).requires_grad_()
    lsq = LSQ(fmt, w)
    assert [name for name, _ in lsq.named_parameters()] == list(lsq.state_dict()) == ["scale"]
    assert lsq.scale.shape == shape and torch.equal(lsq.scale.detach(), first_step(w, fmt))
    lsq(w).square().sum().backward()
    assert (lsq.scale.grad != 0).all() and lsq.scale.grad.isfinite().all()
    q = lsq.quantize(w)
    assert torch.equal(q.dequantize(), lsq(w)) and q.nbytes == fmt.quantize(w).nbytes
    assert q.params["scale"].dtype == fmt.param_dtype


@pytest.mark.parametrize("float_zero_point", [True, False])
def test_weights_with_a_learned_zero_point(float_zero_point):
    fmt = IntAffine(3, False, "group", 4, float_zero_point=float_zero_point, param_dtype=torch.float32)
    w = random(6, 12) + 0.5
    lsq = LSQ(fmt, w, learn_zero_point=True)
    assert set(lsq.state_dict()) == {"scale", "zero_point"} and len(list(lsq.parameters())) == 2
    assert torch.equal(lsq(w), fmt.quantize(w).dequantize()), "it starts at the format's own fit"
    with torch.no_grad():
        lsq.zero_point.add_(0.3)
        lsq.scale.mul_(0.8)
    q = lsq.quantize(w)
    assert torch.equal(q.dequantize(), lsq(w)) and q.nbytes == fmt.quantize(w).nbytes
    assert q.params["zero_point"].dtype == fmt.fit(w)["zero_point"].dtype
    lsq(w).square().sum().backward()
    assert (lsq.zero_point.grad != 0).any()


def test_the_step_finds_its_place():
    """On the squared error alone, from both sides: where what rounding loses balances what clipping loses, eq. (3).

    Not quite the step of the least error, whose condition is another: mean of (code − v) · code = 0.
    """
    x, fmt = random(4096), IntAffine(3, granularity="tensor")
    grid = torch.linspace(0.2, 1.5, 400)
    errors = [(learned_step(x, fmt, s, None, 1) - x).square().mean() for s in grid]
    best, found = grid[torch.stack(errors).argmin()], []
    for start in (2.0, 0.5):
        s = (best * start).clone().requires_grad_()
        optimizer = torch.optim.SGD([s], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            (learned_step(x, fmt, s, None, features=1) - x).square().mean().mul(math.sqrt(3)).backward()
            optimizer.step()
        found.append(s.item())
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[0] == pytest.approx(best.item(), rel=0.1)
    v = x.double() / found[0]
    rounding = (v.round() - v).square()[v.abs() < 3].sum()
    clipping = 3 * (v.abs() - 3).clamp(min=0).sum()
    assert rounding.item() == pytest.approx(clipping.item(), rel=0.02)


@pytest.mark.parametrize("bits, signed, plus", [(8, True, False), (3, False, False), (4, False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(bits, signed, plus, dtype):
    act = LSQActivations(bits, signed, plus)
    assert set(act.state_dict()) == ({"scale", "zero_point"} if plus else {"scale"}) and act.scale.shape == ()
    with pytest.raises(RuntimeError, match="has not started"):
        act.eval()(random(2, 8))
    kept = act.scale
    x = random(5, 8).to(dtype) if signed or plus else random(5, 8).abs().to(dtype)
    y = act.train()(x.requires_grad_())
    assert act.scale is kept, "an optimizer that was made before the first batch has it"
    assert y.dtype == dtype and y.unique().numel() <= 2**bits
    expected = 2 * x.detach().float().abs().mean() / math.sqrt(act.format.qmax)
    if not plus:
        assert act.scale.item() == pytest.approx(expected.item(), rel=1e-6)
    y.float().square().sum().backward()
    assert act.scale.grad.isfinite() and act.scale.grad != 0 and x.grad.isfinite().all()
    stored = act.act_quant()
    for batch in (x.detach(), 100 * x.detach()):
        assert torch.equal(stored(batch), act.eval()(batch))
    again = LSQActivations(bits, signed, plus)
    again.load_state_dict(act.state_dict())
    assert torch.equal(again(x), act(x)), "a loaded step does not start anew"


def test_features_of_activations_are_the_columns():
    x = random(7, 16)
    act = LSQActivations(4)
    act(x).sum().backward()
    s = act.scale.detach()
    _, _, ds = paper(x.reshape(1, -1), s.reshape(1), -8, 7, torch.ones(1, 112))
    assert act.scale.grad.item() == pytest.approx(ds.item() * math.sqrt(112 / 16), rel=1e-4)


def test_hostile_inputs():
    for act in (LSQActivations(4, signed=False, learn_zero_point=True), LSQActivations(4)):
        assert act(torch.zeros(0, 4)).shape == (0, 4) and act.scale.isnan(), "an empty batch starts nothing"
    assert torch.equal(act(torch.zeros(3, 4)), torch.zeros(3, 4)) and act.scale == 1
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            act(torch.tensor([[bad]]))
    lsq = LSQ(IntAffine(4), torch.zeros(3, 4))
    assert torch.equal(lsq(torch.zeros(3, 4)), torch.zeros(3, 4))
    w = random(8, 6).t()
    assert torch.equal(LSQ(IntAffine(4), w)(w), LSQ(IntAffine(4), w.contiguous())(w.contiguous()))


def test_mistakes():
    for fmt in (NF4(4), Binary(), IntAffine(1, narrow=False)):
        with pytest.raises(ValueError, match="LSQ learns the step") as caught:
            LSQ(fmt, random(4, 4))
        assert repr(fmt) in str(caught.value)
    with pytest.raises(ValueError, match="needs symmetric=False"):
        LSQ(IntAffine(4), random(4, 4), learn_zero_point=True)
    with pytest.raises(ValueError, match="needs signed=False"):
        LSQActivations(4, signed=True, learn_zero_point=True)
    lsq = LSQ(IntAffine(4), random(4, 4))
    lsq.scale.data[2] = -0.5
    for call in (lsq, lsq.quantize):
        with pytest.raises(RuntimeError, match="has become -0.5"):
            call(random(4, 4))
