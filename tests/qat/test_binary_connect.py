"""BinaryConnect and the XNOR-Net training layer: closed forms, the real weights behind the signs, stored layers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from qlab.formats import Binary, IntAffine
from qlab.nn import ActQuant
from qlab.ptq import quantize_model, xnor_linear
from qlab.qat import (
    BinaryConnect,
    XNORActivations,
    XNORWeights,
    binarize,
    centred,
    constrain_weights,
    convert,
    glorot_level,
    hard_sigmoid,
    prepare_qat,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- BinaryConnect


def test_level_of_the_original_code():
    assert glorot_level((30, 20)) == pytest.approx(math.sqrt(1.5 / 50), rel=1e-12)


@given(st.integers(0, 2**31), st.booleans())
def test_two_values_and_a_gradient_that_passes(seed, stochastic):
    w, cotangent = random(6, 10, seed=seed).requires_grad_(), random(6, 10, seed=seed + 1)
    level = torch.tensor(0.4)
    w_b = binarize(w, level, stochastic)
    assert set(w_b.unique().tolist()) <= {float(level), -float(level)}
    (w_b * cotangent).sum().backward()
    assert torch.equal(w.grad, cotangent), "Algorithm 1: the gradient of the binary weight, clipped or not"
    if not stochastic:
        assert torch.equal(w_b > 0, w >= 0)


def test_stochastic_rounding_is_unbiased_inside_and_certain_outside():
    torch.manual_seed(0)
    level, w = torch.tensor(0.5), torch.tensor([-2.0, -0.5, -0.2, 0.0, 0.3, 0.5, 2.0])
    mean = torch.stack([binarize(w, level, True) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, w.clamp(-0.5, 0.5), rtol=0, atol=0.03)
    assert mean[0] == -0.5 and mean[-1] == 0.5 and hard_sigmoid(torch.tensor(-0.5)).item() == 0.25


@pytest.mark.parametrize("method", ["binaryconnect", "binaryconnect-stochastic"])
def test_trained_clipped_and_stored(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    prepare_qat(model, Binary("tensor"), method)
    level = model[0].weight_quant.scale.item()
    assert level == pytest.approx(glorot_level((8, 12))) and list(model[0].weight_quant.state_dict()) == ["scale"]
    optimizer, x = torch.optim.SGD(model.parameters(), lr=5.0), random(30, 12)
    model(x).square().mean().backward()
    optimizer.step()
    assert model[0].weight.abs().max() > level
    before = model[0].weight.detach().clone()
    constrain_weights(model)
    assert torch.equal(model[0].weight, before.clamp(-level, level)), "the real copy is kept, and clipped"
    assert model[0].weight.unique().numel() > 2
    two = [model(x) for _ in range(2)]
    assert torch.equal(*two) == (method == "binaryconnect")
    expected = model.eval()(x)
    assert torch.equal(model(x), expected), "eval mode has the signs of the real weights"
    report = convert(model)
    assert torch.equal(model(x), expected) and report.layers["0"].nbytes == 12 * 8 // 8 + 4


def test_binary_connect_takes_one_format():
    for fmt in (Binary(), IntAffine(2)):
        with pytest.raises(ValueError, match="BinaryConnect has two values") as caught:
            BinaryConnect(fmt, random(3, 4))
        assert repr(fmt) in str(caught.value)


# --- XNOR-Net


def test_centred_by_hand():
    assert centred(torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.1, 0.0]])).tolist() == [
        [-1, -1, 1],
        pytest.approx([0.3, -0.1, -0.2]),
    ]


@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.7, 3.0]))
def test_weights_forward_and_the_papers_gradient(seed, spread):
    w = (random(5, 16, seed=seed) * spread + 0.3).requires_grad_()
    cotangent = random(5, 16, seed=seed + 1)
    quant = XNORWeights(Binary(), w)
    (quant(w) * cotangent).sum().backward()
    real = (w.detach().double() - w.detach().double().mean(1, keepdim=True)).clamp(-1, 1)
    alpha = real.abs().mean(1, keepdim=True)
    near = real.abs() < 1e-5
    torch.testing.assert_close(quant(w).double()[~near], (alpha * real.sign())[~near], rtol=1e-5, atol=1e-6)
    expected = cotangent * (1 / 16 + alpha * (real.abs() < 1))
    edge = (real.abs() - 1).abs() < 1e-6
    edge &= real.abs() != 1
    torch.testing.assert_close(w.grad.double()[~edge], expected[~edge], rtol=1e-5, atol=1e-6)
    assert quant.state_dict() == {}
    assert torch.equal(quant.quantize(w).dequantize(), quant(w))


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_inputs(seed, dtype):
    x = random(2, 3, 8, seed=seed).to(dtype).requires_grad_()
    cotangent = random(2, 3, 8, seed=seed + 1).to(dtype)
    act = XNORActivations()
    y = act(x)
    assert torch.equal(y, ActQuant(bits=1)(x)) and torch.equal(act.act_quant()(x), y) and act.state_dict() == {}
    (y * cotangent).sum().backward()
    beta = x.detach().float().abs().mean(-1, keepdim=True)
    expected = cotangent.float() * (beta * (x.detach().abs() <= 1)).to(dtype).float()
    torch.testing.assert_close(x.grad.float(), expected, rtol=1e-2, atol=1e-2)


def test_inference_is_the_ptq_layer_on_packed_bits():
    torch.manual_seed(0)
    model, floats = nn.Sequential(nn.Linear(70, 9)), nn.Sequential(nn.Linear(70, 9))
    prepare_qat(model, Binary(), "xnor")
    x = random(4, 70)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        constrain_weights(model)
        assert model[0].weight.abs().max() <= 1
    expected = model.eval()(x)
    with torch.no_grad():
        floats[0].weight.copy_(centred(model[0].weight))
        floats[0].bias.copy_(model[0].bias)
    quantize_model(floats, Binary(), "xnor", progress=False)
    convert(model)
    assert torch.equal(model[0].packed, floats[0].packed) and torch.equal(model[0].scale, floats[0].scale)
    assert torch.equal(model(x), expected) and torch.equal(floats(x), expected)
    torch.testing.assert_close(xnor_linear(model[0], x), expected, rtol=1e-5, atol=1e-5)
    signs = linear(ActQuant(bits=1)(x), model[0].dequantized_weight(), model[0].bias)
    assert torch.equal(signs, expected)


def test_xnor_takes_one_format_and_its_own_inputs_unless_told():
    with pytest.raises(ValueError, match="it takes Binary"):
        XNORWeights(Binary("tensor"), random(3, 4))
    model = nn.Sequential(nn.Linear(4, 4))
    prepare_qat(model, Binary(), "xnor", activations=ActQuant(8))
    assert isinstance(model[0].activations, ActQuant)
    with pytest.raises(ValueError, match="NaN"):
        XNORActivations()(torch.tensor([[float("nan")]]))
