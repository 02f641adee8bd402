"""add_adapters: what it wraps, what trains afterwards, what it reports and what it refuses."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qlab.adapters.add import adapters_of, add_adapters, trainable_parameters
from qlab.adapters.lora import LoRALinear
from qlab.adapters.qalora import QALoRALinear
from qlab.formats import NF4, IntAffine
from qlab.models import find_linears, find_tied
from qlab.nn import QuantLinear
from qlab.ptq import quantize_model

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def tiny(name):
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **NO_TOKENS, num_key_value_heads=2))
    if name == "qwen2-tied":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, **NO_TOKENS))
    return (BertForSequenceClassification if name == "bert-classifier" else BertForMaskedLM)(BertConfig(**SIZES))


MODELS = ["llama", "qwen2-tied", "gpt2", "bert-classifier", "bert-mlm"]
GRID = IntAffine(4, symmetric=False, granularity="group", group_size=8, float_zero_point=True)


def ids():
    return torch.arange(12).view(2, 6) % 40


def wrapped_by_peft(model, target_modules, exclude_modules=None):
    config = LoraConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    peft = get_peft_model(copy.deepcopy(model), config).base_model.model
    return {name.removesuffix(".lora_A") for name, _ in peft.named_modules() if name.endswith(".lora_A")}


TARGETS = [
    ("all-linear", None),
    ("ALL-Linear", ["o_proj", "c_attn", "query"]),
    ("all-linear", r".*(mlp|intermediate)\..*"),
    (["q_proj", "v_proj"], None),
    (["0.self_attn.q_proj", "layers.1.mlp.up_proj"], None),
    (["model.layers.1.self_attn.k_proj"], None),
    (["c_attn", "c_proj"], ["0.attn.c_proj"]),
    (["query", "dense"], [r"intermediate.dense"]),
    (["query", "dense"], r".*\.output\.dense"),
    (r".*\.(q_proj|query|c_attn)", None),
    (r".*layers?\.1\..*(key|k_proj|dense|down_proj)", None),
    (r".*1.*_proj", r".*mlp.*"),
    (r".*attn\.c_.*", None),
    (["classifier", "value"], None),
    (["lm_head"], None),
    (["proj"], None),
    ("proj", None),
    (r".*(q_proj|c_attn|query)", r".*\.(q|c_a)"),  # would exclude all if the end of a name were free
    ([], None),
]


@pytest.mark.parametrize("name", MODELS)
def test_targets_are_those_of_peft(name):
    """Where PEFT finds nothing or cannot wrap what it finds, we refuse; where a list has an idle entry, only we do."""
    compared = 0
    for target_modules, exclude_modules in TARGETS:
        model = tiny(name)
        try:
            expected = wrapped_by_peft(model, target_modules, exclude_modules)
        except ValueError:
            expected = set()
        names = [other for other, _ in model.named_modules()]
        idle = not isinstance(target_modules, str) and any(
            not any(other == end or other.endswith("." + end) for other in names) for end in target_modules
        )
        if not expected or idle:
            with pytest.raises(ValueError):
                add_adapters(model, target_modules=target_modules, exclude_modules=exclude_modules or ())
            assert not adapters_of(model)
            continue
        report = add_adapters(model, "lora", 8, 16, target_modules, exclude_modules or (), tied="untie")
        assert set(report.added) == set(adapters_of(model)) == expected, target_modules
        compared += 1
    assert compared >= 4


def test_rank_and_alpha_patterns():
    model = tiny("llama")
    report = add_adapters(
        model,
        r=4,
        lora_alpha=10,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"0.self_attn.q_proj": 2, "q_proj": 3},
        alpha_pattern={r"layers\.\d+\.self_attn\.v_proj": 5},
        use_rslora=True,
    )
    made = {name.removeprefix("model.layers."): (a.r, a.lora_alpha, a.scaling) for name, a in report.added.items()}
    assert made == {
        "0.self_attn.q_proj": (2, 10, 10 / 2**0.5),
        "0.self_attn.v_proj": (4, 5, 5 / 2),
        "1.self_attn.q_proj": (3, 10, 10 / 3**0.5),
        "1.self_attn.v_proj": (4, 5, 5 / 2),
    }


def bytes_of(model):
    return {key: value.clone().view(torch.uint8) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("base", ["float", "nf4", "qalora"])
@pytest.mark.parametrize("name", MODELS)
def test_only_adapters_move(name, base):
    model = tiny(name)
    if base != "float":
        quantize_model(model, NF4(16) if base == "nf4" else GRID, progress=False)
    targets = "all-linear" if base == "float" else [n for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    report = add_adapters(model, "qalora" if base == "qalora" else "lora", target_modules=targets)
    assert len(report.added) >= 8
    before = bytes_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):  # B is 0 at first, and A has no gradient then
        optimizer.zero_grad()
        model(ids()).logits.square().mean().backward()
        optimizer.step()
    moved = {key for key, value in bytes_of(model).items() if not torch.equal(value, before[key])}
    assert moved == {f"{layer}.lora_{part}" for layer in report.added for part in "AB"}
    adapters = [p for a in adapters_of(model).values() for p in (a.lora_A, a.lora_B)]
    assert {id(p) for p in trainable_parameters(model)} == {id(p) for p in adapters}
    assert len(trainable_parameters(model)) == 2 * len(report.added)


@pytest.mark.parametrize("name", MODELS)
def test_counts(name):
    """Frozen numbers do not depend on how they are stored, and tied ones count once."""
    plain = tiny(name)
    numbers = sum(p.numel() for p in plain.parameters())
    report = add_adapters(plain)
    quantized = tiny(name)
    quantize_model(quantized, NF4(16), progress=False)
    over_codes = add_adapters(quantized, target_modules=list(report.added))
    trains = sum(p.numel() for p in trainable_parameters(plain))
    assert (report.trainable, report.frozen) == (trains, numbers) == (over_codes.trainable, over_codes.frozen)


def test_report_in_words():
    model = tiny("gpt2")
    quantize_model(model, NF4(16), progress=False, select=lambda name, _: "c_fc" in name)
    text = str(add_adapters(model, r=4, target_modules=["c_fc", "c_attn"], lora_alpha=2))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "(out,", "in)", "r", "scaling", "trains", "frozen", "base"]
    assert lines[1].split() == "transformer.h.0.attn.c_attn (96, 32) 4 0.5 512 3168 Conv1D".split()
    assert lines[2].split() == "transformer.h.0.mlp.c_fc (128, 32) 4 0.5 640 4224 NF4(block 16)".split()
    numbers = sum(p.numel() for p in tiny("gpt2").parameters())
    assert lines[-1] == f"4 adapters: 2304 numbers train ({2304 / (numbers + 2304):.2%}), {numbers} are frozen"


def test_the_mode_of_the_model_is_kept():
    for training in (True, False):
        model = tiny("llama").train(training)
        add_adapters(model, lora_dropout=0.5)
        assert all(layer.training == training for layer in adapters_of(model).values())
    assert torch.equal(model(ids()).logits, tiny("llama").eval()(ids()).logits)


def test_never_twice():
    model = tiny("llama")
    first = add_adapters(model, target_modules=["q_proj"])
    before = bytes_of(model)
    for again in ("all-linear", ["q_proj"], r".*_proj"):
        with pytest.raises(ValueError, match="2 of .* target layers have an adapter already .*Nothing was changed"):
            add_adapters(model, target_modules=again)
    assert bytes_of(model).keys() == before.keys()
    assert [p.requires_grad for p in model.parameters()].count(True) == 4
    rest = add_adapters(model, "lora", 2, 4, exclude_modules=["q_proj"])
    assert len(rest.added) == 12 and len(trainable_parameters(model)) == 2 * 14
    assert adapters_of(model)["model.layers.0.self_attn.q_proj"] is first.added["model.layers.0.self_attn.q_proj"]
    assert not any(isinstance(layer.base, LoRALinear) for layer in adapters_of(model).values())


def test_an_adapter_put_there_by_hand_counts():
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = LoRALinear(attention.q_proj, 2, 4)
    with pytest.raises(ValueError, match="1 of 14 target layers have an adapter already"):
        add_adapters(model)
    assert len(add_adapters(model, exclude_modules=["0.self_attn.q_proj"]).added) == 13


def test_a_model_of_peft_is_refused():
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter of PEFT's already: merge_and_unload"):
        add_adapters(model)


def test_tied_head():
    model = tiny("qwen2-tied")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="'lm_head' shares its weight with model.embed_tokens.weight.*untie"):
        add_adapters(model, target_modules=["lm_head", "q_proj"])
    assert not adapters_of(model) and {name: p.requires_grad for name, p in model.named_parameters()} == before
    add_adapters(model, target_modules=["lm_head", "q_proj"], tied="untie")
    assert not find_tied(model) and not model.config.tie_word_embeddings
    assert isinstance(model.lm_head, LoRALinear)
    assert not model.get_input_embeddings().weight.requires_grad


class Pair(nn.Module):
    """Two linear layers with one weight, a layer used under two names, and a third on its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.own = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.again = self.own

    def forward(self, x):
        return self.again(self.own(self.two(self.one(x))))


def test_tied_and_shared_layers():
    model = Pair()
    report = add_adapters(model)
    assert set(report.added) == {"own"} and set(report.skipped) == {"one", "two"}
    assert "one" in str(report) and "its weight is tied to two.weight" in str(report)
    assert model.again is model.own and isinstance(model.own, LoRALinear)
    model = Pair()
    assert set(add_adapters(model, tied="untie").added) == {"one", "two", "own"}
    model = Pair()
    del model.own, model.again
    with pytest.raises(ValueError, match="every target is tied to another module"):
        add_adapters(model)
    assert model.one.weight.requires_grad


def test_a_model_that_is_one_layer():
    report = add_adapters(nn.Linear(8, 4), r=2)
    assert isinstance(report.model, LoRALinear) and list(report.added) == [""]
    assert report.trainable == 24 and report.frozen == 36


def test_qalora_settings_reach_the_layers():
    model = tiny("llama")
    quantize_model(model, GRID, progress=False)
    report = add_adapters(model, "qalora", pooling="mean", lora_dropout=0.25, dtype=torch.bfloat16)
    layers = report.added.values()
    assert len(layers) == 14 and all(type(layer) is QALoRALinear for layer in layers)
    assert all((a.pooling, a.lora_dropout, a.lora_A.dtype) == ("mean", 0.25, torch.bfloat16) for a in layers)


@pytest.mark.parametrize("fails", ["format", "rank", "settings"])
def test_refused_settings_change_nothing(fails):
    model = tiny("llama")
    formats = {name: GRID for name in find_linears(model) if name != "lm_head"}
    formats["model.layers.1.mlp.down_proj"] = NF4(16) if fails == "format" else GRID
    quantize_model(model, formats, progress=False)
    model.requires_grad_(True)
    before, modules = bytes_of(model), [type(m) for m in model.modules()]
    wrong = {"format": {}, "rank": {"rank_pattern": {"down_proj": 0}}, "settings": {"pooling": "max"}}
    with pytest.raises(ValueError) as error:
        add_adapters(model, "qalora", **wrong[fails])
    assert "Nothing was changed" in error.value.__notes__[0]
    assert [type(m) for m in model.modules()] == modules and bytes_of(model).keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "arguments, why",
    [
        ({"kind": "dora"}, "kind is one of 'lora', 'qalora', 'qat', got 'dora'"),
        ({"target_modules": ["q_porj"]}, "'q_porj', which ends no module's name. Close: q_proj"),
        ({"target_modules": ["q_proj", "query"]}, "'query', which ends no module's name"),
        ({"target_modules": "q_proj"}, "means no layer .*model.layers.0.self_attn.q_proj"),
        ({"target_modules": "*q_proj"}, "no regular expression: nothing to repeat.*Ends of names are given as a list"),
        ({"target_modules": ["embed_tokens"]}, "means 'model.embed_tokens', of class Embedding"),
        ({"target_modules": r"model\.layers\.0.*"}, "means 'model.layers.0', of class LlamaDecoderLayer"),
        ({"exclude_modules": ".*"}, "means no layer"),
        ({"rank_pattern": {"query": 4}}, "rank_pattern has 'query', which decides for no target"),
        ({"rank_pattern": {".*": 4, "q_proj": 2}}, "rank_pattern has 'q_proj', which decides for no target"),
        ({"alpha_pattern": {"layers.7": 4}}, "alpha_pattern has 'layers.7'"),
        ({"r": 0}, "r is the rank"),
        ({"tied": "copy"}, "untie"),
    ],
)
def test_hostile_input(arguments, why):
    model = tiny("llama")
    with pytest.raises(ValueError, match=why):
        add_adapters(model, **arguments)
    assert not adapters_of(model) and all(p.requires_grad for p in model.parameters())


def test_no_linear_layers():
    with pytest.raises(ValueError, match="the model has no linear layers"):
        add_adapters(nn.Embedding(3, 3))
    with pytest.raises(TypeError, match="QA-LoRA changes the zero points of a QuantLinear, got a Linear"):
        add_adapters(tiny("llama"), "qalora")
    with pytest.raises(TypeError, match="a regular expression or a list of names"):
        add_adapters(tiny("llama"), target_modules=[3])


def test_attention_that_never_calls_its_projection():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert set(add_adapters(model).added) == {"linear1", "linear2"}
    with pytest.raises(
        ValueError, match="NonDynamicallyQuantizableLinear; adapters stand on linear layers that are called"
    ):
        add_adapters(nn.TransformerEncoderLayer(8, 2, 16), target_modules=["out_proj"])
