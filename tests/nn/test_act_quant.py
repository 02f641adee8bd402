"""ActQuant: by hand, against torch's fake-quantize forward and backward, and on hostile activations."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlab.formats import IntAffine
from qlab.nn import ActQuant, QuantLinear

SETTINGS = [(True, True), (True, False), (False, True)]  # symmetric, narrow


@st.composite
def activations(draw):
    """(…, in) of any dtype, layout and size of numbers, with zeros, outliers, ties, constants and no tokens at all."""
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=2))) + (draw(st.integers(1, 20)),)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=g)
    kind = draw(st.sampled_from(["normal", "zero", "positive", "outlier", "ties", "constant"]))
    if kind == "zero":
        x = torch.zeros(shape)
    elif kind == "positive":
        x = x.abs()
    elif kind == "outlier" and x.numel():
        x.view(-1)[0] = 300
    elif kind == "ties":
        x = torch.randint(-9, 10, shape, generator=g) / 2
    elif kind == "constant":
        x = torch.full(shape, 1.7)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = (x * 10.0 ** draw(st.integers(-4, 2))).to(dtype)
    return x.flip(-1).flip(-1) if draw(st.booleans()) else x.movedim(0, -1).contiguous().movedim(-1, 0)


# --- by hand


def test_per_token_by_hand():
    act = ActQuant(bits=3, symmetric=True, granularity="token")  # codes −3 … 3
    x = torch.tensor([[3.0, -1.4, 0.5], [0.3, 0.14, 0.0]])
    assert act(x)[0].tolist() == [3, -1, 0]
    torch.testing.assert_close(act(x)[1], torch.tensor([0.3, 0.1, 0.0]))


def test_per_tensor_by_hand():
    act = ActQuant(bits=2, symmetric=False, granularity="tensor")  # codes 0 … 3
    assert act(torch.tensor([[-1.0, 0.4], [1.6, 2.0]])).tolist() == [[-1, 0], [2, 2]]


def test_static_by_hand():
    act = ActQuant(bits=2, symmetric=False, granularity="tensor", static=True).freeze(-1.0, 2.0)
    assert act.scale == 1 and act.zero_point == 1
    assert act(torch.tensor([-50.0, -0.6, 0.2, 1.6, 50.0])).tolist() == [-1, -1, 0, 2, 2]


def test_tokens_have_ranges_of_their_own_and_a_tensor_has_one():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    louder = x.clone()
    louder[1, 2] *= 1000
    token, tensor = ActQuant(granularity="token"), ActQuant(granularity="tensor")
    assert torch.equal(token(louder)[0], token(x)[0]) and not torch.equal(tensor(louder)[0], tensor(x)[0])
    assert torch.equal(token(x)[1, 2], token(x[1, 2])), "a single token, (in,)"
    assert token.params(x)["scale"].shape == (6,) and tensor.params(x)["scale"].shape == ()


# --- torch's fake-quantize


@given(activations(), st.integers(2, 8), st.sampled_from(SETTINGS))
def test_dynamic_equals_torch(x, bits, settings):
    symmetric, narrow = settings
    for granularity in ("tensor", "token"):
        act = ActQuant(bits, symmetric, granularity, narrow=narrow)
        x_hat, params, fmt = act(x), act.params(x), act.format
        assert x_hat.shape == x.shape and x_hat.dtype == x.dtype
        rows = x.float().reshape(-1, x.shape[-1])
        if not rows.numel():
            continue
        zero_point = params.get("zero_point", torch.zeros_like(params["scale"])).int()
        if granularity == "tensor":
            expected = torch.fake_quantize_per_tensor_affine(
                rows, float(params["scale"]), int(zero_point), fmt.qmin, fmt.qmax
            )
        else:
            expected = torch.fake_quantize_per_channel_affine(rows, params["scale"], zero_point, 0, fmt.qmin, fmt.qmax)
        assert torch.equal(x_hat, expected.view(x.shape).to(x.dtype)), "in float32, and rounded once"
        assert (x_hat[x == 0] == 0).all()


@given(activations(), st.integers(2, 8), st.sampled_from(SETTINGS), st.floats(-3, 0), st.floats(0.1, 3))
def test_static_equals_torch_forward_and_backward(x, bits, settings, low, high):
    act = ActQuant(bits, settings[0], "tensor", static=True, narrow=settings[1]).freeze(low, high)
    fmt, x = act.format, x.float()
    zero_point = 0 if fmt.symmetric else int(act.zero_point)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = torch.fake_quantize_per_tensor_affine(theirs, float(act.scale), zero_point, fmt.qmin, fmt.qmax)
    assert torch.equal(act(ours), expected)
    upstream = torch.arange(1.0, x.numel() + 1).view(x.shape)
    act(ours).backward(upstream)
    expected.backward(upstream)
    edges = torch.stack(
        [(fmt.qmin - zero_point - 0.5) * act.scale, (fmt.qmax - zero_point + 0.5) * act.scale]
    )  # where torch rounds half to even, in or out
    apart = ((x.unsqueeze(-1) - edges).abs() > 1e-4 * act.scale).all(-1)
    assert torch.equal(ours.grad[apart], theirs.grad[apart])


def test_the_gradient_of_a_dynamic_range_is_one():
    x = torch.tensor([[-7.5, 7.5, 0.3], [1.0, 0.0, 0.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    for settings in SETTINGS:
        for granularity in ("token", "tensor"):
            act = ActQuant(4, settings[0], granularity, narrow=settings[1])
            (grad,) = torch.autograd.grad(act(x), x, upstream)
            assert torch.equal(grad, upstream)


# --- frozen ranges


def test_a_static_range_that_was_never_frozen():
    act = ActQuant(granularity="tensor", static=True)
    assert not act.calibrated and "no range yet" in repr(act)
    with pytest.raises(RuntimeError, match="no range yet: observe calibration data and call freeze"):
        act(torch.ones(2, 3))
    act.freeze(torch.tensor([-1.0]), 2)
    assert act.calibrated and "no range yet" not in repr(act) and act(torch.ones(2, 3)).shape == (2, 3)
    assert ActQuant().calibrated


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_frozen_range_is_that_of_from_range(symmetric):
    act = ActQuant(5, symmetric, "tensor", static=True).freeze(-0.3, 1.7)
    expected = IntAffine(5, symmetric, "tensor").from_range(torch.tensor(-0.3), torch.tensor(1.7))
    assert {name: float(p) for name, p in act.named_buffers()} == {name: float(p) for name, p in expected.items()}


@pytest.mark.parametrize("symmetric, narrow", SETTINGS)
@pytest.mark.parametrize("frozen", [True, False])
def test_saved_and_reloaded(tmp_path, symmetric, narrow, frozen):
    act = ActQuant(3, symmetric, "tensor", static=True, narrow=narrow)
    if frozen:
        act.freeze(-0.7, 1.1)
    assert list(act.state_dict()) == ["scale"] + ["zero_point"] * (not symmetric)
    save_file(act.state_dict(), tmp_path / "act.safetensors")
    again = ActQuant(**act.config())
    again.load_state_dict(load_file(tmp_path / "act.safetensors"))
    assert again.calibrated == frozen and repr(again) == repr(act)
    if frozen:
        x = torch.linspace(-2, 2, 20)
        assert torch.equal(again(x), act(x))
    assert ActQuant(3, symmetric).state_dict() == {}


def test_casting_the_module_leaves_the_scale_alone():
    act = ActQuant(granularity="tensor", static=True).freeze(-1, 1)
    before = act.scale.clone()
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        cast(act)
        assert act.scale.dtype == torch.float32 and torch.equal(act.scale, before)
    act.to("meta", torch.bfloat16)
    assert act.scale.device.type == "meta" and act.scale.dtype == torch.float32


# --- outliers


def test_columns_with_outliers_by_hand():
    act = ActQuant(bits=2, threshold=6.0)  # codes −1, 0, 1
    x = torch.tensor([[7.0, 1.0, -3.0, 0.4], [5.0, 0.25, 0.2, -6.0], [0.0, 0.2, 2.0, 1.1]])
    assert act(x).tolist() == [[7, 0, -3, 0.4000000059604645], [5, 0, 0, -6], [0, 0, 2, 1.100000023841858]]
    assert act.params(x)["scale"].tolist() == [3, 5, 2], (
        "5 is below the threshold and counts, though its column is kept"
    )
    assert act.params(x[1])["scale"].tolist() == [5]


def test_which_columns_is_found_in_each_call():
    act, plain = ActQuant(bits=4, threshold=2.0), ActQuant(bits=4)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 1.9)
    assert torch.equal(act(x), plain(x)) and not torch.equal(act(x), x)
    louder = x.clone()
    louder[1, 2, 5] = -2.0
    kept, others = act(louder), [0, 1, 2, 3, 4, 6, 7]
    assert torch.equal(kept[..., 5], louder[..., 5]), "in every token"
    assert torch.equal(kept[:, :2, others], plain(x)[:, :2, others])
    assert torch.equal(act(x), plain(x)), "nothing is remembered"


def test_all_columns_hold_outliers_or_all_but_a_token():
    act = ActQuant(threshold=0.5)
    x = torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.2, 0.3]])
    assert torch.equal(act(x), x)
    assert torch.equal(act(x[0]), x[0]) and act.params(x[0])["scale"].tolist() == [1]
    assert act(torch.zeros(0, 3)).shape == (0, 3)


@given(activations(), st.integers(2, 8), st.sampled_from(SETTINGS), st.floats(1e-3, 100))
def test_a_threshold_on_any_activations(x, bits, settings, threshold):
    act = ActQuant(bits, settings[0], narrow=settings[1], threshold=threshold)
    x_hat = act(x)
    assert x_hat.shape == x.shape and x_hat.dtype == x.dtype
    tokens, result = x.reshape(-1, x.shape[-1]), x_hat.reshape(-1, x.shape[-1])
    kept = (tokens.abs() >= threshold).any(0)
    inliers = torch.where(tokens.abs() >= threshold, 0, tokens)
    expected = ActQuant(bits, settings[0], narrow=settings[1])(inliers)
    assert torch.equal(result[:, kept], tokens[:, kept]) and torch.equal(result[:, ~kept], expected[:, ~kept])


def test_the_gradient_with_a_threshold_is_one_too():
    x = torch.tensor([[-7.5, 7.5, 0.3], [1.0, 0.0, 0.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    for settings in SETTINGS:
        act = ActQuant(4, settings[0], narrow=settings[1], threshold=6.0)
        (grad,) = torch.autograd.grad(act(x), x, upstream)
        assert torch.equal(grad, upstream)


def test_a_threshold_written_down_and_read_back():
    act = ActQuant(bits=4, threshold=6.0)
    config = json.loads(json.dumps(act.config()))
    assert config["threshold"] == 6.0 and "threshold=6.0" in repr(act)
    again = ActQuant(**config)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(again(x), act(x)) and repr(again) == repr(act)
    assert ActQuant().config()["threshold"] is None and "threshold" not in repr(ActQuant())
    layer = QuantLinear(IntAffine(8).quantize(torch.eye(8)), act_quant=act)
    reread = QuantLinear.from_config(json.loads(json.dumps(layer.config())), layer.state_dict())
    assert reread.act_quant.threshold == 6.0 and torch.equal(reread(x), layer(x))


# --- hostile


def test_fp16_at_its_end_stays_finite():
    """The outermost level lies half a step beyond the largest fp16 number."""
    x = torch.tensor([[-65504.0, 65504.0]], dtype=torch.float16)
    for settings in SETTINGS:
        assert ActQuant(4, settings[0], narrow=settings[1])(x).isfinite().all()


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="'token' or 'tensor', got 'channel'"):
        ActQuant(granularity="channel")
    with pytest.raises(ValueError, match="cannot be per token"):
        ActQuant(static=True)
    with pytest.raises(ValueError, match="bits=9"):
        ActQuant(bits=9)
    with pytest.raises(ValueError, match="freeze belongs to static=True"):
        ActQuant().freeze(-1, 1)
    for static in (True, False):
        with pytest.raises(ValueError, match="granularity='token' and static=False, got threshold=6.0, .*'tensor'"):
            ActQuant(granularity="tensor", static=static, threshold=6.0)
    for threshold in (0.0, -6, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"threshold must be finite and above 0.*got {threshold}"):
            ActQuant(threshold=threshold)
    for low, high in ((1, -1), (-math.inf, 1), (0, math.nan), (torch.zeros(2), 1)):
        with pytest.raises(ValueError, match="two finite numbers"):
            ActQuant(granularity="tensor", static=True).freeze(low, high)


def test_activations_that_cannot_be_quantized():
    with pytest.raises(ValueError, match=r"1 NaN and 1 Inf in activations of shape \(1, 3\)"):
        ActQuant()(torch.tensor([[math.nan, 1.0, math.inf]]))
    for threshold in (None, 6.0):
        with pytest.raises(ValueError, match="0 NaN and 1 Inf in activations"):
            ActQuant(threshold=threshold)(torch.tensor([-math.inf]))
    with pytest.raises(TypeError, match="int64"):
        ActQuant()(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="scalar"):
        ActQuant()(torch.tensor(1.0))
