"""Quantized folders: written and opened again with every bit, and refused where anything about them is not as it was."""

import copy
import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlab.adapters import add_adapters, bitfit, fold_biases, merge
from qlab.formats import FP4, NF4, FloatCast, IntAffine, KMeans, Ternary
from qlab.models import find_linears, find_tied, load, open_quantized, quantized, replace, save_quantized, untie
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq import quantize_model

GROUPS = IntAffine(4, symmetric=False, granularity="group", group_size=16, float_zero_point=True)
FORMATS = [GROUPS, IntAffine(3), NF4(32), NF4(16, double_quant=True), FP4(), FloatCast("bf16"), Ternary(), KMeans(2)]
WRITTEN = ("dtype", "architectures", "_name_or_path")  # of a config, by saving or loading
ARCHITECTURES = ("llama", "qwen2", "qwen2-tied", "gpt2", "bert", "bert-mlm")


@pytest.fixture
def small(tiny):
    """small(architecture, fmt) → a quantized model with biases that are not 0."""

    def make(architecture="llama", fmt=GROUPS, **settings):
        model = tiny(architecture)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        quantize_model(model, fmt, progress=False, **settings)
        return model

    return make


def same_state(model, other):
    one, two = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, other))
    return one.keys() == two.keys() and all(
        torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype and not two[name].is_meta
        for name in one
    )


def outputs(model, ids):
    with torch.no_grad():
        return model(ids)[0]


def resign(folder, changed):
    """As if the folder had been written so: its checksums are made anew."""
    names = [path.name for path in folder.iterdir() if path.name != "SHA256SUMS"]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    assert changed in names


def edit(folder, change, name=quantized.RECORD):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    resign(folder, name)


# --- the same again


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_comes_back_bit_for_bit(small, tmp_path, tokenizer, ids, architecture):
    model = small(architecture)
    assert save_quantized(model, tmp_path / "q", tokenizer) == tmp_path / "q"
    for again in (open_quantized(tmp_path / "q"), load(tmp_path / "q")[0]):
        assert type(again) is type(model) and not again.training
        assert same_state(model, again) and torch.equal(outputs(again, ids), outputs(model, ids))
        assert find_tied(again) == find_tied(model) and repr(again) == repr(model)
        settings = [m.config.to_dict() for m in (again, model)]
        assert all(value == settings[1][key] for key, value in settings[0].items() if key not in WRITTEN)
    if architecture == "llama":
        assert load(tmp_path / "q")[1]("w1 w2").input_ids == [2, 3]
    assert sorted(os.listdir(tmp_path)) == ["q"]


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_every_format_comes_back_bit_for_bit(small, tmp_path, ids, fmt):
    model = small("llama", fmt)
    save_quantized(model, tmp_path / "q")
    again = open_quantized(tmp_path / "q")
    assert same_state(model, again) and torch.equal(outputs(again, ids), outputs(model, ids))
    assert {n: m.config() for n, m in again.named_modules() if isinstance(m, QuantLinear)} == {
        n: m.config() for n, m in model.named_modules() if isinstance(m, QuantLinear)
    }


def test_layers_with_every_part_and_of_mixed_formats(tiny, tmp_path, ids):
    model = tiny("qwen2").bfloat16()
    g_idx = torch.arange(32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))] // 16
    static = ActQuant(symmetric=False, granularity="tensor", static=True).freeze(-3, 3)

    def make(name, layer):
        if name.endswith("down_proj"):
            return QuantLinear.from_linear(layer, NF4(), ActQuant(threshold=2.0))
        parts = {"g_idx": g_idx, "act_quant": copy.deepcopy(static), "input_scale": torch.rand(32) + 0.5}
        return QuantLinear(GROUPS.quantize(layer.weight.detach()), layer.bias, **parts)

    replace(model, [name for name in find_linears(model) if not name.endswith(("lm_head", "gate_proj"))], make)
    save_quantized(model, tmp_path / "q")
    again = open_quantized(tmp_path / "q")
    assert same_state(model, again) and torch.equal(outputs(again, ids), outputs(model, ids))
    assert again.dtype == again.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    in_float32 = open_quantized(tmp_path / "q", dtype=torch.float32)
    assert in_float32.dtype == torch.float32 and outputs(in_float32, ids).dtype == torch.float32
    for name, buffer in in_float32.named_buffers():
        assert torch.equal(buffer, again.get_buffer(name))


def test_a_head_of_its_own_can_be_quantized_and_a_pooler_can_be_missing(tiny, tmp_path, ids):
    model = tiny("qwen2-tied")
    untie(model, "lm_head")
    quantize_model(model, IntAffine(8), select=lambda name, _: True, progress=False)
    save_quantized(model, tmp_path / "q")
    again = open_quantized(tmp_path / "q")
    assert isinstance(again.lm_head, QuantLinear) and not again.config.tie_word_embeddings
    assert same_state(model, again) and torch.equal(outputs(again, ids), outputs(model, ids))
    encoder = tiny("bert")
    encoder.pooler = None
    quantize_model(encoder, GROUPS, progress=False)
    save_quantized(encoder, tmp_path / "e")
    assert open_quantized(tmp_path / "e").pooler is None


def test_tied_embeddings_are_written_once_and_stay_one(small, tmp_path):
    save_quantized(small("qwen2-tied"), tmp_path / "q")
    again = open_quantized(tmp_path / "q")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "q" / "model.safetensors")


def test_the_shipped_model_in_4_bits(tmp_path):
    model, tokenizer = load("qlab-mini")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    report = quantize_model(model, NF4(double_quant=True), progress=False)
    save_quantized(model, tmp_path / "q", tokenizer)
    again, tokenizer = load(tmp_path / "q")
    written = tokenizer.decode(again.generate(**prompt, max_new_tokens=5)[0])
    assert written == tokenizer.decode(model.generate(**prompt, max_new_tokens=5)[0])
    # The file: a header, what `bits_per_weight` counts, and what is not quantized, in its own dtype.
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    codes = sum(m.qtensor.nbytes for m in layers.values())
    assert codes == report.nbytes and report.bits_per_weight < 4.14
    rest = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    rest = sum(rest.values()) - sum(b.nbytes for m in layers.values() for b in m.buffers())
    path = tmp_path / "q" / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + codes + rest


def test_merged_and_folded_models_can_be_saved(tiny, tmp_path, ids):
    model = tiny("qwen2")
    quantize_model(model, GROUPS, progress=False)
    add_adapters(model, "qalora", 2, 4)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    merge(model, "zero-points")
    report = bitfit(model, new_biases=True)
    for bias in report.trained.values():
        nn.init.normal_(bias)
    fold_biases(model)  # some of them where the config has none
    save_quantized(model, tmp_path / "q")
    assert torch.equal(outputs(open_quantized(tmp_path / "q"), ids), outputs(model, ids))


# --- refused when writing


def test_what_cannot_be_written(small, tiny, tmp_path):
    def refused(model, error, message):
        with pytest.raises(error, match=message):
            save_quantized(model, tmp_path / "q")
        assert os.listdir(tmp_path) == []

    refused(nn.Sequential(small()), TypeError, "transformers models.*not a Sequential")
    refused(tiny("llama"), ValueError, "has no QuantLinear: quantize it first")
    adapted, biased, nested = small(), small("qwen2"), small()
    add_adapters(adapted)
    refused(adapted, ValueError, "q_proj' is a LoRALinear.*merge or fold first")
    bitfit(biased, new_biases=True)
    refused(biased, ValueError, "is a BiasLinear.*merge or fold first")
    nested.model.norm = nn.Sequential(nested.model.norm)
    refused(nested, ValueError, "do not fit the model's config")

    class Other(LlamaForCausalLM):
        pass

    other = Other(small().config)
    quantize_model(other, GROUPS, progress=False)
    refused(other, ValueError, "class 'Other'")


@pytest.mark.parametrize("kind", ["file", "folder", "no parent"])
def test_places_that_are_taken(small, tmp_path, kind):
    out = tmp_path / "q"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        out = tmp_path / "no" / "q"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        FileNotFoundError if kind == "no parent" else FileExistsError, match="is no folder|not an empty"
    ):
        save_quantized(small(), out)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    assert open_quantized(save_quantized(small(), tmp_path / "empty"))


@pytest.mark.parametrize("step", ["save_file", "_dump", "sha256"])
def test_a_failure_on_the_way_leaves_nothing_behind(small, tmp_path, monkeypatch, step):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantized, step, fail)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(small(), tmp_path / "q")
    assert os.listdir(tmp_path) == []


# --- refused when reading


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", quantized.RECORD, "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damaged_files_are_refused_by_name(small, tmp_path, tokenizer, name, damage):
    folder = save_quantized(small(), tmp_path / "q", tokenizer)
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    else:
        flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        (folder / name).write_bytes(content[:-1] if damage == "truncated" else flipped)
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        open_quantized(folder)
    with pytest.raises((ValueError, FileNotFoundError)):
        load(folder)


def test_unlisted_files_and_missing_sums(small, tmp_path):
    folder = save_quantized(small(), tmp_path / "q")
    (folder / "extra.json").write_text("{}")
    with pytest.raises(ValueError, match="extra.json: not listed"):
        open_quantized(folder)
    (folder / "extra.json").unlink()
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="SHA256SUMS is missing"):
        open_quantized(folder)
    with pytest.raises(FileNotFoundError, match="was not written by save_quantized"):
        open_quantized(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load(save_quantized(small(), tmp_path / "other"))


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["layers"][LAYER]["format"].update(type="NF5"), "no format is named 'NF5'"),
        (lambda r: r["layers"][LAYER]["format"].update(type="QTensor"), "no format is named 'QTensor'"),
        (lambda r: r["layers"][LAYER]["format"].update(rows=3), "the config has rows too"),
        (lambda r: r["layers"][LAYER].update(shape=[64, 16]), "has a weight|says .*64, 16|packed|codes"),
        (lambda r: r["layers"][LAYER].pop("format"), "not as save_quantized writes it: KeyError"),
        (lambda r: r["layers"].pop(LAYER), "up_proj"),
        (lambda r: r["layers"].update({"model.layers.9.mlp.up_proj": r["layers"][LAYER]}), "layers.9.mlp.up_proj"),
        (lambda r: r["layers"][LAYER]["tensors"].pop("scale"), "scale is .*, not there"),
        (lambda r: r.update({"class": "OrderedDict"}), "class 'OrderedDict', which transformers"),
        (
            lambda r: r.update({"class": "GPT2LMHeadModel"}),
            "not as save_quantized writes it: AttributeError.*LlamaConfig",
        ),
        (lambda r: r.update(version=99), "of version 99, and this qlab reads version 1"),
        (lambda r: r.pop("same"), "lacks same"),
        (lambda r: r.update(dtype="float33"), "'float33' is not the name of a torch dtype"),
        (
            lambda r: r["same"].update({"lm_head.weight": "nowhere"}),
            "not as save_quantized writes it: KeyError.*nowhere",
        ),
        (lambda r: r.update(removed=["model.nothing.there"]), "not as save_quantized writes it|nothing"),
    ],
)
def test_records_that_do_not_fit(small, tmp_path, change, message):
    folder = save_quantized(small(), tmp_path / "q")
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        open_quantized(folder)


def test_configs_and_weights_that_do_not_fit(small, tmp_path):
    folder = save_quantized(small(), tmp_path / "q")
    tensors = load_file(folder / "model.safetensors")
    for change, message in (
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is not in model.safetensors"),
        (lambda t: t.update(extra=torch.ones(2)), "extra is in model.safetensors and not in the model"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model.norm.weight is \(31,\).*\(32,\) by the model",
        ),
        (lambda t: t.pop(f"{LAYER}.scale"), "scale is missing"),
        (lambda t: t.update({f"{LAYER}.packed": t[f"{LAYER}.packed"][:-1].clone()}), "packed is"),
    ):
        other = dict(tensors)
        change(other)
        save_file(other, folder / "model.safetensors")
        resign(folder, "model.safetensors")
        with pytest.raises(ValueError, match=message):
            open_quantized(folder)
    save_file(tensors, folder / "model.safetensors")
    edit(folder, lambda config: config.update(hidden_size=16), "config.json")
    with pytest.raises(ValueError, match="by the model's config|and the config of the model"):
        open_quantized(folder)


def test_transformers_refuses_the_folder(small, tmp_path, tokenizer):
    folder = save_quantized(small(), tmp_path / "q", tokenizer)
    with pytest.raises(ValueError, match="qlab_quantized"):  # it would fill the layers with random numbers
        AutoModelForCausalLM.from_pretrained(folder)
