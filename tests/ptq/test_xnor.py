"""XNOR-Net: counted bits give what floating-point signs give, for any width and any number of inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qlab.formats import Binary, IntAffine
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq import XNOR, quantize_model, xnor_linear


@given(st.integers(1, 200), st.integers(1, 9), st.booleans(), st.integers(0, 1000))
def test_counted_bits_equal_the_float_product(width, out, bias, seed):
    torch.manual_seed(seed)
    linear, x = nn.Linear(width, out, bias=bias), torch.randn(2, 3, width)
    layer = quantize_model(linear, Binary(), "xnor", progress=False).model
    signs = torch.where(x >= 0, 1.0, -1.0) @ torch.where(linear.weight >= 0, 1.0, -1.0).T
    expected = signs * x.abs().mean(-1, keepdim=True) * linear.weight.abs().mean(1)
    expected = expected if linear.bias is None else expected + linear.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(xnor_linear(layer, x), expected)


def test_by_hand():
    """α = 2, β = 1.5; signs agree in two of three places: 2 · 1.5 · (2 − 1)."""
    layer = QuantLinear(Binary().quantize(torch.tensor([[1.0, -2.0, 3.0]])), act_quant=ActQuant(bits=1))
    x = torch.tensor([0.5, -1.0, -3.0])
    assert layer(x).tolist() == xnor_linear(layer, x).tolist() == [3.0]


def test_bfloat16_inputs():
    layer, x = (
        QuantLinear(Binary().quantize(torch.randn(4, 70)), act_quant=ActQuant(bits=1)),
        torch.randn(5, 70).bfloat16(),
    )
    assert xnor_linear(layer, x).dtype == torch.bfloat16
    torch.testing.assert_close(xnor_linear(layer, x), layer(x), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("fmt", [Binary("group", 3), Binary("tensor"), IntAffine(1, symmetric=False)], ids=repr)
def test_other_formats_are_refused(fmt):
    with pytest.raises(ValueError, match=r"it takes Binary\(\), not "):
        quantize_model(nn.Linear(6, 2), fmt, "xnor", progress=False)


@pytest.mark.parametrize("layer", [
    QuantLinear(IntAffine(1, symmetric=False).quantize(torch.randn(2, 6)), act_quant=ActQuant(bits=1)),
    QuantLinear(Binary().quantize(torch.randn(2, 6))),
    QuantLinear(Binary().quantize(torch.randn(2, 6)), act_quant=ActQuant(bits=8)),
    QuantLinear(Binary().quantize(torch.randn(2, 6)), act_quant=ActQuant(bits=1), input_scale=torch.ones(6)),
], ids=["not binary", "float inputs", "8-bit inputs", "input_scale"])  # fmt: skip
def test_only_layers_of_signs_are_counted(layer):
    with pytest.raises(ValueError, match="Binary weights per channel and one-bit inputs"):
        xnor_linear(layer, torch.randn(3, 6))


def test_one_bit_activations_say_what_they_are():
    act = ActQuant(bits=1)
    assert act(torch.tensor([[1.0, -3.0]])).tolist() == [[2.0, -2.0]]
    assert ActQuant(**act.config()).config() == act.config() and "bits=1" in repr(act)
    assert XNOR().activations.format.bits == 1
    for settings in ({"threshold": 6.0}, {"static": True, "granularity": "tensor"}):
        with pytest.raises(ValueError, match="signs have the mean"):
            ActQuant(bits=1, **settings)
    x = torch.randn(2, 5, requires_grad=True)
    act(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 5))
