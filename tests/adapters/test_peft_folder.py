"""PEFT's folders both ways: equal logits over float and quantized bases; what the record says; what is refused."""

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from qlab.adapters import LoRALinear, QALoRALinear, adapters_of, add_adapters
from qlab.adapters.base_record import quantization_of
from qlab.adapters.peft_folder import load_adapter, read_adapter, save_adapter
from qlab.formats import NF4, IntAffine
from qlab.models import replace
from qlab.nn import QuantLinear

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
BASES = [("qwen2", None), ("llama", "nf4"), ("gpt2", None), ("gpt2", "fp4"), ("qwen2-tied", "int8")]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def filled(model, seed=0, **settings):
    for i, layer in enumerate(add_adapters(model, **settings).added.values()):
        g = torch.Generator().manual_seed(seed + i)
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=g).to(layer.lora_B.dtype) * 0.1
    return model.eval()


@pytest.mark.parametrize("architecture,quant", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_one_saved_here_loads_in_peft(architecture, quant, dtype, rslora, checkpoint, opened, ids, tmp_path):
    """Ranks and alphas that differ, every linear layer; Conv1D; biases in the base."""
    model = opened(checkpoint(architecture), quant, dtype)
    before = logits(model, ids)
    patterns = {"rank_pattern": {r"[a-z]*\.0\..*": 5}, "alpha_pattern": {".*c_proj|down_proj": 3}}
    filled(model, r=3, lora_alpha=7, use_rslora=rslora, lora_dropout=0.1, **patterns)
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(opened(checkpoint(architecture), quant, dtype), tmp_path / "adapter").eval()
    assert torch.equal(logits(theirs, ids), logits(model, ids))
    assert not torch.allclose(before, logits(model, ids), atol=1e-2)
    count = sum(name.endswith("lora_A.default") for name, _ in theirs.named_modules())
    assert count == len(adapters_of(model)) > 7


@pytest.mark.parametrize("architecture,quant", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_trained_in_peft_loads_here(architecture, quant, dtype, checkpoint, opened, trained, ids, tmp_path):
    targets = ["c_attn", "mlp.c_proj"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    settings = {"rank_pattern": {targets[0]: 5}, "alpha_pattern": {f"1.*{targets[0]}": 2}, "use_rslora": True}
    theirs = trained(opened(checkpoint(architecture), quant, dtype), targets, **settings)
    theirs.save_pretrained(tmp_path)
    model = opened(checkpoint(architecture), quant, dtype)
    report = load_adapter(model, tmp_path)
    assert torch.equal(logits(model.eval(), ids), logits(theirs, ids))
    assert {layer.r for layer in report.added.values()} == {3, 5} and all(
        type(x) is LoRALinear for x in report.added.values()
    )
    assert {round(layer.scaling * math.sqrt(layer.r), 6) for layer in report.added.values()} == {7, 2}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"{name}.lora_{letter}" for name in report.added for letter in "AB"
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.1\.mlp\.(up|down)_proj", "init_lora_weights": "gaussian"},
    ],
    ids=["exclude_modules", "layers_to_transform", "regular expression"],
)
def test_targets_are_what_the_tensors_say(settings, checkpoint, opened, ids, tmp_path):
    theirs = get_peft_model(opened(checkpoint("qwen2")), LoraConfig(r=2, **settings))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    model = opened(checkpoint("qwen2"))
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model.eval(), ids), logits(theirs.eval(), ids))


def test_there_and_back(checkpoint, opened, ids, tmp_path):
    """Bit for bit, over a QuantLinear base too, which PEFT does not have."""
    model = opened(checkpoint("llama"))
    quantize = {
        "select": lambda name, _: name.endswith("up_proj"),
        "make": lambda _, x: QuantLinear(NF4().quantize(x.weight)),
    }
    replace(model, **quantize)
    filled(model, r=2, lora_alpha=5, target_modules=["up_proj", "o_proj"])
    save_adapter(model, tmp_path)
    again = opened(checkpoint("llama"))
    replace(again, **quantize)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again.eval(), ids), logits(model, ids))
    record = json.loads((tmp_path / "qlab.json").read_text())
    expected = {"format": "nf4", "block_size": 64, "double_quant": False, "dtype": "float32"}
    assert record["quantization"] == expected
    assert record["quantized"] == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    for name in adapters_of(again):
        first, second = model.get_submodule(name), again.get_submodule(name)
        assert torch.equal(first.lora_A, second.lora_A) and torch.equal(first.lora_B, second.lora_B)


def test_use_rslora_that_differs_between_layers(checkpoint, opened, ids, tmp_path):
    model = opened(checkpoint("llama"))
    filled(model, r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=True)
    filled(model, r=4, lora_alpha=6, target_modules=["v_proj"], seed=9)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(opened(checkpoint("llama")), tmp_path)
    assert torch.equal(logits(theirs.eval(), ids), logits(model, ids))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is False


def test_the_base_that_is_recorded_is_asked_for(checkpoint, opened, ids, tmp_path):
    filled(model := opened(checkpoint("llama"), "nf4"), r=2, target_modules=["q_proj"])
    save_adapter(model, tmp_path, base="organization/base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "organization/base"
    for other, message in [
        (opened(checkpoint("llama")), "format='nf4', this one has 'none'"),
        (opened(checkpoint("llama"), "nf4", double_quant=True), "double_quant=False, this one has True"),
        (opened(checkpoint("llama", seed=3), "nf4"), "2 of 2 adapted layers differ"),
    ]:
        before = logits(other, ids)
        with pytest.raises(ValueError, match=f"qlab.json: .*{message}"):
            load_adapter(other, tmp_path)
        assert torch.equal(logits(other, ids), before) and not adapters_of(other)
        load_adapter(other, tmp_path, any_base=True)
        assert len(adapters_of(other)) == 2
    load_adapter(again := opened(checkpoint("llama"), "nf4"), tmp_path)
    assert torch.equal(logits(again.eval(), ids), logits(model, ids))


def test_what_is_recorded_of_mixed_and_other_formats():
    model = nn.ModuleDict({name: nn.Linear(64, 8) for name in ("a", "b", "c")})
    group = IntAffine(4, granularity="group", group_size=32)
    replace(model, ["a"], lambda _, layer: QuantLinear(group.quantize(layer.weight)))
    assert quantization_of(model) == {"format": repr(group), "dtype": "float32"}
    replace(model, ["b"], lambda _, layer: QuantLinear(NF4().quantize(layer.weight)))
    assert quantization_of(model)["format"].startswith("mixed: ") and "nf4" in quantization_of(model)["format"]


def test_what_cannot_be_saved(checkpoint, opened, tmp_path):
    model = opened(checkpoint("llama"))
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(model, tmp_path / "a")
    filled(model, r=2, target_modules=["q_proj"])
    filled(model, r=2, target_modules=["v_proj"], lora_dropout=0.5)
    with pytest.raises(ValueError, match="one lora_dropout"):
        save_adapter(model, tmp_path / "a")
    next(iter(adapters_of(model).values())).lora_A.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="q_proj' holds NaN or Inf"):
        save_adapter(model, tmp_path / "a")
    fmt = IntAffine(4, symmetric=False, granularity="group", group_size=16, float_zero_point=True)
    qalora = nn.Sequential(QALoRALinear(QuantLinear(fmt.quantize(torch.randn(8, 32))), r=2, lora_alpha=4))
    with pytest.raises(TypeError, match="QALoRALinear, which PEFT's format cannot hold"):
        save_adapter(qalora, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def variant(folder, model, **settings):
    """A folder that PEFT has saved with these settings."""
    get_peft_model(model, LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | settings))).save_pretrained(folder)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'."),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "an adapter of an embedding|a whole tensor"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
@pytest.mark.filterwarnings("ignore")
def test_peft_folders_that_are_more_than_lora_are_refused(settings, message, checkpoint, opened, ids, tmp_path):
    variant(tmp_path, opened(checkpoint("llama")), **settings)
    model = opened(checkpoint("llama"))
    before = logits(model, ids)
    with pytest.raises(ValueError, match=f"adapter_.*({message})"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model, ids), before) and not adapters_of(model)


def test_a_model_that_does_not_fit(checkpoint, opened, peft_adapter, tmp_path):
    folder = peft_adapter("llama")
    with pytest.raises(
        ValueError, match=r"for a weight \(out, in\) = \(64, 128\), and that of the base is \(64, 192\)"
    ):
        load_adapter(opened(checkpoint("llama", intermediate_size=192)), folder)
    with pytest.raises(ValueError, match="has an adapter for 'model.layers.0.mlp.down_proj', and the base has no such"):
        load_adapter(opened(checkpoint("gpt2")), folder)
    other = shutil.copytree(folder, tmp_path / "pickled")
    torch.save(load_file(other / "adapter_model.safetensors"), other / "adapter_model.bin")
    (other / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.bin is a pickle"):
        read_adapter(other)
