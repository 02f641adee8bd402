"""LoRALinear: its formula, what trains, what is kept between forward and backward, and what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qlab.adapters.lora import LoRALinear
from qlab.formats import NF4, IntAffine
from qlab.models import guard_bitsandbytes
from qlab.nn import ActQuant, Base, QuantLinear, shape_of, weight_of

guard_bitsandbytes()
import bitsandbytes as bnb  # noqa: E402 (after the guard)

OUT, IN = 6, 64  # bitsandbytes misreads 4-bit rows that its block of 64 does not divide


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Linear(IN, OUT, dtype=dtype)


def make_base(kind):
    layer = plain()
    if kind == "linear":
        return layer
    if kind == "conv1d":
        conv = Conv1D(OUT, IN)
        nn.init.normal_(conv.bias)
        return conv
    if kind == "linear4bit":
        quantized = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=torch.float32)
    elif kind == "linear8bit":
        quantized = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    else:
        fmt = NF4(16) if kind == "nf4" else IntAffine(4, granularity="group", group_size=8)
        g_idx = torch.arange(IN) % 4 if kind == "g_idx" else None
        input_scale = torch.rand(IN, generator=seeded()) + 0.5 if kind == "input_scale" else None
        return QuantLinear(fmt.quantize(layer.weight), layer.bias, input_scale=input_scale, g_idx=g_idx)
    quantized.load_state_dict(layer.state_dict())
    return quantized.to("cpu")


BASES = ["linear", "conv1d", "nf4", "g_idx", "input_scale", "linear4bit", "linear8bit"]


def with_change(base, r=3, lora_alpha=7.0, seed=2, **settings):
    """An adapter that has trained: B is not 0."""
    layer = LoRALinear(base, r, lora_alpha, **settings)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=seeded(seed + 1)) * 0.3)
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=seeded(seed)) * 0.1)
    return layer


@pytest.mark.parametrize("use_rslora", [False, True])
def test_formula_in_double_precision(use_rslora):
    layer = with_change(plain(torch.float64), use_rslora=use_rslora)
    x = torch.randn(2, 5, IN, generator=seeded(), dtype=torch.float64)
    scaling = 7.0 / math.sqrt(3) if use_rslora else 7.0 / 3
    expected = torch.empty(2, 5, OUT, dtype=torch.float64)
    for index in ((i, j) for i in range(2) for j in range(5)):
        a_x = layer.lora_A.detach() @ x[index]
        expected[index] = layer.base.weight @ x[index] + layer.base.bias + scaling * (layer.lora_B.detach() @ a_x)
    assert layer.scaling == scaling
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(layer.delta_weight(), layer.lora_B @ layer.lora_A * scaling)


def test_gradients_in_double_precision():
    layer = with_change(plain(torch.float64))
    x = torch.randn(3, IN, generator=seeded(), dtype=torch.float64, requires_grad=True)

    def run(x, a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, x)

    assert torch.autograd.gradcheck(run, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("kind", BASES)
def test_it_acts_as_its_dequantized_weight(kind):
    layer = with_change(make_base(kind)).train()  # bitsandbytes' 8-bit layer rounds activations in eval
    x = torch.randn(2, 5, IN, generator=seeded())
    expected = functional.linear(x, layer.dequantized_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=2e-3 if kind == "linear8bit" else 1e-5, atol=1e-5)
    delta = layer.dequantized_weight() - weight_of(layer.base)
    torch.testing.assert_close(delta, 7 / 3 * layer.lora_B @ layer.lora_A, rtol=1e-5, atol=1e-6)
    assert isinstance(layer, Base) and layer.shape == shape_of(layer) == (OUT, IN) and layer.bias is layer.base.bias
    assert weight_of(layer).dtype == torch.float32


@pytest.mark.parametrize("kind", BASES)
def test_it_starts_as_its_base(kind):
    base = make_base(kind)
    x = torch.randn(4, IN, generator=seeded())
    assert torch.equal(LoRALinear(base, 4, 8)(x), base(x))


def test_start_of_a():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 8), 50, 8)
    bound = 1 / math.sqrt(400)
    assert not layer.lora_B.any()
    assert layer.lora_A.abs().max() <= bound
    assert abs(float(layer.lora_A.detach().std()) / (bound / math.sqrt(3)) - 1) < 0.02, "uniform over ±bound"
    assert abs(float(layer.lora_A.detach().mean())) < bound / 50


@pytest.mark.parametrize("kind", BASES)
def test_only_the_adapter_moves(kind):
    layer = with_change(make_base(kind))
    before = {key: value.clone() for key, value in layer.state_dict().items() if isinstance(value, torch.Tensor)}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(4, IN, generator=seeded())).square().sum().backward()
        optimizer.step()
    after = layer.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved == {"lora_A", "lora_B"}
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("kind", ["nf4", "g_idx", "input_scale"])
def test_no_dequantized_weight_waits_for_backward(kind):
    layer = with_change(make_base(kind), r=1)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(torch.randn(1, IN, generator=seeded(), requires_grad=True))
    assert kept and max(kept) <= IN < OUT * IN
    y.sum().backward()


def test_dropout_is_of_the_adapters_input_and_of_training_alone():
    layer = with_change(plain(), lora_dropout=0.5)
    x = torch.randn(64, IN, generator=seeded())
    torch.manual_seed(5)
    dropped = functional.dropout(x, 0.5)
    torch.manual_seed(5)
    trained = layer.train()(x)
    expected = layer.base(x) + dropped @ layer.lora_A.T @ layer.lora_B.T * layer.scaling
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(trained, layer(x)), "another draw"
    without = with_change(plain())
    without.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), without.train()(x)), "off in eval"


@pytest.mark.parametrize(
    "base, adapter",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(base, adapter):
    layer = with_change(plain(base))
    x = torch.randn(4, IN, generator=seeded()).to(base).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (layer.lora_A.dtype, layer.lora_B.dtype, layer.delta_weight().dtype) == (adapter,) * 3
    assert (y.dtype, x.grad.dtype, layer.lora_A.grad.dtype, layer.lora_B.grad.dtype) == (base, base, adapter, adapter)


def test_delta_of_a_16_bit_adapter_is_not_rounded_to_it():
    layer = with_change(plain(), dtype=torch.bfloat16)
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    assert a.dtype == b.dtype == torch.bfloat16
    assert torch.equal(layer.delta_weight(), b.float() @ a.float() * (7 / 3))


def test_weight_of_a_16_bit_base_is_not_rounded_to_it():
    layer = with_change(plain(torch.bfloat16))
    assert torch.equal(layer.dequantized_weight(), layer.base.weight.float() + layer.delta_weight())


def test_where_the_sum_is_rounded():
    """Over float weights base + change is rounded once; over quantized ones the change alone first."""
    x = torch.randn(64, IN, generator=seeded()).bfloat16()
    over_floats = with_change(plain(torch.bfloat16))
    change = functional.linear(functional.linear(x.float(), over_floats.lora_A), over_floats.lora_B) * (7 / 3)
    y = over_floats.base(x)
    once, twice = (y.float() + change).bfloat16(), y + change.bfloat16()
    assert torch.equal(over_floats(x), once) and not torch.equal(once, twice)
    over_codes = with_change(QuantLinear(NF4(16).quantize(plain().weight)))
    y = over_codes.base(x)
    assert torch.equal(over_codes(x), y + change.bfloat16())


def test_state_dict():
    layer = with_change(make_base("nf4"))
    assert set(layer.state_dict()) == {"lora_A", "lora_B", "base.packed", "base.absmax", "base.bias"}
    fresh = LoRALinear(make_base("nf4"), 3, 7.0)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(4, IN, generator=seeded())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_casting_the_module_leaves_the_scales_alone():
    layer = with_change(make_base("nf4"))
    absmax = layer.base.absmax.clone()
    layer.to(torch.bfloat16)
    assert layer.lora_A.dtype == torch.bfloat16 and torch.equal(layer.base.absmax, absmax)
    assert layer(torch.ones(2, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bias_stays_frozen_and_may_be_missing():
    layer = with_change(nn.Linear(IN, OUT, bias=False))
    assert layer.bias is None and layer(torch.ones(IN)).shape == (OUT,)
    assert not with_change(plain()).bias.requires_grad


def test_over_quantized_activations():
    base = make_base("nf4")
    base.act_quant = ActQuant(4)
    layer = with_change(base)
    x = torch.randn(4, IN, generator=seeded())
    expected = base(x) + functional.linear(x, layer.delta_weight())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_empty_batch():
    assert with_change(make_base("nf4"))(torch.zeros(0, IN)).shape == (0, OUT)


@pytest.mark.parametrize("r", [0, -1, 2.5, True, "8", None])
def test_wrong_rank(r):
    with pytest.raises(ValueError, match="r is the rank"):
        LoRALinear(plain(), r, 8)


@pytest.mark.parametrize("lora_alpha", [0, -8, math.inf, math.nan])
def test_wrong_alpha(lora_alpha):
    with pytest.raises(ValueError, match="lora_alpha must be finite and above 0"):
        LoRALinear(plain(), 8, lora_alpha)


@pytest.mark.parametrize("lora_dropout", [-0.1, 1, math.nan])
def test_wrong_dropout(lora_dropout):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        LoRALinear(plain(), 8, 8, lora_dropout=lora_dropout)


def test_wrong_dtype():
    with pytest.raises(ValueError, match="floating-point dtype, got torch.int8"):
        LoRALinear(plain(), 8, 8, dtype=torch.int8)


def test_wrong_base():
    base = plain()
    with pytest.raises(TypeError, match="LoRALinear already"):
        LoRALinear(LoRALinear(base, 2, 4), 2, 4)
    with pytest.raises(TypeError, match="Embedding is no linear layer"):
        LoRALinear(nn.Embedding(4, 4), 2, 4)


def test_a_refused_base_is_not_frozen():
    base = plain()
    with pytest.raises(ValueError, match="r is the rank"):
        LoRALinear(base, 0, 8)
    assert base.weight.requires_grad


@pytest.mark.parametrize("kind", BASES)
def test_wrong_x(kind):
    layer = LoRALinear(make_base(kind), 2, 4)
    for shape in ((3, IN - 1), (IN, OUT), ()):
        with pytest.raises(ValueError, match=rf"takes x of shape \(…, {IN}\), got"):
            layer(torch.ones(shape))
    with pytest.raises(TypeError, match="floating-point x, got torch.int64"):
        layer(torch.ones(3, IN, dtype=torch.long))
