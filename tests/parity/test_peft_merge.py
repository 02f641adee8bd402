"""merge(how="requantize") against PEFT's merge_and_unload: codes, scales and weights, bit for bit; and the survival of Δ."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlab.adapters.add import add_adapters
from qlab.adapters.bases import qtensor_of
from qlab.adapters.lora import LoRALinear
from qlab.adapters.merge import merge
from qlab.formats import FP4, NF4
from qlab.models import guard_bitsandbytes
from qlab.nn import QuantLinear, weight_of

guard_bitsandbytes()
import bitsandbytes  # noqa: E402 (after the guard, which quiets its import)

pytestmark = pytest.mark.filterwarnings("ignore:Merge lora module")
SHAPE = (48, 128)  # out, in: blocks of 64 divide the row, elsewhere bitsandbytes' AVX512 kernel decodes wrongly
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}


def random_factors(r, shape, size, seed=0, dtype=torch.float32):
    """A (r, in) and B (out, r), with entries of B of the given size."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(r, shape[1], generator=g).to(dtype), (torch.randn(shape[0], r, generator=g) * size).to(dtype)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def weight(dtype):
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)) * 0.02).to(dtype)


def four_bit(dtype, quant_type, double_quant, block_size=64):
    layer = bitsandbytes.nn.Linear4bit(
        SHAPE[1], SHAPE[0], compute_dtype=dtype, compress_statistics=double_quant, quant_type=quant_type
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight(dtype), False, None, block_size, double_quant, quant_type, module=layer
    )
    return layer.to("cpu")


def eight_bit(dtype, threshold=6.0):
    layer = bitsandbytes.nn.Linear8bitLt(SHAPE[1], SHAPE[0], has_fp16_weights=False, threshold=threshold)
    layer.weight = bitsandbytes.nn.Int8Params(weight(dtype), requires_grad=False)
    return layer.to("cpu")


def merged_by_peft(base, a, b, lora_alpha, use_rslora=False, bits=4):
    net = Net(copy.deepcopy(base))
    setattr(net, f"is_loaded_in_{bits}bit", True)
    config = LoraConfig(r=len(a), lora_alpha=lora_alpha, target_modules=["layer"], use_rslora=use_rslora)
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    adapter = model.base_model.model.layer
    adapter.lora_A.default.weight.data, adapter.lora_B.default.weight.data = a.clone(), b.clone()
    return model.merge_and_unload().layer


def merged_by_us(base, a, b, lora_alpha, use_rslora=False):
    adapter = LoRALinear(base, len(a), lora_alpha, use_rslora=use_rslora, dtype=a.dtype)
    adapter.lora_A.data, adapter.lora_B.data = a.clone(), b.clone()
    net = Net(adapter)
    report = merge(net, "requantize")
    return net.layer, report.layers["layer"]


def same_4bit(ours, theirs):
    mine, other = ours.weight.quant_state, theirs.weight.quant_state
    assert torch.equal(ours.weight.data, theirs.weight.data) and ours.weight.data.dtype == torch.uint8
    assert torch.equal(mine.absmax, other.absmax) and mine.nested == other.nested and mine.dtype == other.dtype
    if mine.nested:
        assert torch.equal(mine.state2.absmax, other.state2.absmax) and torch.equal(mine.offset, other.offset)
    x = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(1)).to(ours.compute_dtype)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("size", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4(dtype, double_quant, adapter_dtype, size):
    base = four_bit(dtype, "nf4", double_quant)
    a, b = random_factors(4, SHAPE, size / 10, dtype=adapter_dtype)
    before = base.weight.data.clone()
    theirs = merged_by_peft(base, a, b, lora_alpha=6)
    ours, report = merged_by_us(base, a, b, lora_alpha=6)
    same_4bit(ours, theirs)
    assert (
        type(ours) is bitsandbytes.nn.Linear4bit and ours.bias is base.bias and ours.quant_state is not base.quant_state
    )
    assert ours.weight.compress_statistics == theirs.weight.compress_statistics and ours.weight.blocksize == 64
    assert torch.equal(base.weight.data, before), "the base is left as it was"
    nibbles = [torch.stack([data.view(-1) >> 4, data.view(-1) & 15]) for data in (before, ours.weight.data)]
    assert report.codes_changed == pytest.approx(float((nibbles[0] != nibbles[1]).double().mean()))


@pytest.mark.parametrize("quant_type, fmt", [("nf4", NF4), ("fp4", FP4)])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_our_layer_of_the_same_format(quant_type, fmt, block_size, dtype, double_quant, adapter_dtype):
    a, b = random_factors(4, SHAPE, 0.004, dtype=adapter_dtype)
    base = four_bit(dtype, quant_type, double_quant, block_size)
    theirs = merged_by_peft(base, a, b, 6, use_rslora=True)
    same_4bit(merged_by_us(base, a, b, 6, use_rslora=True)[0], theirs)
    q = qtensor_of(base)
    assert (type(q.format), q.format.block_size, q.format.double_quant) == (fmt, block_size, double_quant)
    ours, _ = merged_by_us(QuantLinear(q, base.bias), a, b, 6, use_rslora=True)
    state = theirs.weight.quant_state
    codes = torch.stack([theirs.weight.data.view(-1) >> 4, theirs.weight.data.view(-1) & 15], 1).view(SHAPE)
    assert torch.equal(ours.qtensor.codes, codes) and ours.bias is base.bias and ours.dtype == dtype
    if not double_quant:
        assert torch.equal(ours.absmax, state.absmax)
        return
    assert torch.equal(ours.absmax_scale, state.state2.absmax) and torch.equal(ours.absmax_offset, state.offset)
    # Of two levels about as near, bitsandbytes' CPU kernel may take the farther (tests/parity/test_codebook.py).
    apart = (ours.absmax_code.int() - state.absmax.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "after a forward"])
def test_int8(dtype, adapter_dtype, called):
    base = eight_bit(dtype, threshold=5.0)
    x = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(1))
    if called:  # moves the scales of the weight to base.state
        base(x)
    a, b = random_factors(4, SHAPE, 0.002, dtype=adapter_dtype)
    theirs = merged_by_peft(base, a, b, 6, bits=8)
    ours, report = merged_by_us(base, a, b, 6)
    assert torch.equal(ours.weight.data, theirs.weight.data) and torch.equal(ours.weight.SCB, theirs.weight.SCB)
    assert ours.state.CB is None and ours.state.SCB is None, "nothing of the old weight is held"
    assert torch.equal(ours(x), theirs(x)) and ours.state.threshold == 5.0 and ours.bias is base.bias
    assert report.became.endswith("IntAffine(bits=8, symmetric, per channel)") and 0.5 < report.kept < 1.1
    assert base.state is not ours.state and torch.equal(weight_of(base), weight_of(eight_bit(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_float_bases(dtype, adapter_dtype):
    base = nn.Linear(SHAPE[1], SHAPE[0], dtype=dtype)
    a, b = random_factors(4, SHAPE, 0.002, dtype=adapter_dtype)
    theirs = merged_by_peft(base, a, b, 6)
    ours, _ = merged_by_us(base, a, b, 6)
    assert torch.equal(ours.weight, theirs.weight) and ours.bias is base.bias


def fill(model_ours, model_theirs, layers):
    """The same random adapters on both."""
    for seed, (name, ours) in enumerate(layers.items()):
        a, b = random_factors(ours.r, ours.shape, 0.02, seed)
        theirs = model_theirs.base_model.model.get_submodule(name)
        ours.lora_A.data, ours.lora_B.data = a.clone(), b.clone()
        theirs.lora_A.default.weight.data, theirs.lora_B.default.weight.data = a.clone(), b.clone()


def models(architecture):
    torch.manual_seed(0)
    if architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    if architecture == "bert":
        return BertModel(BertConfig(**SIZES)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_whole_float_models(architecture):
    settings = {"r": 3, "lora_alpha": 7, "rank_pattern": {r"\d\..*(c_attn|q_proj|query)": 5}}
    ours, theirs = models(architecture), models(architecture)
    theirs = get_peft_model(theirs, LoraConfig(target_modules="all-linear", **settings))
    added = add_adapters(ours, target_modules="all-linear", **settings).added
    assert {layer.r for layer in added.values()} == {3, 5}
    fill(ours, theirs, added)
    merge(ours, "requantize")
    theirs = theirs.merge_and_unload()
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in ours.state_dict().items())
    assert {name: type(module) for name, module in ours.named_modules()} == {
        name: type(module) for name, module in theirs.named_modules()
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_has_quantized(tmp_path, bits):
    models("llama").save_pretrained(tmp_path)
    if bits == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    ours, theirs = (LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config) for _ in range(2))
    theirs = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]))
    fill(ours, theirs, add_adapters(ours, r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]).added)
    merge(ours, "requantize")
    expected = theirs.merge_and_unload().state_dict()
    assert ours.state_dict().keys() == expected.keys() and ours.config.quantization_config is not None
    assert all(torch.equal(tensor, expected[key]) for key, tensor in ours.state_dict().items())
