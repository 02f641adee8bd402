"""QALoRALinear: pooling, the shape of ΔW, and that ΔW is a change of zero points."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from qlab.adapters.lora import LoRALinear
from qlab.adapters.qalora import QALoRALinear
from qlab.formats import NF4, Binary, IntAffine, KMeans
from qlab.nn import QuantLinear, weight_of

OUT, IN, GROUP = 6, 32, 8


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(bits=4, group_size=GROUP, **settings):
    return IntAffine(
        bits, symmetric=False, granularity="group", group_size=group_size, float_zero_point=True, **settings
    )


def make_base(fmt=None, g_idx=False, input_scale=False):
    w = torch.randn(OUT, IN, generator=seeded(1)) * 0.1 + 0.03
    groups = torch.arange(IN) % (IN // GROUP) if g_idx else None
    scale = torch.rand(IN, generator=seeded(2)) + 0.5 if input_scale else None
    return QuantLinear((fmt or grid()).quantize(w), torch.randn(OUT, generator=seeded(3)), None, scale, groups)


def make(base, r=3, lora_alpha=7.0, **settings):
    """An adapter that has trained: B is not 0."""
    layer = QALoRALinear(base, r, lora_alpha, **settings)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=seeded(5)) * 0.3)
        layer.lora_B.copy_(torch.randn(OUT, r, generator=seeded(4)) * 0.3)
    return layer


def shifted(layer):
    """The base with ΔW in its zero points."""
    base = layer.base
    q = base.qtensor
    params = {"scale": q.params["scale"], "zero_point": q.params["zero_point"] - layer.zero_point_delta().detach()}
    q = type(q)(q.format, q.packed, params, q.shape, q.dtype)
    return QuantLinear(q, base.bias, base.act_quant, base.input_scale, base.g_idx)


@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_formula_with_an_explicit_loop(pooling, g_idx):
    layer = make(make_base(g_idx=g_idx), pooling=pooling)
    groups = layer.base.g_idx if g_idx else torch.arange(IN) // GROUP
    x = torch.randn(5, IN, generator=seeded())
    pooled = torch.zeros(5, IN // GROUP)
    for token in range(5):
        for column in range(IN):
            pooled[token, groups[column]] += x[token, column] / (GROUP if pooling == "mean" else 1)
    change = 7.0 / 3 * pooled @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), layer.base(x) + change, rtol=1e-5, atol=1e-5)


def test_mean_is_sum_over_group_size():
    by_sum, by_mean = make(make_base()), make(make_base(), pooling="mean")
    by_mean.load_state_dict(by_sum.state_dict())
    assert torch.equal(by_mean.delta_weight() * GROUP, by_sum.delta_weight())
    assert torch.equal(by_mean.zero_point_delta() * GROUP, by_sum.zero_point_delta())


@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_delta_is_constant_within_each_group(pooling, g_idx):
    layer = make(make_base(g_idx=g_idx), pooling=pooling)
    groups = layer.base.g_idx.long() if g_idx else torch.arange(IN) // GROUP
    delta = layer.delta_weight()
    product = layer.lora_B @ layer.lora_A * (7.0 / 3) / (GROUP if pooling == "mean" else 1)
    assert delta.shape == (OUT, IN) and delta.dtype == torch.float32
    torch.testing.assert_close(delta, product[:, groups], rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [{}, {"g_idx": True}, {"input_scale": True}, {"g_idx": True, "input_scale": True}])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_zero_points_take_delta_up(bits, pooling, settings):
    layer = make(make_base(grid(bits), **settings), pooling=pooling)
    x = torch.randn(16, IN, generator=seeded())
    merged = shifted(layer)
    wanted = weight_of(layer.base) + layer.delta_weight()
    error = (weight_of(merged) - wanted).norm() / layer.delta_weight().norm()
    assert error < 1e-5
    assert torch.equal(layer.dequantized_weight(), wanted)
    assert (merged(x) - layer(x)).norm() / layer(x).norm() < 1e-5
    assert (layer(x) - layer.base(x)).norm() > 0.02 * layer.base(x).norm(), "a change worth merging"
    torch.testing.assert_close(layer(x), functional.linear(x, wanted, layer.bias), rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.packed, layer.base.packed), "the codes stay"


def test_shapes_of_the_paper():
    layer = make(make_base(), r=2)
    assert layer.lora_A.shape == (2, IN // GROUP) and layer.lora_B.shape == (OUT, 2)
    assert layer.zero_point_delta().shape == layer.base.zero_point.shape == (OUT, IN // GROUP)
    assert layer.scaling == 3.5 and isinstance(layer, LoRALinear)
    assert set(layer.state_dict()) == {"lora_A", "lora_B", *(f"base.{key}" for key in layer.base.state_dict())}


def test_starts_as_its_base_with_the_bound_of_its_own_fan_in():
    base = make_base(grid(group_size=2))
    layer = QALoRALinear(base, 64, 8)
    x = torch.randn(4, IN, generator=seeded())
    assert torch.equal(layer(x), base(x))
    assert 0.95 / math.sqrt(IN / 2) < layer.lora_A.abs().max() <= 1 / math.sqrt(IN / 2)


@pytest.mark.parametrize("group_size", [1, IN])
def test_extremes_of_group_size(group_size):
    layer = make(make_base(grid(group_size=group_size)))
    assert layer.lora_A.shape[1] == IN // group_size
    if group_size > 1:  # a group of one weight has scale |w|, and a zero point of its own
        assert (weight_of(shifted(layer)) - layer.dequantized_weight()).norm() < 1e-5 * layer.delta_weight().norm()


def test_gradients():
    """Of A, B and x against those of the same ΔW written out."""
    layer = make(make_base(g_idx=True, input_scale=True))
    x = torch.randn(5, IN, generator=seeded(), requires_grad=True)
    weights = torch.randn(5, OUT, generator=seeded(9))
    inputs = (layer.lora_A, layer.lora_B, x)
    ours = torch.autograd.grad((layer(x) * weights).sum(), inputs)
    written = functional.linear(x, layer.dequantized_weight(), layer.bias)
    for gradient, expected in zip(ours, torch.autograd.grad((written * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_only_the_adapter_moves():
    layer = make(make_base(g_idx=True))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(4, IN, generator=seeded())).square().sum().backward()
    optimizer.step()
    assert {k for k, v in layer.state_dict().items() if not torch.equal(v, before[k])} == {"lora_A", "lora_B"}


def test_no_dequantized_weight_waits_for_backward():
    layer = make(make_base(), r=1)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(1, IN, generator=seeded(), requires_grad=True))
    assert kept and max(kept) <= IN < OUT * IN


def test_dropout_falls_on_groups():
    layer = make(make_base(), lora_dropout=0.5)
    x = torch.randn(64, IN, generator=seeded())
    torch.manual_seed(5)
    pooled = functional.dropout(x.view(64, -1, GROUP).sum(-1), 0.5)
    torch.manual_seed(5)
    expected = layer.base(x) + pooled @ layer.lora_A.T @ layer.lora_B.T * layer.scaling
    torch.testing.assert_close(layer.train()(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.eval()(x), make(make_base())(x))


def test_dtypes():
    layer = make(make_base(grid(param_dtype=torch.float16)))
    x = torch.randn(4, IN, generator=seeded()).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert layer.lora_A.dtype == layer.zero_point_delta().dtype == torch.float32, "not those of the stored zero points"
    assert y.dtype == x.grad.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32


def group(**settings):
    return IntAffine(4, granularity="group", group_size=GROUP, **settings)


@pytest.mark.parametrize(
    "fmt, why",
    [
        (NF4(16), "NF4.* has no zero points"),
        (KMeans(2, granularity="group", group_size=GROUP), "KMeans.* has no zero points"),
        (Binary("channel"), "Binary.* has no zero points"),
        (group(), "symmetric, group 8.* has no zero points"),
        (group(symmetric=False), "has integer zero points, which would round ΔW away"),
        (IntAffine(4, False, "channel", float_zero_point=True), "no zero point of its own for each group"),
        (IntAffine(4, False, "tensor", float_zero_point=True), "no zero point of its own for each group"),
        (IntAffine(4, False, "head", heads=2, float_zero_point=True), "no zero point of its own for each group"),
    ],
)
def test_formats_that_cannot(fmt, why):
    with pytest.raises(ValueError, match=f"QA-LoRA puts ΔW into zero points: .*{why}.*float_zero_point=True"):
        QALoRALinear(make_base(fmt), 2, 4)


def test_bases_that_cannot():
    with pytest.raises(TypeError, match="of a QuantLinear, got a Linear: quantize the layer first"):
        QALoRALinear(nn.Linear(4, 4), 2, 4)
    with pytest.raises(TypeError, match="is a QALoRALinear already"):
        QALoRALinear(make(make_base()), 2, 4)


def test_hostile_input():
    with pytest.raises(ValueError, match="pooling is 'sum' or 'mean', got 'max'"):
        QALoRALinear(make_base(), 2, 4, pooling="max")
    with pytest.raises(ValueError, match="r is the rank"):
        QALoRALinear(make_base(), 0, 4)
    with pytest.raises(ValueError, match="group_size=5 does not divide the row"):
        QALoRALinear(make_base(grid(group_size=5)), 2, 4)
    layer = make(make_base())
    for width in (IN - GROUP, IN // GROUP, 2 * IN):
        with pytest.raises(ValueError, match=rf"takes x of shape \(…, {IN}\), got"):
            layer(torch.ones(3, width))
