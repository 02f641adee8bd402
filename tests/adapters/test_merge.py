"""merge on whole models: what each way computes, what stays as it was, what is refused before anything is changed."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from qlab.adapters.add import adapters_of, add_adapters
from qlab.adapters.dequantize import dequantize_model
from qlab.adapters.lora import LoRALinear
from qlab.adapters.merge import HOW, merge, unmerge
from qlab.adapters.merge_weight import merge_naive_add, merge_naive_codes, merge_requantize
from qlab.calibrate import capture, output_error
from qlab.formats import NF4, Binary, FloatCast, IntAffine, KMeans
from qlab.models import find_linears, find_tied, guard_bitsandbytes, weight_of
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq import GPTQ, quantize_model

guard_bitsandbytes()
import bitsandbytes  # noqa: E402 (after the guard, which quiets its import)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
BATCH = {"input_ids": torch.arange(24).view(2, 12)}
ARCHITECTURES = ("llama", "qwen2", "gpt2", "bert")
ZEROS = {"symmetric": False, "granularity": "group", "group_size": 16, "float_zero_point": True}


def build(architecture, **settings):
    """A tiny model of random weights, its biases too, in eval mode. gpt2 and bert tie their output to the embedding."""
    torch.manual_seed(0)
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=2, n_positions=32, **settings))
    elif architecture == "bert":
        model = BertForMaskedLM(BertConfig(**SIZES, **settings))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, **settings))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, **settings))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def adapted(model, kind="lora", size=0.05, fmt=None, method="rtn", calibration=None, **settings):
    """`model` quantized (if a format is given), with adapters that have been trained, as far as their numbers go."""
    if fmt is not None:
        quantize_model(model, fmt, method, calibration, progress=False)
    settings = {"r": 3, "lora_alpha": 5, **settings}
    for seed, layer in enumerate(add_adapters(model, kind, **settings).added.values()):
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g) * size)
    return model


@torch.no_grad()
def logits(model, batch=BATCH):
    return model(**batch).logits


def close(ours, expected, relative=1e-5):
    assert (ours - expected).norm() <= relative * expected.norm()


def state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


def same_state(model, expected):
    now = state(model)
    assert now.keys() == expected.keys() and all(torch.equal(now[key], expected[key]) for key in now)


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("fmt", [None, NF4(32), IntAffine(2, **ZEROS)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dequantize_is_exactly_what_was_trained(architecture, fmt, tmp_path):
    original = build(architecture)
    biases = {name: layer.bias for name, layer in find_linears(original).items()}
    classes = {name: type(layer) for name, layer in find_linears(original).items()}
    model = adapted(original, fmt=fmt)
    names, expected, adapters = list(adapters_of(model)), logits(model), copy.deepcopy(adapters_of(model))
    report = merge(model)
    assert report.model is model and list(report.layers) == names and not report.left
    close(logits(model), expected)
    assert {name: type(layer) for name, layer in find_linears(model).items()} == classes
    for name, layer in find_linears(model).items():
        assert layer.bias is biases[name] and not layer.weight.requires_grad
        if name in names:
            exact = weight_of(adapters[name].base) + adapters[name].delta_weight()
            assert torch.equal(weight_of(layer), exact)
            assert report.layers[name].kept == pytest.approx(1, abs=1e-5) and report.layers[name].error < 1e-5
            assert math.isnan(report.layers[name].codes_changed)
    again = reloaded(model, tmp_path)
    assert torch.equal(logits(again), logits(model)), "and the same after saving"


def test_the_result_is_a_plain_model_again():
    model = adapted(build("llama"), fmt=NF4(32))
    merge(model)
    model = adapted(model, fmt=NF4(32))
    expected = logits(model)
    merge(model, "dequantize")
    close(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_chosen_and_what_it_flips_can_be_counted(dtype):
    model = adapted(build("qwen2"), fmt=NF4(32))
    expected = logits(model)
    report = merge(model, dtype=dtype)
    layers = [model.get_submodule(name) for name in report.layers]
    assert all(layer.weight.dtype == dtype for layer in layers)
    assert all(layer.bias is None or layer.bias.dtype == dtype for layer in layers)
    assert all(1e-5 < layer.error < 0.1 for layer in report.layers.values())
    model.to(dtype)
    apart = (logits(model).float() - expected).norm() / expected.norm()
    flips = (logits(model).argmax(-1) != expected.argmax(-1)).float().mean()
    assert 0 < apart < 0.02 and flips <= 0.2


def test_16_bit_bases_stay_so_unless_told():
    model = adapted(build("llama").bfloat16(), fmt=NF4(32))
    other = copy.deepcopy(model)
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    adapters = adapters_of(other)
    merge(other, dtype=torch.float32)
    for name, adapter in adapters.items():
        exact = adapter.base.dequantized_weight(torch.float32) + adapter.delta_weight()
        assert torch.equal(other.get_submodule(name).weight, exact), "decoded and added in float32, rounded once"
        assert torch.equal(model.get_submodule(name).weight, exact.bfloat16())


@pytest.mark.parametrize("how", ["requantize", "naive-codes", "naive-add", "dequantize"])
def test_layers_with_input_scale_and_g_idx(how):
    """A QTensor holds other columns, in other units, than the weight acts in."""
    scale, order = torch.rand(24) + 0.5, torch.randperm(24, generator=torch.Generator().manual_seed(1))
    g_idx, w, bias = order // 8, torch.randn(10, 24), torch.randn(10)
    fmt = IntAffine(4, symmetric=False, granularity="group", group_size=8)
    columns = g_idx.argsort(stable=True)
    base = QuantLinear(fmt.quantize((w * scale)[:, columns]), bias, None, scale, g_idx)
    layer = LoRALinear(base, 3, 5)
    nn.init.normal_(layer.lora_B, std=0.3)
    stored, x = (layer.delta_weight() * scale)[:, columns].detach(), torch.randn(5, 24)
    expected, report = layer(x).detach(), merge(layer, how)
    new = report.model
    assert new.bias is base.bias and not isinstance(new, LoRALinear)
    if how == "dequantize":
        close(new(x), expected)
    elif how == "naive-add":
        close(new(x), (x / scale)[:, columns] @ merge_naive_add(base.qtensor, stored).T + bias)
    else:
        q = {"requantize": merge_requantize, "naive-codes": merge_naive_codes}[how](base.qtensor, stored)
        assert (new.qtensor.codes.int() - q.codes.int()).abs().max() <= 1
        assert (new.qtensor.codes != q.codes).float().mean() < 0.02  # Δ in another order of operations
        assert torch.equal(new.g_idx, base.g_idx) and torch.equal(new.input_scale, base.input_scale)
        assert (new(x) - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("given", ["model", "state dict"])
def test_original(architecture, given, tmp_path):
    source = build(architecture)
    model = adapted(build(architecture), fmt=NF4(32))
    adapters = adapters_of(model)
    originals = source if given == "model" else {key: tensor.bfloat16() for key, tensor in source.state_dict().items()}
    report = merge(model, "original", originals=originals, dtype=torch.float32)
    for name, adapter in adapters.items():
        w = weight_of(source.get_submodule(name)).detach()
        w = w if given == "model" else w.bfloat16().float()
        layer, entry = model.get_submodule(name), report.layers[name]
        assert torch.equal(weight_of(layer), w + adapter.delta_weight()) and layer.bias is adapter.base.bias
        assert isinstance(layer, Conv1D) == (architecture == "gpt2" and name != "lm_head")
        away = (w - adapter.base.dequantized_weight()).norm() / adapter.delta_weight().detach().norm()
        assert entry.error == pytest.approx(float(away), rel=1e-3) and entry.error > 0.05
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


def test_originals_that_are_not():
    model = adapted(build("llama"), fmt=NF4(32))
    before, source = state(model), build("llama")
    torch.manual_seed(5)
    stranger = LlamaForCausalLM(source.config)
    for originals, match in [
        (stranger, "not the weight that was quantized"),
        ({}, "the originals have no 'model.layers.0.self_attn.q_proj.weight'"),
        (nn.Linear(2, 2), "the originals have no"),
        (
            {key: tensor.T if "k_proj" in key else tensor for key, tensor in source.state_dict().items()},
            r"\(out, in\) = \(32, 64\), the original is \(64, 32\)",
        ),
    ]:
        with pytest.raises(ValueError, match=match):
            merge(model, "original", originals=originals)
    same_state(model, before)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_zero_points(architecture, bits, pooling):
    model = adapted(build(architecture), "qalora", fmt=IntAffine(bits, **ZEROS), pooling=pooling)
    expected, adapters = logits(model), adapters_of(model)
    report = merge(model, "zero-points")
    close(logits(model), expected)
    for name, adapter in adapters.items():
        layer, entry = model.get_submodule(name), report.layers[name]
        assert type(layer) is QuantLinear and layer.bias is adapter.base.bias
        assert torch.equal(layer.packed, adapter.base.packed) and layer.format.bits == bits
        assert entry.codes_changed == 0 and entry.error < 1e-3 and entry.kept == pytest.approx(1, abs=1e-3)
        assert entry.bits_per_weight == bits + 64 / 16  # float32 scale and zero point for each 16 weights
        assert entry.nbytes_before - entry.nbytes_after == adapter.lora_A.nbytes + adapter.lora_B.nbytes


def test_zero_points_of_other_precisions():
    model = adapted(build("llama"), "qalora", fmt=IntAffine(4, **ZEROS), size=0.005, pooling="mean")
    errors, bits = [], []
    for dtype in (None, torch.float16, torch.bfloat16, torch.uint8):
        merged = copy.deepcopy(model)
        report = merge(merged, "zero-points", dtype=dtype)
        entry = report.layers["model.layers.1.mlp.up_proj"]
        errors.append(entry.error)
        bits.append(entry.bits_per_weight)
    assert errors == sorted(errors) and errors[0] < 1e-3 < errors[1] and bits == [8, 7, 7, 6.5]


@pytest.mark.parametrize("act_order", [False, True])
def test_zero_points_after_gptq(act_order):
    model = adapted(
        build("llama"), "qalora", fmt=IntAffine(3, **ZEROS), method=GPTQ(act_order=act_order), calibration=[BATCH]
    )
    expected = logits(model)
    assert (adapters_of(model)["model.layers.0.mlp.up_proj"].base.g_idx is not None) == act_order
    merge(model, "zero-points")
    close(logits(model), expected)


@pytest.mark.parametrize("how", ["dequantize", "requantize"])
def test_qalora_merges_in_the_other_ways_too(how):
    model = adapted(build("llama"), "qalora", fmt=IntAffine(4, **ZEROS), pooling="mean")
    expected = logits(model)
    report = merge(model, how)
    close(logits(model), expected, 1e-5 if how == "dequantize" else 0.5)
    assert all(entry.kept > 0.5 for entry in report.layers.values())


def test_requantize_and_the_naive_readings_are_the_pure_functions():
    for how, pure in [("requantize", merge_requantize), ("naive-codes", merge_naive_codes)]:
        model = adapted(build("llama"), fmt=NF4(32))
        adapters = adapters_of(model)
        report = merge(model, how)
        for name, adapter in adapters.items():
            q = pure(adapter.base.qtensor, adapter.delta_weight())
            assert torch.equal(model.get_submodule(name).packed, q.packed)
            changed = (q.codes != adapter.base.qtensor.codes).double().mean()
            assert report.layers[name].codes_changed == float(changed)
    model = adapted(build("llama"), fmt=NF4(32))
    adapters = adapters_of(model)
    report = merge(model, "naive-add")
    for name, adapter in adapters.items():
        assert torch.equal(model.get_submodule(name).weight, adapter.base.qtensor.codes + adapter.delta_weight())
        assert report.layers[name].error > 10


def test_stochastic_rounding_is_drawn_from_the_generator():
    drawn = []
    for seed in (1, 1, 2):
        model = adapted(build("llama"), fmt=NF4(32))
        merge(model, "requantize", generator=torch.Generator().manual_seed(seed))
        drawn.append(torch.cat([layer.packed for layer in model.modules() if isinstance(layer, QuantLinear)]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_of_bitsandbytes_layers(bits):
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    if bits == 4:
        base = bitsandbytes.nn.Linear4bit(64, 16, compress_statistics=False, quant_type="nf4")
        base.weight = bitsandbytes.nn.Params4bit(w, False, compress_statistics=False, quant_type="nf4", module=base)
    else:
        base = bitsandbytes.nn.Linear8bitLt(64, 16, has_fp16_weights=False)
        base.weight = bitsandbytes.nn.Int8Params(w, requires_grad=False)
    base = base.to("cpu")
    before, generator, merged = weight_of(base).clone(), torch.Generator().manual_seed(0), []
    layer = LoRALinear(base, 2, 2)
    nn.init.normal_(layer.lora_B, std=0.002)
    target = (before + layer.delta_weight()).detach()
    for _ in range(300):
        new = merge(Holder(layer), "requantize", generator=generator).model.layer
        merged.append(weight_of(new).clone())
    assert type(new) is type(base) and torch.equal(weight_of(base), before)
    x = torch.randn(2, 64)
    assert (new(x) - x @ merged[-1].T - new.bias).norm() < 0.02 * new(x).norm(), (
        "it computes with the codes that were drawn"
    )
    merged = torch.stack(merged)
    gap = merged.amax(0) - merged.amin(0)
    assert (merged.mean(0) - target).norm() < gap.norm() / 2 / math.sqrt(300)  # the most that sampling makes of it
    assert (gap > 0).float().mean() > 0.5


@pytest.mark.parametrize("how", ["requantize", "dequantize"])
def test_blocks_that_run_over_the_ends_of_rows(how):
    """Where bitsandbytes' own CPU kernel decodes wrongly, what was encoded is still read."""
    base = bitsandbytes.nn.Linear4bit(96, 8, compress_statistics=False, quant_type="nf4")
    w = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8).unsqueeze(1)
    base.weight = bitsandbytes.nn.Params4bit(w, False, compress_statistics=False, quant_type="nf4", module=base)
    layer = LoRALinear(base.to("cpu"), 2, 3)
    nn.init.normal_(layer.lora_B)
    expected = NF4(64).quantize(w).dequantize() + layer.delta_weight().detach()
    merged = weight_of(merge(layer, how).model)
    assert torch.equal(merged, expected if how == "dequantize" else NF4(64).quantize(expected).dequantize())


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Twice(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self, layer):
        super().__init__()
        self.first = self.second = layer

    def forward(self, x):
        return self.second(self.first(x))


def test_shared_layers_stay_shared():
    model = Twice(nn.Linear(8, 8))
    add_adapters(model, r=2, lora_alpha=3, target_modules=["first"])
    nn.init.normal_(model.first.lora_B)
    x = torch.randn(3, 8)
    expected, report = model(x).detach(), merge(model, keep=True)
    assert model.first is model.second and type(model.first) is nn.Linear and list(report.layers) == ["first"]
    close(model(x), expected)
    unmerge(report)
    assert model.first is model.second and isinstance(model.first, LoRALinear)


@pytest.mark.parametrize(
    "architecture, head", [("gpt2", "lm_head"), ("bert", "cls.predictions.decoder"), ("llama", "lm_head")]
)
def test_a_tied_head_gets_its_own_weight(architecture, head, tmp_path):
    model = build(architecture, **({"tie_word_embeddings": True} if architecture == "llama" else {}))
    assert find_tied(model)
    parent = model.get_submodule(head.rpartition(".")[0])
    layer = LoRALinear(model.get_submodule(head), 2, 3)  # past add_adapters, which would refuse or untie it
    nn.init.normal_(layer.lora_B)
    setattr(parent, head.rpartition(".")[2], layer)
    embedding, expected = model.get_input_embeddings().weight.clone(), logits(model)
    report = merge(model)
    close(logits(model), expected)
    assert torch.equal(model.get_input_embeddings().weight, embedding) and not find_tied(model)
    assert "no longer tied to" in report.layers[head].note
    again = reloaded(model, tmp_path)
    assert torch.equal(logits(again), logits(model)) and torch.equal(again.get_input_embeddings().weight, embedding)


def test_a_second_merge_is_refused():
    model = adapted(build("llama"))
    merge(model)
    before = state(model)
    with pytest.raises(ValueError, match="no adapter is left to merge.*merged already"):
        merge(model)
    same_state(model, before)


@pytest.mark.parametrize("how", HOW)
def test_unmerge_gives_back_what_was_kept(how):
    source = build("llama")
    model = adapted(build("llama"), "qalora" if how == "zero-points" else "lora", fmt=IntAffine(4, **ZEROS))
    before, adapters, expected = state(model), adapters_of(model), logits(model)
    report = merge(model, how, originals=source if how == "original" else None, keep=True)
    assert not adapters_of(model)
    assert unmerge(report) is model and adapters_of(model) == adapters
    same_state(model, before)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="holds no adapters"):
        unmerge(report)


def test_unmerge_refusals():
    model = adapted(build("llama"), fmt=NF4(32))
    with pytest.raises(ValueError, match="holds no adapters, so its merge cannot be undone"):
        unmerge(merge(model, "requantize"))
    model = adapted(build("llama"))
    report = merge(model, keep=True)
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False)
    before = state(model)
    with pytest.raises(ValueError, match="'model.layers.0.mlp.up_proj' is no longer the layer that was merged"):
        unmerge(report)
    same_state(model, before)


def test_a_model_that_is_one_adapter():
    layer = LoRALinear(nn.Linear(6, 4), 2, 3)
    nn.init.normal_(layer.lora_B)
    report = merge(layer, keep=True)
    assert type(report.model) is nn.Linear and list(report.layers) == [""] and unmerge(report) is layer


@pytest.mark.parametrize("training", [True, False])
def test_modes_stay(training):
    model = adapted(build("llama"), fmt=NF4(32)).train(training)
    report = merge(model, "requantize", calibration=[BATCH], keep=True)
    assert all(module.training is training for module in model.modules())
    model.train(not training)
    assert all(module.training is not training for module in unmerge(report).modules())


@pytest.mark.parametrize(
    "settings, fmt, match",
    [
        ({"how": "add"}, NF4(32), "how is one of 'dequantize', .*got 'add'"),
        ({"how": "original"}, NF4(32), "takes originals: got how='original'"),
        ({"originals": {}}, NF4(32), "takes originals: got how='dequantize'"),
        ({"generator": torch.Generator()}, NF4(32), "only how='requantize' rounds"),
        ({"dtype": torch.int8}, NF4(32), "got torch.int8"),
        ({"dtype": torch.uint8}, NF4(32), "got torch.uint8"),
        ({"how": "zero-points"}, IntAffine(4, **ZEROS), "only a QALoRALinear"),
        ({"how": "naive-add"}, None, "a Linear holds none"),
        ({"how": "naive-codes"}, None, "a Linear holds none"),
        ({"how": "naive-codes"}, KMeans(2), "needs codes that stand for fixed levels"),
        ({"how": "requantize", "generator": torch.Generator()}, FloatCast("bf16"), "fixed levels"),
        ({"calibration": []}, NF4(32), "no batch reached"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_changed(settings, fmt, match):
    model = adapted(build("llama"), fmt=fmt)
    before, adapters = state(model), adapters_of(model)
    with pytest.raises(ValueError, match=match):
        merge(model, **settings)
    same_state(model, before)
    assert adapters_of(model) == adapters


def test_a_diverged_adapter_is_named_before_anything_is_changed():
    model = adapted(build("llama"), fmt=NF4(32))
    last = "model.layers.1.mlp.down_proj"
    adapters_of(model)[last].lora_B.data[3, 1] = math.inf
    adapters = adapters_of(model)
    with pytest.raises(ValueError, match="NaN or Inf") as caught:
        merge(model)
    assert any(repr(last) in note and "Nothing was changed" in note for note in caught.value.__notes__)
    assert adapters_of(model) == adapters


def test_a_later_error_names_the_layer_and_what_was_merged():
    model = adapted(build("llama"), fmt=IntAffine(4, param_dtype=torch.float16))
    name = "model.layers.0.self_attn.k_proj"
    adapters_of(model)[name].lora_B.data.fill_(1e7)  # its scale will not fit in float16
    with pytest.raises(ValueError, match="float16") as caught:
        merge(model, "requantize")
    assert any(
        repr(name) in note and "already replaced: model.layers.0.self_attn.q_proj" in note
        for note in caught.value.__notes__
    )


def test_report_measures_the_outputs_too():
    model = adapted(build("llama"), fmt=IntAffine(3, **ZEROS))
    names = list(adapters_of(model))
    before = copy.deepcopy(model)
    hessians = capture(before, [BATCH], names, ("hessian",))
    report = merge(model, "requantize", calibration=[BATCH])
    for name in names:
        adapter, new, entry = before.get_submodule(name), model.get_submodule(name), report.layers[name]
        w_hat, delta, hessian = (
            adapter.base.dequantized_weight(),
            adapter.delta_weight().detach(),
            hessians[name].hessian,
        )
        size = output_error(w_hat + delta, hessian).sum()
        lost = output_error(new.dequantized_weight() - w_hat - delta, hessian).sum()
        assert entry.output_error == pytest.approx(float((lost / size).sqrt()), rel=1e-4) and entry.output_error > 0
        assert entry.output_without == pytest.approx(
            float((output_error(delta, hessian).sum() / size).sqrt()), rel=1e-4
        )
        assert entry.size == pytest.approx(float(delta.norm() / w_hat.norm()), rel=1e-5)
        moved = new.dequantized_weight() - w_hat
        assert entry.kept == pytest.approx(float((moved * delta).sum() / delta.square().sum()), rel=1e-4)
        assert entry.error == pytest.approx(float((moved - delta).norm() / delta.norm()), rel=1e-4)
        assert entry.nbytes_after == sum(buffer.nbytes for buffer in new.buffers())
        assert entry.nbytes_before == entry.nbytes_after + 4 * 3 * sum(adapter.shape)
        assert entry.bits_per_weight == 8 * entry.nbytes_after / delta.numel()
    text = str(report)
    assert text.startswith("merged: requantize") and all(f"\n{name} " in text for name in names)
    assert f"{len(names)} layers, {report.nbytes_before} → {report.nbytes_after} bytes, 7.000 bits a weight" in text
    quiet = str(merge(adapted(build("llama")), "dequantize"))
    assert "nan" not in quiet and "32.000 bits a weight" in quiet


def test_an_untrained_adapter_changes_nothing():
    model = adapted(build("llama"), fmt=NF4(32), size=0)
    report = merge(model, "requantize")
    assert all(
        entry.size == 0 and entry.codes_changed == 0 and math.isnan(entry.kept) for entry in report.layers.values()
    )
    assert "nan" not in str(report)


def test_bytes_of_a_dequantized_layer():
    model = adapted(build("llama"), fmt=NF4(32))
    report = merge(model)
    entry = report.layers["model.layers.0.mlp.up_proj"]
    assert entry.nbytes_after == 4 * 64 * 128 and entry.bits_per_weight == 32 and entry.became == "Linear"
    assert entry.nbytes_before == 64 * 128 // 2 + 64 * 128 // 32 * 4 + 4 * 3 * (64 + 128)


def test_layers_without_an_adapter_are_named_and_can_follow(tmp_path):
    model = adapted(build("gpt2"), fmt=NF4(32), target_modules=["c_attn"])
    expected = logits(model)
    with pytest.raises(ValueError, match="2 adapters stand on the layers.*merge them first"):
        dequantize_model(model)
    report = merge(model)
    assert report.left == [
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert "still quantized, for they had no adapter: transformer.h.0.attn.c_proj" in str(report)
    assert dequantize_model(model) is model
    close(logits(model), expected)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_model_becomes_a_float_model(architecture, bits, tmp_path):
    """Found, dequantized, merged, saved and loaded again: without its quantization config, or it would be quantized anew."""
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    wide = {"llama": {}, "gpt2": dropout}
    build(architecture, **wide[architecture]).save_pretrained(tmp_path / "source")
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    kind = LlamaForCausalLM if architecture == "llama" else GPT2LMHeadModel
    model = adapted(kind.from_pretrained(tmp_path / "source", quantization_config=config).train())
    expected = logits(model)  # in train mode Linear8bitLt does not round activations
    report = merge(model.eval(), keep=True)
    close(logits(model), expected, 1e-5 if bits == 4 else 2e-3)  # it multiplies in float16
    assert not any("bitsandbytes" in type(module).__module__ for module in model.modules())
    assert all(bool(entry.note) == (bits == 8) for entry in report.layers.values())
    again = reloaded(model, tmp_path / "merged")
    assert torch.equal(logits(again), logits(model)) and not hasattr(again.config, "quantization_config")
    unmerge(report)
    assert model.config.quantization_config.quant_method == "bitsandbytes" and getattr(model, f"is_loaded_in_{bits}bit")
    assert torch.equal(logits(model.train()), expected)


def test_the_quantizer_stays_while_a_layer_does(tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    report = merge(adapted(model, target_modules=["q_proj"]))
    assert len(report.left) == 12 and model.config.quantization_config is not None
    dequantize_model(model)
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_loaded_in_4bit", False)


def test_int8_takes_the_dtype_of_the_model():
    layer = bitsandbytes.nn.Linear8bitLt(16, 8, has_fp16_weights=False).to("cpu")
    model = nn.Sequential(LoRALinear(layer, 2, 3), nn.LayerNorm(8, dtype=torch.bfloat16))
    merge(model)
    assert model[0].weight.dtype == torch.bfloat16 and model[0].bias.dtype == torch.bfloat16


def test_repacked_layers_are_refused():
    layer = bitsandbytes.nn.Linear4bit(64, 8, quant_type="nf4").to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True
    model = Holder(nn.Identity())
    model.layer = LoRALinear.__new__(LoRALinear)
    nn.Module.__init__(model.layer)
    model.layer.base = layer
    with pytest.raises(RuntimeError, match="repacked.*layer.base"):
        merge(model)


def test_4_bit_layers_that_were_never_quantized():
    layer = bitsandbytes.nn.Linear4bit(64, 8, quant_type="nf4")
    with pytest.raises(ValueError, match="never quantized"):
        merge(LoRALinear(layer, 2, 3), "requantize")


def test_activation_quantizers():
    base = QuantLinear(IntAffine(4).quantize(torch.randn(8, 16)), None, ActQuant())
    layer = LoRALinear(base, 2, 3)
    nn.init.normal_(layer.lora_B)
    report = merge(copy.deepcopy(layer))
    assert report.layers[""].note == "activations are no longer quantized"
    report = merge(copy.deepcopy(layer), "requantize")
    assert isinstance(report.model.act_quant, ActQuant) and report.layers[""].note == ""


def test_adapters_of_float64_lose_nothing():
    layer = LoRALinear(nn.Linear(8, 6, dtype=torch.float64), 2, 3)
    nn.init.normal_(layer.lora_B)
    exact = layer.base.weight + layer.delta_weight()
    assert layer.delta_weight().dtype == torch.float64 and torch.equal(merge(layer).model.weight, exact)


@pytest.mark.parametrize("fmt", [Binary(), NF4(16), IntAffine(8), KMeans(2)], ids=str)
def test_any_format_of_our_layers(fmt):
    base = QuantLinear(fmt.quantize(torch.randn(8, 16)), torch.randn(8))
    layer = LoRALinear(base, 2, 3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    expected = layer(x).detach()
    report = merge(Holder(copy.deepcopy(layer)), "requantize")
    assert str(report.model.layer.format) == str(fmt) and 0 < report.layers["layer"].kept < 1.2
    close(merge(Holder(layer)).model(x), expected)
