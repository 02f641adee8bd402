"""QAT + LoRA: what each school rounds, its gradients, what stays frozen, and that conversion stores what has trained."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qlab.adapters import LoRALinear, adapters_of, add_adapters, merge
from qlab.adapters.qat_lora import QATLoRALinear, convert_qat_lora
from qlab.formats import MXFP4, NF4, Binary, FloatCast, IntAffine, Ternary
from qlab.models import guard_bitsandbytes, trainable_parameters
from qlab.nn import Base, QuantLinear, weight_of
from qlab.qat import QATLinear, grid_parameters, parameter_groups, prepare_qat

guard_bitsandbytes()
import bitsandbytes as bnb  # noqa: E402 (after the guard)

OUT, IN = 8, 64
GROUP = {"granularity": "group", "group_size": 16}
CHANNEL = IntAffine(4, granularity="channel")
FORMATS = [
    *(IntAffine(bits, granularity="channel") for bits in (4, 3, 2)), *(IntAffine(bits, False, **GROUP) for bits in (4, 3, 2)),
    NF4(64), NF4(64, double_quant=True), MXFP4(), Ternary("twn"),
]  # fmt: skip
SCHOOLS = ["merged", "base", "factors"]
FACTORS = IntAffine(4, granularity="channel")  # a group of 16 does not divide r


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Linear(IN, OUT, dtype=dtype)


def conv1d():
    torch.manual_seed(1)
    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.bias)
    return layer


def make(base, fmt=CHANNEL, r=3, lora_alpha=7.0, **settings):
    """An adapter that has trained: B is not 0."""
    layer = QATLoRALinear(base, r, lora_alpha, fmt=fmt, **settings)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=seeded(5)) * 0.3)
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=seeded(4)) * 0.1)
    return layer


def add(model, fmt, **settings):
    return add_adapters(model, "qat", fmt=fmt, **settings)


def train(model, steps=3, lr=0.02, seed=6, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(trainable_parameters(model), lr=lr, weight_decay=0.1)
    x = torch.randn(5, IN, generator=seeded(seed))
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        (y - torch.randn(y.shape, generator=seeded(7))).square().mean().backward()
        optimizer.step()
    return model


def network(layers=2):
    torch.manual_seed(2)
    modules = [module for _ in range(layers) for module in (nn.Linear(IN, IN), nn.Tanh())]
    return nn.Sequential(*modules, nn.Linear(IN, OUT))


def tiny(school, fmt=None):
    """W = [[0.6, -0.2], [0.3, 0.9]], A = [[1, 0.4]], B = [[0.1], [-0.15]], scaling = 3: ΔW = [[0.3, 0.12], [-0.45, -0.18]]."""
    linear = nn.Linear(2, 2, bias=False)
    layer = QATLoRALinear(linear, 1, 3.0, fmt=fmt or IntAffine(2, granularity="channel"), school=school)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.6, -0.2], [0.3, 0.9]]))
        layer.lora_A.copy_(torch.tensor([[1.0, 0.4]]))
        layer.lora_B.copy_(torch.tensor([[0.1], [-0.15]]))
    return layer


def test_each_school_on_a_tiny_matrix():
    # Two bits per channel: each row is rounded to −amax, 0 or amax.
    # W + ΔW = [[0.9, -0.08], [-0.15, 0.72]] → [[0.9, 0], [0, 0.72]]
    torch.testing.assert_close(tiny("merged").dequantized_weight(), torch.tensor([[0.9, 0.0], [0.0, 0.72]]))
    # W → [[0.6, 0], [0, 0.9]]
    torch.testing.assert_close(tiny("base").dequantized_weight(), torch.tensor([[0.9, 0.12], [-0.45, 0.72]]))
    # A → [[1, 0]], B has one number in each row and stays
    torch.testing.assert_close(tiny("factors").dequantized_weight(), torch.tensor([[0.9, -0.2], [-0.15, 0.9]]))
    for school in SCHOOLS:
        torch.testing.assert_close(tiny(school).merged_weight(), torch.tensor([[0.9, -0.08], [-0.15, 0.72]]))


@pytest.mark.parametrize("school", SCHOOLS)
@pytest.mark.parametrize("base", [plain, conv1d])
def test_forward_is_its_dequantized_weight(base, school):
    layer = make(base(), school=school)
    x = torch.randn(2, 5, IN, generator=seeded())
    torch.testing.assert_close(
        layer(x), functional.linear(x, layer.dequantized_weight(), layer.bias), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(weight_of(layer.base) + layer.delta_weight(), weight_of(layer), rtol=1e-5, atol=1e-6)
    real = weight_of(base()) + 7 / 3 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.merged_weight(), real, rtol=1e-5, atol=1e-6)
    assert isinstance(layer, Base) and layer.shape == (OUT, IN)
    assert torch.equal(layer.bias, base().bias)


@pytest.mark.parametrize("school", SCHOOLS)
def test_what_each_school_rounds(school):
    layer, w = make(plain(), school=school), plain().weight
    a, b = layer.lora_A, layer.lora_B

    def rounded(tensor):
        return CHANNEL.quantize(tensor.detach()).dequantize()

    expected = {
        "merged": rounded(w + 7 / 3 * b @ a),
        "base": rounded(w) + 7 / 3 * b @ a,
        "factors": w + 7 / 3 * rounded(b) @ rounded(a),
    }
    torch.testing.assert_close(layer.dequantized_weight(), expected[school], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["ste", "frozen"])
def test_gradients_of_the_merged_school_by_hand(method):
    layer = make(plain(torch.float64), IntAffine(3, granularity="channel"), method=method)
    x = torch.randn(5, IN, generator=seeded(), dtype=torch.float64)
    target = torch.randn(5, OUT, generator=seeded(1), dtype=torch.float64)
    (layer(x) * target).sum().backward()
    a, b, w = layer.lora_A.detach(), layer.lora_B.detach(), plain(torch.float64).weight.detach()
    g = target.T @ x
    if method == "frozen":
        scale = (w.abs().amax(1, keepdim=True) / 3).float()
        mask = ((w + 7 / 3 * b @ a) / scale).round().abs() <= 3
        assert 0.02 < 1 - float(mask.double().mean()) < 0.9, "some weights are clipped"
        g = g * mask
    torch.testing.assert_close(layer.lora_A.grad, 7 / 3 * b.T @ g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.lora_B.grad, 7 / 3 * g @ a.T, rtol=1e-12, atol=1e-12)
    assert layer.lora_A.dtype == torch.float64 and layer.base.weight.grad is None


def test_gradients_of_the_other_schools_by_hand():
    x = torch.randn(5, IN, generator=seeded(), dtype=torch.float64)
    target = torch.randn(5, OUT, generator=seeded(1), dtype=torch.float64)
    g = target.T @ x
    for school in ("base", "factors"):
        layer = make(plain(torch.float64), school=school)
        (layer(x) * target).sum().backward()
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        if school == "factors":  # each factor meets the rounded other one
            a, b = (CHANNEL.quantize(factor).dequantize() for factor in (a, b))
        torch.testing.assert_close(layer.lora_A.grad, 7 / 3 * b.T @ g, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.lora_B.grad, 7 / 3 * g @ a.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["ste", "frozen", "learned"])
@pytest.mark.parametrize("fmt", [CHANNEL, NF4(64)], ids=str)
def test_starts_as_the_rounded_base(fmt, method):
    x, linear = torch.randn(4, IN, generator=seeded()), plain()
    expected = QuantLinear.from_linear(plain(), fmt)(x)
    for school in ("merged", "base"):
        assert torch.equal(QATLoRALinear(plain(), 4, 8, fmt=fmt, school=school, method=method)(x), expected)
    assert torch.equal(QATLoRALinear(plain(), 4, 8, fmt=FACTORS, school="factors")(x), linear(x))


@pytest.mark.parametrize("school", SCHOOLS)
def test_only_the_factors_move(school):
    layer = make(plain(), school=school)
    before = copy.deepcopy(layer.state_dict())
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    every = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0.1)
    after = train(layer, optimizer=every).state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"lora_A", "lora_B"}
    assert torch.equal(layer.base.weight, plain().weight)


def test_merged_training_lowers_the_loss_of_the_rounded_model():
    torch.manual_seed(3)
    x, w = torch.randn(256, IN), torch.randn(OUT, IN) * 0.1
    model = QATLoRALinear(plain(), 4, 8, fmt=IntAffine(2, granularity="channel"))
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.01)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x) - x @ w.T).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0], losses[::30]


@pytest.mark.parametrize("method", ["ste", "frozen"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("school", ["merged", "base"])
def test_conversion_is_what_trained(school, fmt, method):
    model = network()
    report = add(model, fmt, school=school, method=method, r=2, lora_alpha=6)
    train(model).eval()
    x = torch.randn(7, IN, generator=seeded(8))
    with torch.no_grad():
        expected, weights = model(x), {name: weight_of(layer) for name, layer in report.added.items()}
    assert any(layer.lora_B.any() for layer in report.added.values())
    converted = convert_qat_lora(model)
    assert converted.model is model and list(converted.replaced) == ["0", "2", "4"]
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    for name, layer in converted.replaced.items():
        assert type(layer) is (QuantLinear if school == "merged" else LoRALinear)
        stored = layer if school == "merged" else layer.base
        assert type(stored) is QuantLinear and stored.format == fmt
        torch.testing.assert_close(weight_of(layer), weights[name], rtol=0, atol=0)


@pytest.mark.parametrize("fmt", [FACTORS, IntAffine(2, False, granularity="tensor"), NF4(8)], ids=str)
def test_conversion_of_factors(fmt):
    model = network()
    before = model[0].weight.clone()
    report = add(model, fmt, school="factors", r=2, lora_alpha=6)
    train(model).eval()
    stored = {name: layer.quantized_factors() for name, layer in report.added.items()}
    x = torch.randn(7, IN, generator=seeded(8))
    with torch.no_grad():
        expected = model(x)
        converted = convert_qat_lora(model)
        assert torch.equal(model(x), expected)
    for name, layer in converted.replaced.items():
        a, b = stored[name]
        assert type(layer) is LoRALinear and a.format == b.format == fmt
        assert torch.equal(layer.lora_A, a.dequantize()) and torch.equal(layer.lora_B, b.dequantize())
        assert layer.scaling == 3 and layer.lora_B.any()
    assert torch.equal(model[0].base.weight, before)


def test_conversion_of_a_transposed_weight_to_the_bit():
    linear = plain()
    linear.weight = nn.Parameter(torch.randn(IN, OUT, generator=seeded()).T)
    layer = make(linear, FloatCast("bf16"))
    x = torch.randn(1, IN, generator=seeded(1))  # a single token is summed in another order over another layout
    assert torch.equal(layer.convert()(x), layer(x))


def test_training_went_through_the_rounding():
    model = train(make(plain(), IntAffine(2, granularity="channel")))
    real, stored = model.merged_weight(), model.convert().dequantized_weight()
    assert float(((real - stored).norm() / real.norm()).detach()) > 0.1, "the stored weight is not the real one"
    assert torch.equal(
        model.quantized_weight().codes, IntAffine(2, granularity="channel").quantize(real.detach()).codes
    )


def test_frozen_base_is_qlora():
    fmt, x = NF4(64), torch.randn(5, IN, generator=seeded())
    ours = QATLoRALinear(plain(), 3, 7, fmt=fmt, school="base")
    qlora = LoRALinear(QuantLinear.from_linear(plain(), fmt), 3, 7)
    qlora.lora_A.data.copy_(ours.lora_A.data)
    for _ in range(2):
        train(ours), train(qlora)
        assert torch.equal(ours(x), qlora(x)) and torch.equal(ours.lora_A, qlora.lora_A)


@pytest.mark.parametrize("method", ["lsq", "learned"])
@pytest.mark.parametrize("school", ["merged", "base"])
@pytest.mark.parametrize("fmt", [CHANNEL, IntAffine(3, False, **GROUP)], ids=str)
def test_learned_grids(fmt, school, method):
    model = network(1)
    report = add(model, fmt, school=school, method=method, r=2)
    grids = grid_parameters(model)
    n_grids = sum(p.numel() for p in grids)
    factors = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in report.added.values())
    assert grids and report.trainable == factors + n_grids
    assert report.frozen == sum(p.numel() for p in model.parameters()) - report.trainable
    before = [p.detach().clone() for p in grids]
    weights = model[0].base.weight.clone()
    groups = parameter_groups(model, 1e-2, 1e-4)
    assert sum(p.numel() for p in groups[0]["params"]) == factors
    train(model, optimizer=torch.optim.Adam(groups)).eval()
    assert any(not torch.equal(old, new) for old, new in zip(before, grids, strict=True))
    assert torch.equal(model[0].base.weight, weights)
    x = torch.randn(7, IN, generator=seeded(8))
    with torch.no_grad():
        expected = model(x)
        convert_qat_lora(model)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("school", SCHOOLS)
def test_merge_before_conversion_keeps_the_function(school):
    model = network(1)
    add(model, FACTORS, school=school, r=2)
    train(model).eval()
    x = torch.randn(7, IN, generator=seeded(8))
    expected = model(x).detach()
    merge(model, "dequantize")
    assert not adapters_of(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_requantizing_the_base_school_costs_and_the_merged_school_does_not():
    x, errors = torch.randn(64, IN, generator=seeded(8)), {}
    for school in ("merged", "base"):
        model = nn.Sequential(plain())
        add(model, IntAffine(2, granularity="channel"), school=school, r=4)
        y = train(model, steps=20).eval()(x).detach()
        convert_qat_lora(model)
        if school == "base":
            merge(model, "requantize")
        assert type(model[0]) is QuantLinear
        errors[school] = float((model(x) - y).norm() / y.norm())
    assert errors["merged"] == 0 and errors["base"] > 0.05, errors


@pytest.mark.parametrize("school, codes", [("merged", False), ("base", False), ("factors", False), ("factors", True)])
def test_bfloat16(school, codes):
    base = QuantLinear.from_linear(plain(torch.bfloat16), NF4(64)) if codes else plain(torch.bfloat16)
    model = nn.Sequential(make(base, school=school))
    layer, x = model[0], torch.randn(4, IN, generator=seeded()).bfloat16()
    layer(x).sum().backward()
    assert layer.lora_A.dtype == layer.lora_A.grad.dtype == torch.float32 and layer.lora_B.grad.any()
    y = layer(x).detach()
    assert y.dtype == torch.bfloat16
    real = functional.linear(x.float(), layer.dequantized_weight(), layer.bias.float())
    torch.testing.assert_close(y.float(), real, rtol=2e-2, atol=2e-2)
    converted = convert_qat_lora(model).model[0]
    assert torch.equal(converted(x), y)
    if school == "merged":
        assert converted.dtype == torch.bfloat16 and converted.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("school", SCHOOLS)
def test_state_dict_round_trip(school):
    layer, again = make(plain(), school=school, method="ste"), QATLoRALinear(plain(), 3, 7, fmt=CHANNEL, school=school)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(4, IN, generator=seeded())
    assert torch.equal(again(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("school", ["base", "factors"])
def test_dropout_is_the_adapters_alone(school):
    layer, x = make(plain(), school=school, lora_dropout=0.5), torch.ones(1, IN)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    layer.train().lora_B.data.zero_()
    assert torch.equal(layer(x), layer.base(x))


def test_settings_reach_the_converted_layer():
    model = nn.Sequential(plain())
    layer = add(model, CHANNEL, school="base", r=4, lora_alpha=6, lora_dropout=0.5, use_rslora=True).added["0"]
    assert layer.scaling == 3
    new = convert_qat_lora(model).replaced["0"]
    assert (
        (new.r, new.lora_dropout, new.scaling) == (4, 0.5, 3) and new.lora_A is layer.lora_A and new.bias is layer.bias
    )


def test_targets_and_report():
    model = network()
    report = add(model, CHANNEL, r=2, target_modules=["0", "2"])
    assert list(report.added) == ["0", "2"] and [layer.r for layer in report.added.values()] == [2, 2]
    assert report.trainable == 2 * 2 * (IN + IN) == sum(p.numel() for p in trainable_parameters(model))
    assert not model[4].weight.requires_grad and type(model[4]) is nn.Linear
    assert "2 adapters" in str(report) and "merged, IntAffine(bits=4" in repr(model[0])
    convert_qat_lora(model)
    assert [type(model[i]) for i in (0, 2, 4)] == [QuantLinear, QuantLinear, nn.Linear]


def test_ranks_and_ties_as_of_other_adapters():
    model = nn.ModuleDict({"embedding": nn.Embedding(OUT, IN), "inner": plain(), "head": plain()})
    model["head"].weight = model["embedding"].weight
    report = add(model, CHANNEL, method="lsq", r=2, rank_pattern={"head": 5}, alpha_pattern={"head": 10}, tied="untie")
    assert [(layer.r, layer.scaling) for layer in report.added.values()] == [(2, 8.0), (5, 2.0)]
    assert model["head"].base.weight is not model["embedding"].weight
    learned = sum(grid.numel() for grid in grid_parameters(model))
    assert learned == 2 * OUT and report.trainable == 7 * (IN + OUT) + learned
    assert f"{2 * (IN + OUT) + OUT} " in str(report)


def linear4bit():
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("school", ["merged", "base"])
def test_refuses_codes_where_it_needs_weights(school):
    for base, kind in ((QuantLinear.from_linear(plain(), NF4(64)), "QuantLinear"), (linear4bit(), "Linear4bit")):
        with pytest.raises(TypeError, match=kind):
            add(nn.Sequential(base), CHANNEL, school=school, target_modules=["0"])
    add(nn.Sequential(linear4bit()), CHANNEL, school="factors", target_modules=["0"])


def test_refuses_a_second_wrapping():
    for wrap in (add_adapters, lambda model: add(model, CHANNEL, school="base")):
        model = network(1)
        wrap(model)
        for again in (add_adapters, lambda model: add(model, CHANNEL)):
            with pytest.raises(ValueError, match="have an adapter already"):
                again(model)
    with pytest.raises(TypeError, match="QATLinear"):
        add(prepare_qat(network(1), CHANNEL).model, CHANNEL)
    for school in SCHOOLS:
        with pytest.raises(TypeError, match="LoRALinear"):
            QATLoRALinear(LoRALinear(plain(), 2, 4), 2, 4, fmt=CHANNEL, school=school)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"school": "both"}, "school is one of 'merged', 'base', 'factors', got 'both'"),
        ({"method": "xnor"}, "method is one of .* got 'xnor'"),
        ({"school": "factors", "method": "lsq"}, "B is 0 there"),
        ({"lora_dropout": 0.1}, "leave lora_dropout at 0, got 0.1"),
        ({"r": 0}, "rank"),
        ({"fmt": IntAffine(4, granularity="group", group_size=48)}, "48"),
        ({"fmt": IntAffine(4, **GROUP), "school": "factors"}, "16"),
        ({"fmt": Binary(), "method": "lsq"}, "LSQ learns the step"),
        ({"fmt": NF4(64, double_quant=True), "method": "learned"}, "cannot be learned"),
    ],
)
def test_refused_settings_change_nothing(settings, match):
    model = network(1)
    with pytest.raises(ValueError, match=match):
        add(model, **{"fmt": CHANNEL} | settings)
    assert all(p.requires_grad for p in model.parameters()) and type(model[0]) is nn.Linear


def test_a_refused_format_leaves_a_single_layer_trainable():
    linear = plain()
    for school in ("merged", "base"):
        with pytest.raises(ValueError, match="48"):
            QATLoRALinear(linear, 2, 4, fmt=IntAffine(4, granularity="group", group_size=48), school=school)
    assert linear.weight.requires_grad


def test_refusals_of_conversion():
    with pytest.raises(ValueError, match="no QATLoRALinear"):
        convert_qat_lora(network())
    model = network(1)
    add(model, CHANNEL)
    with torch.no_grad():
        model[2].lora_B[0, 0] = torch.nan
    with pytest.raises(ValueError) as error:
        convert_qat_lora(model)
    assert "layer '2'" in error.value.__notes__[0] and type(model[0]) is QATLoRALinear
    with pytest.raises(ValueError, match="quantized_factors"):
        make(plain(), school="factors").quantized_weight()
    with pytest.raises(ValueError, match="quantized_weight"):
        make(plain()).quantized_factors()


def test_a_single_layer_and_a_shared_one():
    report = add(plain(), CHANNEL)
    assert type(report.model) is QATLoRALinear and type(report.model.base) is QATLinear
    assert type(convert_qat_lora(report.model).model) is QuantLinear
    shared = nn.Linear(IN, IN)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    add(model, CHANNEL)
    convert_qat_lora(model)
    assert model[0] is model[2] and type(model[0]) is QuantLinear


def test_tied_layers():
    model = nn.ModuleDict({"embedding": nn.Embedding(OUT, IN), "inner": plain(), "head": plain()})
    model["head"].weight = model["embedding"].weight
    with pytest.raises(ValueError, match="shares its weight"):
        add(model, CHANNEL, target_modules=["head"])
    assert model["head"].weight.requires_grad and model["inner"].weight.requires_grad
    report = add(model, CHANNEL)
    assert list(report.added) == ["inner"] and "embedding.weight" in report.skipped["head"]
    assert model["head"].weight is model["embedding"].weight
    alone = nn.ModuleDict({"embedding": model["embedding"], "head": model["head"]})
    with pytest.raises(ValueError, match="every target is tied"):
        add(alone, CHANNEL)
