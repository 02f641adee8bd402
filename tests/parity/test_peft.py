"""Adapters against PEFT: forward, gradients and merged weights, over every kind of base and on whole models.

Bit for bit, with B ≠ 0 and lora_alpha ≠ r: at B = 0 or lora_alpha = r a wrong scaling cannot be seen.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from qlab.adapters.add import add_adapters, trainable_parameters
from qlab.adapters.lora import LoRALinear
from qlab.formats import NF4
from qlab.models import find_linears, guard_bitsandbytes, replace
from qlab.nn import QuantLinear, set_weight, weight_of

guard_bitsandbytes()
import bitsandbytes as bnb  # noqa: E402 (after the guard, which quiets its import)

OUT, IN = 48, 64
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def to_4bit(linear, dtype=torch.float32, double_quant=False):
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        quant_type="nf4",
        compute_dtype=dtype,
        compress_statistics=double_quant,
    )
    layer.load_state_dict(linear.to(dtype).state_dict())
    return layer.to(dtype).to("cpu")


def to_8bit(linear, threshold=0.0):
    bias = linear.bias is not None
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=bias, has_fp16_weights=False, threshold=threshold
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def make_base(kind):
    torch.manual_seed(3)
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.mul_(0.5)
    if kind in ("float32", "float64", "bfloat16", "float16"):
        return linear.to(getattr(torch, kind))
    if kind.startswith("conv1d"):
        conv = Conv1D(OUT, IN)
        set_weight(conv, linear.weight)
        conv.bias.data.copy_(linear.bias)
        return conv.to(torch.bfloat16 if kind.endswith("bfloat16") else torch.float32)
    if kind.startswith("nf4"):
        return to_4bit(linear, torch.bfloat16 if "bfloat16" in kind else torch.float32, "double" in kind)
    return to_8bit(linear, threshold=2.0 if "threshold" in kind else 0.0)


FLOATS = ["float32", "float64", "bfloat16", "float16", "conv1d", "conv1d bfloat16"]
NF4S = ["nf4", "nf4 double", "nf4 bfloat16", "nf4 bfloat16 double"]
INT8S = ["int8", "int8 threshold"]
BASES = FLOATS + NF4S + INT8S


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def by_peft(base, autocast_adapter_dtype=True, **settings):
    """PEFT's layer over a copy of `base`, of the class that PEFT has for it."""
    model = One(copy.deepcopy(base))
    model.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)
    model.is_loaded_in_8bit = isinstance(base, bnb.nn.Linear8bitLt)
    config = LoraConfig(target_modules=["layer"], fan_in_fan_out=isinstance(base, Conv1D), **settings)
    layer = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).base_model.model.layer
    quantized = model.is_loaded_in_4bit or model.is_loaded_in_8bit
    assert isinstance(layer, LoraLayer) and type(layer).__name__ == (type(base).__name__ if quantized else "Linear")
    return layer


def pair(kind, r=3, lora_alpha=7, seed=0, **settings):
    """(ours, theirs) over the same weights, with the same A and B, B ≠ 0."""
    base = make_base(kind)
    theirs = by_peft(base, r=r, lora_alpha=lora_alpha, **settings)
    ours = LoRALinear(base, r, lora_alpha, **settings)
    same_adapters(ours, theirs, seed)
    return ours, theirs


def parts(theirs):
    return theirs.lora_A["default"].weight, theirs.lora_B["default"].weight


def same_adapters(ours, theirs, seed):
    for mine, other, size in zip((ours.lora_A, ours.lora_B), parts(theirs), (0.2, 0.4), strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        with torch.no_grad():
            other.copy_(torch.randn(mine.shape, generator=seeded(seed + len(mine))) * size)
            mine.copy_(other)


def inputs(kind, seed=0):
    dtype = next((d for d in ("float64", "bfloat16", "float16") if d in kind), "float32")
    return torch.randn(2, 5, IN, generator=seeded(seed)).to(getattr(torch, dtype))


def run(layer, x, adapters):
    """y and the gradients of A, B and x."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.randn(y.shape, generator=seeded(9)).to(y.dtype)
    return y, *torch.autograd.grad((y * weights).sum(), (*adapters, x))


def assert_same(ours, theirs, x):
    mine = run(ours, x, (ours.lora_A, ours.lora_B))
    for what, a, b in zip(("y", "A", "B", "x"), mine, run(theirs, x, parts(theirs)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{what}: {(a - b).abs().max()}"


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_layer(kind, use_rslora):
    ours, theirs = pair(kind, use_rslora=use_rslora)
    assert ours.scaling == theirs.scaling["default"] != 1
    assert_same(ours.train(), theirs.train(), inputs(kind))
    x = inputs(kind, 1)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert (ours(x) - ours.base(x)).float().norm() > 0.1 * ours.base(x).float().norm(), "the adapter has a say"


@pytest.mark.parametrize("kind", BASES)
def test_dropout(kind):
    ours, theirs = pair(kind, lora_dropout=0.4)
    results = []
    for layer in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        results.append(layer(inputs(kind)))
    assert torch.equal(*results)
    assert torch.equal(ours.eval()(inputs(kind)), theirs.eval()(inputs(kind)))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "conv1d", "nf4", "nf4 bfloat16", "int8"])
def test_autocast(kind):
    ours, theirs = pair(kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(ours, theirs, inputs(kind))


def test_adapters_in_the_dtype_of_the_base():
    """What PEFT does with autocast_adapter_dtype=False."""
    base = make_base("bfloat16")
    theirs = by_peft(base, autocast_adapter_dtype=False, r=3, lora_alpha=7)
    ours = LoRALinear(base, 3, 7, dtype=torch.bfloat16)
    same_adapters(ours, theirs, 0)
    assert_same(ours, theirs, inputs("bfloat16"))


@given(st.integers(1, 9), st.integers(1, 40), st.booleans(), st.sampled_from(["float32", "nf4", "int8"]))
def test_any_rank_and_alpha(r, lora_alpha, use_rslora, kind):
    ours, theirs = pair(kind, r, lora_alpha, seed=r, use_rslora=use_rslora)
    assert_same(ours, theirs, inputs(kind, lora_alpha))


@pytest.mark.parametrize("double", ["", " double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_nf4_base_against_theirs(dtype, double):
    """The whole chain, QuantLinear(NF4) + LoRALinear against Linear4bit + PEFT: the same codes, outputs and gradients."""
    kind = ("nf4 bfloat16" if dtype == torch.bfloat16 else "nf4") + double
    theirs = by_peft(make_base(kind), r=3, lora_alpha=7)
    linear = make_base("float32").to(dtype)
    ours = LoRALinear(QuantLinear.from_linear(linear, NF4(64, double_quant=bool(double))), 3, 7)
    same_adapters(ours, theirs, 0)
    assert torch.equal(ours.base.packed, theirs.base_layer.weight.data.view(-1))
    mine, other = (run(a, inputs(kind), p) for a, p in ((ours, (ours.lora_A, ours.lora_B)), (theirs, parts(theirs))))
    for a, b in zip(mine, other, strict=True):
        assert torch.equal(a, b)


def loss_curve(layer, kind, steps=5):
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = layer(inputs(kind, step)).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4", "nf4 bfloat16", "int8"])
def test_same_loss_curve(kind):
    ours, theirs = pair(kind)
    curve = loss_curve(ours.train(), kind)
    assert curve == loss_curve(theirs.train(), kind) and curve[-1] < curve[0]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", FLOATS)
def test_merged_into_floats(kind, use_rslora):
    ours, theirs = pair(kind, use_rslora=use_rslora)
    theirs.merge()
    merged = weight_of(theirs.base_layer)
    assert torch.equal(ours.dequantized_weight().to(merged.dtype), merged)


@pytest.mark.parametrize("kind", NF4S)
def test_merged_into_nf4(kind):
    """PEFT quantizes W + ΔW again: our W + ΔW gives its very codes."""
    ours, theirs = pair(kind)
    before = theirs.base_layer.weight.data.clone()
    theirs.merge()
    codes = NF4(64, double_quant="double" in kind).quantize(ours.dequantized_weight()).packed
    assert torch.equal(codes, theirs.base_layer.weight.data.view(-1))
    assert not torch.equal(codes, before.view(-1))


def test_merged_into_int8():
    """Within half a step of each row, and what float16 adds: bitsandbytes quantizes a float16 copy."""
    ours, theirs = pair("int8")
    wanted = ours.dequantized_weight()
    theirs.merge()
    step = wanted.abs().amax(1, keepdim=True) / 127
    assert ((weight_of(theirs.base_layer) - wanted).abs() <= 0.52 * step).all()
    assert ((weight_of(ours.base) - wanted).abs() > 0.52 * step).any()


SIZES = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 128}
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def tiny(name):
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **DEPTH, **NO_TOKENS, num_key_value_heads=2))
    if name.startswith("qwen2"):
        tied = name == "qwen2-tied"
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, **DEPTH, num_key_value_heads=2, tie_word_embeddings=tied))
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=64, n_layer=2, n_head=4, n_positions=64, **NO_TOKENS))
    return BertForMaskedLM(BertConfig(**SIZES, **DEPTH))


MODELS = ["llama", "qwen2", "qwen2-tied", "gpt2", "bert"]
SETTINGS = {
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": r".*\.(q_proj|v_proj|up_proj|c_attn|c_fc|query|dense)",
        "exclude_modules": r"cls\..*",
        "rank_pattern": {r"(layers?|h)\.0\..*": 2, r"up_proj|c_fc|dense": 6},
        "alpha_pattern": {r"q_proj|c_attn|query": 11},
    },
}


def two_models(name, dtype, settings):
    """(ours, report, theirs): the same weights and adapters, in the dtypes that PEFT gives them."""
    model = tiny(name)
    if dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
    else:
        convert = to_4bit if dtype == "nf4" else to_8bit
        replace(
            model, [n for n in find_linears(model) if "head" not in n and "cls" not in n], lambda _, old: convert(old)
        )
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = dtype == "nf4", dtype == "int8"
    settings = {"r": 4, "lora_alpha": 10, **settings}
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(**settings, fan_in_fan_out=name == "gpt2"))
    report = add_adapters(model, **settings)
    theirs = {n: layer for n, layer in peft.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    assert report.added.keys() == theirs.keys()
    classes = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
    assert any(type(layer).__name__ == classes.get(dtype, "Linear") for layer in theirs.values())
    for seed, (layer_name, layer) in enumerate(report.added.items()):
        same_adapters(layer, theirs[layer_name], seed)
        assert layer.scaling == theirs[layer_name].scaling["default"]
    assert report.trainable == sum(p.numel() for p in peft.parameters() if p.requires_grad)
    return model, report, peft, theirs


def step(model, parameters):
    """Logits and gradients of one batch."""
    logits = model(torch.arange(14).view(2, 7) * 3 % 40).logits
    weights = torch.randn(logits.shape, generator=seeded(4)).to(logits.dtype)
    return logits, torch.autograd.grad((logits * weights).sum(), parameters)


CASES = [(name, dtype) for name in MODELS for dtype in (torch.float32, torch.bfloat16)]
CASES += [(name, dtype) for name in MODELS if name != "gpt2" for dtype in ("nf4", "int8")]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name, dtype", CASES)
def test_model(name, dtype, settings):
    model, report, peft, theirs = two_models(name, dtype, SETTINGS[settings])
    model.train(), peft.train()
    for module in (*model.modules(), *peft.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    logits, gradients = step(model, trainable_parameters(model))
    expected = step(peft, [p for layer in theirs.values() for p in parts(layer)])
    assert torch.equal(logits, expected[0])
    for (layer, part), ours, other in zip(
        [(n, part) for n in report.added for part in "AB"], gradients, expected[1], strict=True
    ):
        assert torch.equal(ours, other), (layer, part)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model(name, dtype):
    _, report, peft, _ = two_models(name, dtype, SETTINGS["patterns"])
    merged = peft.merge_and_unload()
    for layer_name, layer in report.added.items():
        weight = weight_of(merged.get_submodule(layer_name))
        assert torch.equal(layer.dequantized_weight().to(dtype), weight), layer_name
