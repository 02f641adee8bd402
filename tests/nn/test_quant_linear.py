"""QuantLinear: outputs, gradients and memory, saved and reloaded, for every format."""

import copy
import inspect
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear
from torch.profiler import profile
from transformers.pytorch_utils import Conv1D

import qlab.formats
from qlab.adapters import add_adapters
from qlab.formats import FP4, NF4, FloatCast, Format, IntAffine
from qlab.models import replace
from qlab.nn import ActQuant, Base, QuantLinear, shape_of, weight_of

FORMATS = [
    IntAffine(8),
    IntAffine(4, symmetric=False, granularity="group", group_size=8, param_dtype=torch.float16),
    IntAffine(3, symmetric=False, granularity="tensor", float_zero_point=True),
    IntAffine(4, granularity="head", heads=4, head_axis=1),
    NF4(block_size=32),
    NF4(block_size=16, double_quant=True),
    FP4(),
    FloatCast("fp16"),
    FloatCast("bf16"),
]
OUT, IN = 10, 24
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=repr)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(fmt, **parts):
    return QuantLinear(fmt.quantize(random(OUT, IN)), random(OUT, seed=1), **parts)


def shuffled_groups(group_size=8):
    return torch.arange(IN)[torch.randperm(IN, generator=torch.Generator().manual_seed(3))] // group_size


def full(fmt):
    """A layer with every part that a layer can have."""
    act_quant = ActQuant(symmetric=False, granularity="tensor", static=True).freeze(-3, 3)
    return layer_of(fmt, act_quant=act_quant, input_scale=random(IN, seed=2).exp(), g_idx=shuffled_groups())


# --- forward and backward


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_product_with_the_dequantized_weight(fmt, dtype):
    layer, x = layer_of(fmt), random(2, 3, IN, seed=4).to(dtype)
    weight = fmt.quantize(random(OUT, IN)).dequantize(dtype)
    assert torch.equal(layer(x), linear(x, weight, random(OUT, seed=1).to(dtype)))
    assert torch.equal(layer.dequantized_weight(dtype), weight) and layer.shape == (OUT, IN)
    without = QuantLinear(layer.qtensor)
    assert torch.equal(without(x), linear(x, weight)) and without.bias is None


@every_format
def test_gradients_of_x_and_bias_are_those_of_a_linear_layer(fmt):
    layer, reference = layer_of(fmt), nn.Linear(IN, OUT)
    reference.weight = nn.Parameter(layer.dequantized_weight())
    reference.bias = nn.Parameter(layer.bias.detach().clone())
    layer.bias.requires_grad_(True)
    for shape in ((IN,), (5, IN), (2, 3, IN)):
        x = random(*shape, seed=5)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer.bias.grad = reference.bias.grad = None
        layer(ours).sin().sum().backward()
        reference(theirs).sin().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(layer.bias.grad, reference.bias.grad)
    assert all(not buffer.requires_grad for buffer in layer.buffers())


def test_second_derivatives():
    layer, x = layer_of(IntAffine(4)), random(3, IN, seed=6).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(lambda x: layer(x).sin(), x)


def test_the_dequantized_weight_is_not_kept_for_backward():
    layer, kept = layer_of(NF4()), []
    x = random(2, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, layer.dequantized_weight())
        assert max(t.numel() for t in kept) == OUT * IN, "what this test would see"
        kept.clear()
        y = layer(x)
    assert sum(t.numel() for t in kept) < OUT * IN
    y.sum().backward()
    assert x.grad is not None
    assert not any(isinstance(value, torch.Tensor) and value.numel() == OUT * IN for value in vars(layer).values())


def memory_kept(call):
    """(result, bytes): what `call` allocates and does not free, in Python objects or in the autograd graph."""
    with profile(profile_memory=True) as profiled:
        result = call()
    return result, sum(event.self_cpu_memory_usage for event in profiled.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dequantized_weight_survives_any_part_of_a_training_step(dtype):
    size, x = 256, random(2, 256).to(dtype).requires_grad_()
    layers = [QuantLinear(NF4().quantize(random(size, size, seed=seed).to(dtype))) for seed in range(3)]
    model = nn.Sequential(*layers)
    adapters = add_adapters(model, r=1, target_modules=["0", "1", "2"]).added.values()
    optimizer = torch.optim.AdamW([p for layer in adapters for p in (layer.lora_A, layer.lora_B)])
    one_weight = size * size * dtype.itemsize
    for _ in range(2):
        y, forward = memory_kept(lambda: model(x))
        _, backward = memory_kept(lambda y=y: y.sum().backward())
        _, update = memory_kept(optimizer.step)
        assert 0 < forward < one_weight / 8 and max(backward, update) < one_weight / 8
    _, kept = memory_kept(lambda: linear(x, layers[0].dequantized_weight()))
    assert kept > one_weight, "what this test would see"


def test_under_autocast():
    layer, x = layer_of(NF4()), random(4, IN).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    expected = linear(x.bfloat16(), layer.dequantized_weight(torch.bfloat16), layer.bias.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized_weight().sum(0).expand(4, -1), rtol=0.02, atol=0.05)


# --- activation quantization, input scale, g_idx


def test_the_input_is_quantized():
    act = ActQuant(bits=4)
    layer, x = layer_of(IntAffine(8), act_quant=act), random(3, IN, seed=7)
    assert torch.equal(layer(x), linear(act(x), layer.dequantized_weight(), layer.bias))
    assert not torch.equal(layer(x), layer_of(IntAffine(8))(x))


def test_an_input_scale_divides_the_input_and_the_weight_says_so():
    """W · s is stored and x / s multiplied: an outlier channel moves from the input into the weight."""
    s, w, x = random(IN, seed=8).exp(), random(OUT, IN), random(3, IN, seed=9)
    linear_layer = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear_layer.weight.copy_(w)
    layer = QuantLinear.from_linear(linear_layer, IntAffine(8), input_scale=s)
    assert torch.equal(layer.qtensor.packed, IntAffine(8).quantize(w * s).packed)
    torch.testing.assert_close(layer.dequantized_weight(), layer.qtensor.dequantize() / s)
    torch.testing.assert_close(layer(x), linear(x, layer.dequantized_weight(), layer.bias))
    assert ((layer.dequantized_weight() - w).abs() <= layer.scale.unsqueeze(1) / 2 / s + 1e-6).all()
    half = layer(x.bfloat16())
    assert torch.equal(half, linear((x.bfloat16() / s).bfloat16(), layer.qtensor.dequantize(torch.bfloat16), layer.bias.bfloat16()))  # fmt: skip


def test_a_bf16_weight_is_scaled_before_it_is_rounded():
    source = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    s = random(IN, seed=8).exp()
    layer = QuantLinear.from_linear(source, IntAffine(8), input_scale=s)
    assert layer.dtype == torch.bfloat16 == layer.dequantized_weight().dtype
    assert torch.equal(layer.qtensor.packed, IntAffine(8).quantize(source.weight.float() * s).packed)


def test_g_idx_by_hand():
    """Groups {1, 2} and {0, 3}: the stored columns are 1, 2, 0, 3."""
    fmt = IntAffine(4, granularity="group", group_size=2)
    w = torch.tensor([[70.0, 0.7, 0.3, -50.0]])
    layer = QuantLinear(fmt.quantize(w[:, [1, 2, 0, 3]]), g_idx=torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(layer.dequantized_weight(), w)
    torch.testing.assert_close(layer(torch.tensor([1.0, 10.0, 0.0, 0.0])), torch.tensor([77.0]))
    assert layer.g_idx.dtype == torch.int32


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 6, 12]))
def test_g_idx_puts_any_order_back(seed, group_size):
    g = torch.Generator().manual_seed(seed)
    g_idx = torch.randperm(12, generator=g) // group_size
    w = torch.randn(3, 12, generator=g)
    fmt = IntAffine(8, granularity="group", group_size=group_size)
    layer = QuantLinear(fmt.quantize(w[:, g_idx.argsort(stable=True)]), g_idx=g_idx)
    for group in g_idx.unique():
        columns = g_idx == group
        assert torch.equal(layer.dequantized_weight()[:, columns], IntAffine(8).quantize(w[:, columns]).dequantize())
    x = torch.randn(2, 12, generator=g)
    assert torch.equal(layer(x), linear(x, layer.dequantized_weight()))


# --- made from other layers


def test_from_linear_shares_the_bias():
    source = nn.Linear(IN, OUT)
    layer = QuantLinear.from_linear(source, NF4())
    assert layer.bias is source.bias and layer.bias.requires_grad
    assert torch.equal(layer.dequantized_weight(), NF4().quantize(source.weight).dequantize())
    assert QuantLinear.from_linear(nn.Linear(IN, OUT, bias=False), NF4()).bias is None
    frozen = layer_of(NF4()).bias
    assert isinstance(frozen, nn.Parameter) and not frozen.requires_grad


def test_a_quantized_layer_is_a_base_and_can_be_quantized_again():
    layer = full(IntAffine(8))
    assert isinstance(layer, Base) and not isinstance(nn.Linear(2, 2), Base)
    assert torch.equal(weight_of(layer), layer.dequantized_weight())
    again = QuantLinear.from_linear(layer, FloatCast("fp16"))
    torch.testing.assert_close(again.dequantized_weight(), layer.dequantized_weight(), rtol=1e-3, atol=1e-6)
    assert again.bias is layer.bias


def test_every_linear_layer_can_be_quantized():
    import bitsandbytes

    conv, packed = Conv1D(OUT, IN), bitsandbytes.nn.Linear4bit(IN, OUT).to("cpu")
    eight = bitsandbytes.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False).to("cpu")
    for module in (conv, packed, eight):
        layer = QuantLinear.from_linear(module, FloatCast("fp16"))
        assert shape_of(layer) == shape_of(module) == (OUT, IN) and layer.bias is module.bias
        torch.testing.assert_close(layer.dequantized_weight(), weight_of(module), rtol=1e-3, atol=1e-6)
    with pytest.raises(TypeError, match="Embedding"):
        QuantLinear.from_linear(nn.Embedding(4, 4), IntAffine(8))


# --- saved and reloaded


def test_the_state_dict_has_the_documented_keys():
    assert list(QuantLinear(IntAffine(4).quantize(random(OUT, IN))).state_dict()) == ["packed", "scale"]
    assert set(full(IntAffine(4, False)).state_dict()) == {
        "packed", "scale", "zero_point", "bias", "input_scale", "g_idx", "act_quant.scale", "act_quant.zero_point",
    }  # fmt: skip
    nested = QuantLinear(NF4(double_quant=True).quantize(random(OUT, IN))).state_dict()
    assert set(nested) == {"packed", "absmax_code", "absmax_scale", "absmax_offset"}
    assert list(QuantLinear(FloatCast("fp16").quantize(random(OUT, IN))).state_dict()) == ["packed"]


@every_format
@pytest.mark.parametrize("make", [layer_of, full])
def test_saved_and_reloaded_from_its_config(tmp_path, fmt, make):
    layer, x = make(fmt), random(3, IN, seed=10)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    config = json.loads(json.dumps(layer.config()))
    again = QuantLinear.from_config(config, load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(again(x), layer(x)) and repr(again) == repr(layer) and again.config() == config
    assert torch.equal(again.dequantized_weight(), layer.dequantized_weight())
    assert sum(t.nbytes for t in again.state_dict().values()) == sum(t.nbytes for t in layer.state_dict().values())


def exported():
    """Every format of qlab.formats that can be made without arguments."""
    for cls in vars(qlab.formats).values():
        if isinstance(cls, type) and issubclass(cls, Format) and cls is not Format:
            arguments = inspect.signature(cls).parameters.values()
            if all(argument.default is not argument.empty for argument in arguments):
                yield cls()


@pytest.mark.parametrize("fmt", list(exported()), ids=repr)
def test_every_exported_format_makes_a_layer_that_can_be_reloaded(tmp_path, fmt):
    weight, x = random(8, 256), random(3, 256, seed=11)
    layer = QuantLinear(fmt.quantize(weight))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    config = json.loads(json.dumps(layer.config()))
    again = QuantLinear.from_config(config, load_file(tmp_path / "layer.safetensors")).to(torch.bfloat16)
    assert torch.equal(again(x), linear(x, fmt.quantize(weight).dequantize()))


def test_loaded_into_a_layer_of_the_same_make():
    layer, other = full(IntAffine(4, False)), full(IntAffine(4, False))
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(random(2, IN)), layer(random(2, IN)))


def test_a_whole_model_saved_and_reloaded(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(IN, 16), nn.ReLU(), nn.Linear(16, OUT))

    first, x = model(), random(3, IN)
    replace(first, ["0", "2"], lambda name, layer: QuantLinear.from_linear(layer, NF4(), ActQuant()))
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    configs = {name: module.config() for name, module in first.named_modules() if isinstance(module, QuantLinear)}

    def reload(name, layer):
        own = {key.removeprefix(f"{name}."): t for key, t in saved.items() if key.startswith(f"{name}.")}
        return QuantLinear.from_config(configs[name], own)

    second, saved = model(), load_file(tmp_path / "model.safetensors")
    replace(second, list(configs), reload)
    assert torch.equal(second(x), first(x)) and second.state_dict().keys() == saved.keys()


def test_tensors_that_are_not_those_of_the_config():
    layer = full(IntAffine(4, False))
    config, tensors = layer.config(), layer.state_dict()
    short = {key: tensor for key, tensor in tensors.items() if key not in ("scale", "act_quant.scale")}
    with pytest.raises(ValueError, match=r"act_quant.scale is missing, not \[\], scale is missing, not \[10\]"):
        QuantLinear.from_config(config, short)
    with pytest.raises(ValueError, match=r"weight is \[2\], not there"):
        QuantLinear.from_config(config, {**tensors, "weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"packed is \[3\], not \[120\]"):
        QuantLinear.from_config(config, {**tensors, "packed": tensors["packed"][:3]})


# --- dtypes, devices, copies


@every_format
def test_casting_the_model_leaves_the_weight_alone(fmt):
    layer = full(fmt)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(cast)
        assert layer.bias.dtype == cast
        for key, tensor in layer.state_dict().items():
            if key != "bias":
                assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key]), key
    assert {tensor.device.type for tensor in layer.to("meta").state_dict().values()} == {"meta"}


def test_a_copy_is_independent():
    layer = layer_of(IntAffine(4))
    other = copy.deepcopy(layer)
    other.scale.zero_()
    assert torch.equal(other(torch.ones(IN)), other.bias) and not torch.equal(layer(torch.ones(IN)), layer.bias)


# --- errors and edges


def test_empty_batches_and_single_tokens():
    layer = full(IntAffine(4))
    assert layer(torch.ones(0, 3, IN)).shape == (0, 3, OUT) and layer(torch.ones(IN)).shape == (OUT,)
    one = QuantLinear(IntAffine(2, False).quantize(torch.tensor([[-0.3]])))
    assert torch.equal(one(torch.tensor([2.0])), torch.tensor([-0.6]))


def test_non_contiguous_params_can_be_saved(tmp_path):
    q = IntAffine(4, granularity="group", group_size=8).quantize(random(OUT, IN))
    q.params["scale"] = q.params["scale"].t().contiguous().t()
    save_file(QuantLinear(q).state_dict(), tmp_path / "layer.safetensors")


def test_inputs_that_do_not_fit():
    layer = layer_of(IntAffine(4))
    for x in (torch.ones(3, OUT), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=rf"\({OUT}, {IN}\) takes x of shape \(…, {IN}\)"):
            layer(x)
    with pytest.raises(TypeError, match="int64"):
        layer(torch.ones(2, IN, dtype=torch.long))


def test_parts_that_do_not_fit():
    q = IntAffine(4).quantize(random(OUT, IN))
    with pytest.raises(ValueError, match=rf"bias must have shape \({OUT},\), got \({IN},\)"):
        QuantLinear(q, bias=torch.ones(IN))
    for name in ("input_scale", "g_idx"):
        with pytest.raises(ValueError, match=rf"{name} must have shape \({IN},\), got \(1, {IN}\)"):
            QuantLinear(q, **{name: torch.ones(1, IN)})
    with pytest.raises(ValueError, match="input_scale must have shape"):
        QuantLinear.from_linear(nn.Linear(IN, OUT), IntAffine(4), input_scale=torch.ones(OUT))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and above 0"):
            QuantLinear(q, input_scale=torch.full((IN,), bad))
    with pytest.raises(ValueError, match=r"unequal numbers of columns in its groups: \[1, 23\]"):
        QuantLinear(q, g_idx=torch.tensor([0] + 23 * [1]))
    for bad in (torch.ones(IN), torch.full((IN,), -1)):
        with pytest.raises(ValueError, match="group numbers from 0"):
            QuantLinear(q, g_idx=bad)
    with pytest.raises(ValueError, match=r"is \(out, in\), got a QTensor of shape \(4,\)"):
        QuantLinear(IntAffine(4, granularity="tensor").quantize(torch.ones(4)))
