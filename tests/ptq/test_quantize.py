"""quantize_model: what it replaces, what it refuses before touching anything, and that each layer does what it reports."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from qlab.calibrate import MinMax, Percentile, capture
from qlab.formats import NF4, Binary, FloatCast, IntAffine, KMeans, ProductQuantizer, Ternary
from qlab.models import find_linears, weight_of
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq import METHODS, RTN, Method, SmoothQuant, quantize_model

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
BATCHES = [{"input_ids": torch.arange(12).view(2, 6) + shift} for shift in (0, 9)]
INT4 = IntAffine(4)


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, **settings)).eval()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 7), nn.GELU(), nn.Linear(7, 3, bias=False))


def quantize(model, fmt=INT4, method="rtn", calibration=None, **settings):
    return quantize_model(model, fmt, method, calibration, progress=False, **settings)


class Scaled(RTN):
    """RTN after a transform with a scale known beforehand."""

    keep = ("amax", "hessian")

    def scale(self, weights, stats, formats):
        assert all(w.shape[1] == len(stats.amax) for w in weights) and len(weights) == len(formats)
        return torch.linspace(0.5, 3, weights[0].shape[1])


def test_rtn_is_every_weight_rounded():
    model, expected = llama(), llama()
    for name, layer in find_linears(expected).items():
        if name != "lm_head":
            layer.weight.data = INT4.quantize(layer.weight).dequantize()
    report = quantize(model)
    assert report.model is model and len(report.layers) == 14 and report.left == {"lm_head": "the output head"}
    torch.testing.assert_close(model(**BATCHES[0]).logits, expected(**BATCHES[0]).logits, rtol=0, atol=1e-6)
    for name, layer in report.layers.items():
        w, w_hat = (weight_of(m.get_submodule(name)).detach() for m in (llama(), model))
        assert layer.weight_error == pytest.approx(float((w_hat - w).norm() / w.norm()), rel=1e-5)
        assert math.isnan(layer.output_error) and layer.scale == ""


def test_tied_weights_and_what_is_not_selected_are_left():
    report = quantize(llama(tie_word_embeddings=True), select=lambda name, layer: "mlp" in name or name == "lm_head")
    assert len(report.layers) == 6 and "tied" in report.left["lm_head"]
    assert report.left["model.layers.0.self_attn.q_proj"] == "not selected"
    report = quantize(llama(), select=["lm_head", "model.layers.1.mlp.up_proj"])
    assert set(report.layers) == {"lm_head", "model.layers.1.mlp.up_proj"}


def test_one_format_for_each_layer():
    model = net()
    report = quantize(model, {"1": NF4(10), "3": None})
    assert isinstance(model[1], QuantLinear) and isinstance(model[3], nn.Linear)
    assert report.layers["1"].format.block_size == 10 and report.left == {"3": "not selected"}


def test_a_model_that_is_a_single_layer():
    layer = Conv1D(5, 8)
    report = quantize(layer)
    assert isinstance(report.model, QuantLinear) and report.model.shape == (5, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_model_is_kept(dtype):
    model = net().to(dtype)
    quantize(model, method=Scaled(), calibration=[torch.randn(9, 10, dtype=dtype)])
    assert model[1].dtype == dtype and model[1].bias.dtype == dtype
    assert model(torch.randn(2, 10, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("make, batches, folds", [
    (llama, BATCHES, True), (lambda: BertModel(BertConfig(**SIZES)).eval(), BATCHES, False), (net, [torch.randn(30, 10)], True),
], ids=["llama", "bert", "net"])  # fmt: skip
def test_a_transform_changes_nothing_but_the_rounding(make, batches, folds):
    """bf16 codes stand in for exact ones: with 8 bits of mantissa the outputs must be close, and with float32, equal."""

    class Exact(Scaled):
        def quantize(self, w, fmt, stats, name):
            seen[name] = w
            return fmt.quantize(w), None

    seen, model = {}, make()
    before, plain = _output(model, batches[0]), copy.deepcopy(model)
    report = quantize(model, FloatCast("bf16"), Exact(), batches)
    torch.testing.assert_close(_output(model, batches[0]), before, rtol=0.1, atol=0.05)
    for name, layer in report.layers.items():
        scale = torch.linspace(0.5, 3, seen[name].shape[1])
        torch.testing.assert_close(seen[name], weight_of(plain.get_submodule(name)) * scale)
        kept = model.get_submodule(name).input_scale is not None
        assert layer.scale == "input_scale" if kept else layer.scale.startswith("folded into ")
        assert layer.nbytes == layer.bits_per_weight / 8 * seen[name].numel()
    assert any(layer.scale != "input_scale" for layer in report.layers.values()) == folds


def _output(model, batch):
    with torch.no_grad():
        result = model(**batch) if isinstance(batch, dict) else model(batch)
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize(
    "method", [Scaled(), type("Watched", (RTN,), {"keep": ("hessian",)})()], ids=["scaled", "plain"]
)
def test_output_error_is_that_of_the_layer_on_its_inputs(method):
    """Folded or not: measured by running the layer beside the float one on the inputs that the quantized model gives it."""
    model, batch = llama(), BATCHES[0]
    floats = llama()
    report = quantize(model, method=method, calibration=[batch])
    inputs = {}
    for name in report.layers:
        hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: inputs.update({name: a[0]}))
        _output(model, batch)
        hook.remove()
        layer, x = model.get_submodule(name), inputs[name].flatten(0, 1)
        scale = torch.linspace(0.5, 3, x.shape[1]) if report.layers[name].scale.startswith("folded") else 1
        w = weight_of(floats.get_submodule(name)) * scale
        error = ((layer(x) - x @ w.T).norm() / (x @ w.T).norm()).detach()
        assert report.layers[name].output_error == pytest.approx(float(error), rel=1e-3)


def test_statistics_are_of_the_model_as_quantized_so_far():
    seen = {}

    class Watch(RTN):
        keep = ("hessian",)

        def quantize(self, w, fmt, stats, name):
            seen[name] = stats.hessian
            return super().quantize(w, fmt, stats, name)

    model, x = net(), torch.randn(30, 10)
    quantize(model, IntAffine(2), Watch(), [x])
    (after,) = capture(model, [x], ["3"], keep=("hessian",)).values()
    (before,) = capture(net(), [x], ["3"], keep=("hessian",)).values()
    torch.testing.assert_close(seen["3"], after.hessian)
    assert not torch.allclose(seen["3"], before.hessian, rtol=0.01)


@pytest.mark.parametrize("method", [RTN(), Scaled()], ids=["plain", "scaled"])
def test_static_activations_have_the_range_of_what_the_layer_quantizes(method):
    model, x = net(), torch.randn(50, 10)
    static = ActQuant(8, granularity="tensor", static=True)
    quantize(model, method=method, calibration=[x], activations=static, observer=lambda: Percentile(0.9))
    assert math.isnan(static.scale), "the template is left as it was"
    for name in "13":
        layer = model[int(name)]
        own = []
        with torch.no_grad():
            hook = layer.register_forward_pre_hook(lambda m, a, own=own: own.append(a[0]))
            model(x)
            hook.remove()
        seen = own[0] if layer.input_scale is None else own[0] / layer.input_scale
        observer = Percentile(0.9)
        observer.observe(seen)
        low, high = observer.range()
        torch.testing.assert_close(layer.act_quant.scale, torch.maximum(-low, high).float() / 127)


def test_a_method_may_bring_its_own_activations_and_data():
    class Own(RTN):
        activations = ActQuant(8, granularity="tensor", static=True)

        def batches(self, model, calibration):
            assert calibration is None
            return [torch.ones(4, 10)]

    model = net()
    quantize(model, method=Own())
    assert model[1].act_quant.calibrated
    quantize(model := net(), method=Own(), activations=ActQuant(4))
    assert model[1].act_quant.format.bits == 4 and not model[1].act_quant.static


def test_a_generator_of_batches_is_enough():
    quantize(llama(), method=Scaled(), calibration=iter(BATCHES))


@pytest.mark.parametrize("fmt", [
    Binary(), Ternary("twn"), Ternary("bitnet"), KMeans(2), ProductQuantizer(2, bits=3), NF4(8), FloatCast("fp16"),
    IntAffine(4, False, "group", group_size=2),
], ids=repr)  # fmt: skip
def test_every_format_can_be_rounded_to(fmt):
    """10 columns and 7 rows: 8 divides nothing."""
    model = nn.Linear(10, 7)
    report = quantize(model, fmt)
    (layer,) = report.layers.values()
    assert torch.equal(report.model.dequantized_weight(), fmt.quantize(model.weight).dequantize())
    assert layer.bits_per_weight == fmt.quantize(model.weight).bits_per_weight == report.bits_per_weight


REFUSED = {
    "no such method": (dict(method="gptqq"), "no method is named 'gptqq': use one of rtn"),
    "group": (dict(fmt=IntAffine(4, granularity="group", group_size=5)), r"group_size=5 does not divide .*\(3, 7\)"),
    "a row in two blocks": (
        dict(fmt=NF4(16), method="gptq", calibration=[]),
        r"blocks of 16 run over the ends of its rows",
    ),
    "no columns": (
        dict(fmt=ProductQuantizer(1), method="awq+gptq", calibration=[]),
        "cannot be encoded column by column",
    ),
    "no zero point": (dict(method="hqq"), "HQQ moves the zero point"),
    "not LLM.int8()'s": (dict(method="llm.int8"), r"it takes IntAffine\(8\), not IntAffine\(bits=4"),
    "unknown layer": (dict(fmt={"2.x": INT4}), "no linear layer is named '2.x'; the model has 1, 3"),
    "unknown selection": (dict(select="7"), "no linear layer is named 7; the model has 1, 3"),
    "nothing selected": (dict(select=lambda name, layer: False), "no layer is left to quantize"),
    "no data": (dict(method=Scaled()), "needs calibration data"),
    "empty data": (dict(method=Scaled(), calibration=[]), "needs calibration data"),
    "no data for a range": (dict(activations=ActQuant(granularity="tensor", static=True)), "needs calibration data"),
    "no format": (dict(fmt="int4"), "the format of '1' is a str"),
}


@pytest.mark.parametrize("settings, message", REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_changed(settings, message):
    model = net()
    with pytest.raises((ValueError, TypeError), match=message):
        quantize(model, **settings)
    assert isinstance(model[1], nn.Linear) and isinstance(model[3], nn.Linear)


def test_a_pair_that_cannot_be_is_refused_by_the_method():
    class Picky(RTN):
        def check(self, fmt, shape=None):
            raise ValueError(f"not {fmt}")

    with pytest.raises(ValueError, match=r"not IntAffine\(bits=4"):
        quantize(net(), method=Picky())


def test_layers_that_the_data_does_not_reach():
    model = net()
    model.aside = nn.Linear(3, 3)
    model.forward = lambda x: model[:4](x)
    with pytest.raises(ValueError, match="does not reach aside"):
        quantize(model, method=Scaled(), calibration=[torch.randn(4, 10)])
    assert isinstance(model[1], nn.Linear)


def test_an_error_halfway_says_how_far_it_came():
    model = net()
    model[3].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 NaN") as caught:
        quantize(model)
    assert caught.value.__notes__ == ["while quantizing 3; already replaced: 1"]


def test_the_report_can_be_read():
    text = str(quantize(llama(), method=Scaled(), calibration=BATCHES))
    assert "folded into model.layers.0.input_layernorm" in text and "lm_head" in text
    assert text.splitlines()[-1].startswith("14 layers, ")


def test_progress_is_shown_unless_asked_not_to(capsys):
    quantize_model(net(), INT4)
    assert "2/2" in capsys.readouterr().err
    quantize(net())
    assert capsys.readouterr().err == ""


def test_methods_have_names():
    for name, make in METHODS.items():
        assert isinstance(make(), Method) and name == name.lower()


def test_observers_may_be_given(monkeypatch):
    made = []
    quantize(net(), activations=ActQuant(granularity="tensor", static=True), calibration=[torch.randn(4, 10)],
             observer=lambda: made.append(MinMax()) or made[-1])  # fmt: skip
    assert len(made) == 2


@pytest.mark.parametrize("norms_only, smoothed", [(True, 10), (False, 14)])
def test_a_transform_may_be_for_the_outputs_of_norms_alone(norms_only, smoothed):
    """Of seven layers in a block, q, k, v, gate and up read a norm."""
    report = quantize(llama(), IntAffine(8), SmoothQuant(norms_only=norms_only), BATCHES)
    assert sum(layer.scale != "" for layer in report.layers.values()) == smoothed
    assert sum(layer.scale.startswith("folded") for layer in report.layers.values()) == 10
