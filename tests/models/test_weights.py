import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlab.formats import NF4
from qlab.models import guard_bitsandbytes, replace, set_weight, shape_of, weight_of


def linear_4bit(weight, quant_type="nf4", double_quant=False, dtype=torch.float32):
    import bitsandbytes

    guard_bitsandbytes()
    out_features, in_features = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=True, compress_statistics=double_quant, quant_type=quant_type
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.to(dtype), requires_grad=False, compress_statistics=double_quant, quant_type=quant_type
    )
    return layer.to("cpu")


def linear_8bit(weight):
    import bitsandbytes

    out_features, in_features = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), has_fp16_weights=False, requires_grad=False)
    return layer.to("cpu")


def test_conv1d_is_read_and_written_as_out_in():
    torch.manual_seed(0)
    layer, x = Conv1D(5, 3), torch.randn(2, 3)
    assert shape_of(layer) == (5, 3) and weight_of(layer).shape == (5, 3)
    assert torch.allclose(layer(x), x @ weight_of(layer).T + layer.bias)
    weight = torch.randn(5, 3)
    set_weight(layer, weight)
    assert torch.allclose(layer(x), nn.functional.linear(x, weight, layer.bias))
    assert layer.weight.shape == (3, 5)


def test_the_conv1d_view_is_live_and_carries_gradients():
    layer = Conv1D(5, 3)
    with torch.no_grad():
        weight_of(layer)[4, 2] = 7.0
    assert layer.weight[2, 4] == 7.0
    weight_of(layer)[1].sum().backward()
    assert layer.weight.grad[:, 1].eq(1).all() and layer.weight.grad.sum() == 3


def test_linear_gives_its_own_parameter_and_is_written_in_place():
    layer = nn.Linear(3, 5, dtype=torch.bfloat16)
    parameter = layer.weight
    assert weight_of(layer) is parameter and shape_of(layer) == (5, 3)
    weight = torch.randn(5, 3)
    set_weight(layer, weight)
    assert layer.weight is parameter and torch.equal(layer.weight, weight.bfloat16())


def test_a_gpt2_layer_replaced_by_an_equal_linear(tiny, ids):
    model = tiny("gpt2")
    before = model(ids).logits

    def as_linear(name, module):
        out_features, in_features = shape_of(module)
        layer = nn.Linear(in_features, out_features)
        set_weight(layer, weight_of(module))
        layer.bias = module.bias
        return layer

    replace(model, lambda name, module: isinstance(module, Conv1D), as_linear)
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert torch.allclose(model(ids).logits, before, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(3, 5), Conv1D(5, 3)], ids=["Linear", "Conv1D"])
def test_shape_errors_quote_both_shapes(layer):
    with pytest.raises(ValueError, match=r"\(out, in\) = \(5, 3\), got \(3, 5\); it is the transpose"):
        set_weight(layer, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"\(5, 3\), got \(5, 4\)$"):
        set_weight(layer, torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"got \(\)"):
        set_weight(layer, torch.tensor(1.0))
    with pytest.raises(TypeError, match="dequantize codes"):
        set_weight(layer, torch.zeros(5, 3, dtype=torch.int8))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear4bit_is_read_dequantized(quant_type, double_quant, dtype):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = linear_4bit(weight, quant_type, double_quant, dtype)
    codes, state = quantize_4bit(weight, quant_type=quant_type, compress_statistics=double_quant, blocksize=64)
    assert shape_of(layer) == (64, 128)
    assert weight_of(layer).dtype == dtype
    assert torch.equal(weight_of(layer), dequantize_4bit(codes, state))


def test_linear4bit_is_read_right_where_the_block_does_not_divide_the_row():
    """bitsandbytes' own CPU kernel is not: 64 weights a block, 96 a row."""
    weight = torch.randn(8, 96) * torch.logspace(-2, 2, 8 * 96).view(8, 96)
    layer = linear_4bit(weight)
    assert torch.equal(weight_of(layer), NF4(64).quantize(weight).dequantize())


def test_linear4bit_before_quantization_is_its_float_weight():
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(8, 4)
    assert torch.equal(weight_of(layer), layer.weight) and weight_of(layer).shape == (4, 8)


def test_linear8bit_is_read_dequantized_before_and_after_its_first_forward():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    layer = linear_8bit(weight)
    row_absmax = weight.half().float().abs().amax(1, keepdim=True)
    expected = torch.round(weight.half().float() / row_absmax * 127) * row_absmax / 127
    assert torch.allclose(weight_of(layer), expected, atol=2e-6)
    layer.eval()(torch.randn(2, 32))
    assert torch.allclose(weight_of(layer), expected, atol=2e-6) and shape_of(layer) == (16, 32)


def test_quantized_layers_cannot_be_written():
    for layer in (linear_4bit(torch.randn(32, 64)), linear_8bit(torch.randn(32, 64))):
        with pytest.raises(TypeError, match="holds codes"):
            set_weight(layer, torch.zeros(32, 64))


def test_a_replacement_reads_through_its_own_protocol():
    class Codes(nn.Module):
        def dequantized_weight(self):
            return torch.full((2, 3), 0.5)

    assert torch.equal(weight_of(Codes()), torch.full((2, 3), 0.5))


def test_other_modules_are_refused():
    for function in (weight_of, shape_of):
        with pytest.raises(TypeError, match="Embedding .*nn.Linear"):
            function(nn.Embedding(3, 4))
    with pytest.raises(TypeError, match="Embedding"):
        set_weight(nn.Embedding(3, 4), torch.zeros(3, 4))


def test_a_repacked_layer_is_not_read(monkeypatch):
    layer = linear_4bit(torch.randn(32, 64))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="repacked"):
        weight_of(layer)
