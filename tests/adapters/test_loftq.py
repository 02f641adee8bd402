"""LoftQ: what one pass reaches in closed form, what falls and what rises with more passes, and adapters that start so."""

import pytest
import torch
from torch import nn

from qlab.adapters.add import adapters_of, add_adapters
from qlab.adapters.loftq import loftq, loftq_init
from qlab.formats import FP4, NF4, FloatCast, IntAffine
from qlab.models import guard_bitsandbytes, replace, trainable_parameters
from qlab.nn import QuantLinear, weight_of

guard_bitsandbytes()
import bitsandbytes as bnb  # noqa: E402 (after the guard)

OUT, IN = 32, 64
INT2 = IntAffine(2, granularity="group", group_size=32)
FORMATS = [
    NF4(64),
    NF4(64, double_quant=True),
    FP4(16),
    INT2,
    IntAffine(3, symmetric=False, granularity="group", group_size=16, float_zero_point=True),
    IntAffine(8, granularity="channel"),
    FloatCast("bf16"),
]


def weight(seed=0, shape=(OUT, IN)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(w, q, a, b):
    return float((w - q.dequantize(torch.float32) - b @ a).norm())


def plain_error(w, fmt):
    return float((w - fmt.quantize(w).dequantize()).norm())


# --- one weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_residual_of_rank_r_is_made_up_for_exactly(rank):
    g = torch.Generator().manual_seed(rank)
    codes = torch.randint(-6, 7, (OUT, IN), generator=g).float()
    codes[:, 0] = 7.0  # the largest of each row, which sets its scale and is left alone
    residual = torch.rand(OUT, rank, generator=g) @ (torch.rand(rank, IN, generator=g) - 0.5)
    residual[:, 0] = 0
    residual *= 0.4 / residual.abs().max()  # below half a step: the codes stay
    w, fmt = codes + residual, IntAffine(4, granularity="channel")
    q, a, b = loftq(w, fmt, r=rank)
    assert torch.equal(q.codes.float(), codes) and plain_error(w, fmt) > 1
    torch.testing.assert_close(b @ a, residual, rtol=0, atol=1e-5)
    if rank > 1:
        assert error(w, *loftq(w, fmt, r=rank - 1)) > 0.1


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_one_pass_leaves_the_small_singular_values_and_is_never_worse_than_plain_quantization(fmt):
    for seed in range(3):
        w = weight(seed)
        s = torch.linalg.svdvals((w - fmt.quantize(w).dequantize()).double())
        for r in (1, 8, OUT):
            q, a, b = loftq(w, fmt, r)
            assert torch.equal(q.packed, fmt.quantize(w).packed) and q.format == fmt
            assert (a.shape, b.shape) == ((r, IN), (OUT, r))
            left = s[r:].square().sum().sqrt()
            assert error(w, q, a, b) == pytest.approx(float(left), rel=1e-4, abs=1e-6 * float(w.norm()))
            assert error(w, q, a, b) < plain_error(w, fmt)
            for gram in (a @ a.T, b.T @ b):  # √σ to each factor
                torch.testing.assert_close(gram, torch.diag(s[:r]).float(), rtol=1e-4, atol=1e-4 * float(s[0]))


def test_at_4_bits_and_a_small_rank_the_error_falls_pass_by_pass():
    for fmt in (NF4(64), IntAffine(4, granularity="channel")):
        for seed in range(3):
            w = weight(seed, (64, 128))
            errors = [plain_error(w, fmt), *(error(w, *loftq(w, fmt, 8, n)) for n in range(1, 6))]
            assert errors == sorted(errors, reverse=True)


def test_at_2_bits_it_is_not_monotone_because_the_quantization_step_raises_it():
    for seed in range(3):
        w = weight(seed)
        first, second = loftq(w, INT2, 16, 1), loftq(w, INT2, 16, 2)
        between = error(w, second[0], *first[1:])  # the new codes under the old factors
        assert between > error(w, *first)
        assert error(w, *second) < between  # the SVD step only lowers it
        assert error(w, *loftq(w, INT2, 16, 6)) > error(w, *second) > error(w, *first)


def test_the_second_pass_quantizes_what_the_factors_leave():
    w, fmt = weight(), NF4(64)
    _, a, b = loftq(w, fmt, 4)
    q, *_ = loftq(w, fmt, 4, iterations=2)
    assert torch.equal(q.packed, fmt.quantize(w - b @ a).packed) and not torch.equal(q.packed, fmt.quantize(w).packed)


def test_dtypes_and_the_weight_that_was_given():
    w = weight().bfloat16().requires_grad_()
    before = w.detach().clone()
    q, a, b = loftq(w, NF4(64), 4, iterations=2)
    assert q.dtype == torch.bfloat16 and a.dtype == b.dtype == torch.float32 and not a.requires_grad
    assert torch.equal(w, before)


def test_what_is_out_of_range_is_refused():
    w = weight()
    for settings, message in (({"r": 0}, "got 0"), ({"r": OUT + 1}, f"= {OUT}"), ({"r": 2, "iterations": 0}, "got 0")):
        with pytest.raises(ValueError, match=message):
            loftq(w, NF4(64), **settings)
    with pytest.raises(ValueError, match="matrix"):
        loftq(w[0], NF4(64), 1)
    with pytest.raises(ValueError, match="NaN"):
        loftq(w * torch.nan, NF4(64), 1)
    with pytest.raises(TypeError, match="int64"):
        loftq(w.long(), NF4(64), 1)


# --- adapters --------------------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, 64), nn.ReLU(), nn.Linear(64, OUT))


def quantized(model, kind, fmt=INT2):
    """A copy whose layers store codes."""

    def make(_, layer):
        if kind == "QuantLinear":
            return QuantLinear.from_linear(layer, fmt)
        if kind == "input_scale":
            scale = torch.rand(layer.in_features, generator=torch.Generator().manual_seed(4)) + 0.5
            return QuantLinear.from_linear(layer, fmt, input_scale=scale)
        if kind == "g_idx":
            g_idx = torch.arange(layer.in_features) % (layer.in_features // 32)
            return QuantLinear(fmt.quantize(layer.weight[:, g_idx.argsort(stable=True)]), layer.bias, g_idx=g_idx)
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.float32)
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")

    copy = net()
    copy.load_state_dict(model.state_dict())
    return replace(copy, lambda *_: True, make).model


@pytest.mark.parametrize("kind", ["QuantLinear", "input_scale", "g_idx", "linear4bit"])
@pytest.mark.parametrize("settings", [{"lora_alpha": 3}, {"lora_alpha": 32, "use_rslora": True}])
def test_the_model_starts_nearer_to_the_original_at_any_scaling(kind, settings):
    original, x = net(), weight(9, (50, IN))
    model = quantized(original, kind)
    plain = {name: weight_of(model.get_submodule(name)).detach().clone() for name in ("0", "2")}
    add_adapters(model, r=8, **settings)
    before = model(x).detach()
    errors = loftq_init(model, original)
    for name, layer in adapters_of(model).items():
        w = original.get_submodule(name).weight.detach()
        assert isinstance(layer.base, QuantLinear)
        torch.testing.assert_close(weight_of(layer.base), plain[name], rtol=0, atol=1e-6)  # one pass: nearest codes
        assert errors[name].quantized == pytest.approx(float((w - plain[name]).norm() / w.norm()), rel=1e-4)
        residual = w - plain[name]
        u, s, vh = torch.linalg.svd(residual)
        torch.testing.assert_close(layer.delta_weight().detach(), u[:, :8] * s[:8] @ vh[:8], rtol=0, atol=1e-5)
        assert errors[name].initialized == pytest.approx(
            float((residual - layer.delta_weight().detach()).norm() / w.norm()), rel=1e-3
        )
        assert errors[name].initialized < errors[name].quantized
    expected = original(x)
    assert (model(x) - expected).norm() < 0.9 * (before - expected).norm()


def test_what_trains_is_what_trained_before_and_both_factors_get_a_gradient():
    original = net()
    model = quantized(original, "QuantLinear")
    add_adapters(model, r=4)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    factors = [layer.lora_A for layer in adapters_of(model).values()]
    loftq_init(model, {"0": original[0].weight, "2": original[2].weight.bfloat16()}, iterations=2)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    assert all(a is b.lora_A for a, b in zip(factors, adapters_of(model).values(), strict=True))  # an optimizer's own
    model(weight(2, (5, IN))).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in trainable_parameters(model))


def test_float_layers_keep_their_adapter_and_full_rank_is_exact():
    original = net()
    model = net()
    replace(model, ["2"], lambda _, layer: QuantLinear.from_linear(layer, INT2))
    add_adapters(model, r=OUT)
    start = model[0].lora_A.detach().clone()
    assert list(loftq_init(model, original)) == ["2"]
    assert torch.equal(model[0].lora_A, start)
    torch.testing.assert_close(weight_of(model[2]), original[2].weight, rtol=0, atol=1e-6)


def test_nothing_is_changed_where_something_is_wrong():
    original = net()
    with pytest.raises(ValueError, match="quantize the model"):
        loftq_init(original, original)
    model = quantized(original, "QuantLinear")
    add_adapters(model, r=4)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = original[0].weight
    for originals, message in (
        ({"0": first}, "nothing for '2'"),
        ({"0": first, "2": first[:3]}, r"shape \(32, 64\), got \(3, 64\)"),
        ({"0": first, "2": original[2].weight * torch.inf}, "Inf"),
        (quantized(original, "QuantLinear"), "quantized itself"),
    ):
        with pytest.raises(ValueError, match=message):
            loftq_init(model, originals)
    with pytest.raises(ValueError, match="iterations"):
        loftq_init(model, original, iterations=0)
    assert all(torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())


def test_qalora_is_refused():
    fmt = IntAffine(4, symmetric=False, granularity="group", group_size=16, float_zero_point=True)
    original = net()
    model = quantized(original, "QuantLinear", fmt)
    add_adapters(model, "qalora", r=4)
    with pytest.raises(TypeError, match="QALoRALinear"):
        loftq_init(model, original)
