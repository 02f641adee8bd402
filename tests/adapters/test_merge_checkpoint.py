"""qlab merge against PEFT on the same files; every bad input; killed and full in the middle of a write."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlab.adapters import add_adapters, dequantize_model, merge
from qlab.adapters.merge_checkpoint import merge_checkpoint
from qlab.adapters.peft_folder import load_adapter, save_adapter
from qlab.nn import weight_of
from qlab.nn.weights import bitsandbytes_kind

merging = importlib.import_module(
    "qlab.adapters.merge_checkpoint"
)  # the module, also where the package exports its function
pytestmark = pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:fan_in_fan_out")
ARCHITECTURES = [("llama", False), ("qwen2", True), ("qwen2-tied", True), ("gpt2", False), ("gpt2", True)]


def tensors_of(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def quiet(*arguments, **settings):
    """merge_checkpoint, and the lines that it logged."""
    lines = []
    merge_checkpoint(*arguments, log=lines.append, **settings)
    return "\n".join(lines)


def equal(found, expected):
    assert found.keys() == expected.keys()
    assert not [
        key for key in found if found[key].dtype != expected[key].dtype or not torch.equal(found[key], expected[key])
    ]


def same(ours, theirs, exact):
    """The state of two quantized models. With double quantization bitsandbytes' CPU kernel chooses a few of the 8-bit scale
    codes otherwise: then the weights have to agree to 1 in 100."""
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    states = [key for key in expected if "quant_state" in key]
    if exact:
        equal(*({key: t for key, t in state.items() if key not in states} for state in (found, expected)))
        assert all(
            json.loads(bytes(found[key].tolist())) == json.loads(bytes(expected[key].tolist())) for key in states
        )
        return
    layers = {name: module for name, module in ours.named_modules() if bitsandbytes_kind(module)}
    for name, module in layers.items():
        other = weight_of(theirs.get_submodule(name))
        assert (weight_of(module) - other).norm() < 1e-2 * other.norm()
    inside = tuple(f"{name}.weight" for name in layers)
    equal(*({key: t for key, t in state.items() if not key.startswith(inside)} for state in (found, expected)))


def apart(model, reference, ids):
    with torch.no_grad():
        found, expected = model(ids).logits.float(), reference(ids).logits.float()
    return float((found - expected).norm() / expected.norm())


# The three merges against PEFT


@pytest.mark.parametrize("architecture,sharded", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_original_is_peft_on_the_float_base(architecture, sharded, dtype, checkpoint, peft_adapter, opened, tmp_path):
    base, adapter = checkpoint(architecture, sharded, dtype=dtype), peft_adapter(architecture)
    text = quiet(base, adapter, tmp_path / "out", "original")
    theirs = PeftModel.from_pretrained(opened(base, dtype=dtype), adapter).merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "theirs"))
    equal(opened(tmp_path / "out", dtype=dtype).state_dict(), theirs.state_dict())
    assert "verified" in text and (tmp_path / "out" / "tokenizer.json").exists()
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == sorted(
        p.name for p in base.glob("model*")
    )


@pytest.mark.parametrize("architecture,sharded", ARCHITECTURES)
def test_dequantize_computes_what_was_trained(architecture, sharded, checkpoint, peft_adapter, opened, ids, tmp_path):
    base, adapter = checkpoint(architecture, sharded), peft_adapter(architecture)
    quiet(base, adapter, tmp_path / "out", "dequantize", base_quant="nf4", verify="model")
    trained = PeftModel.from_pretrained(opened(base, "nf4"), adapter).eval()
    merged = opened(tmp_path / "out")
    assert apart(merged, trained, ids) < 2e-6
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    # The layers without an adapter count: with theirs in full precision it is another model.
    assert apart(merged, PeftModel.from_pretrained(opened(base), adapter).eval(), ids) > 0.01


@pytest.mark.parametrize("quant,double_quant", [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_requantize_is_peft_on_bitsandbytes(
    architecture, quant, double_quant, checkpoint, peft_adapter, opened, ids, tmp_path
):
    base, adapter = checkpoint(architecture), peft_adapter(architecture)
    settings = {"double_quant": True} if double_quant else {}
    quiet(base, adapter, tmp_path / "out", "requantize", base_quant=quant, **settings)
    theirs = PeftModel.from_pretrained(opened(base, quant, double_quant=double_quant), adapter).merge_and_unload()
    ours = opened(tmp_path / "out")
    same(ours, theirs, exact=not double_quant)
    assert apart(ours, theirs.eval(), ids) <= (1e-2 if double_quant else 0)
    assert ours.config.quantization_config.quant_method == "bitsandbytes"


def test_a_base_that_was_loaded_in_another_dtype(checkpoint, peft_adapter, opened, ids, tmp_path):
    base, adapter = checkpoint("qwen2"), peft_adapter("qwen2")
    quiet(
        base,
        adapter,
        tmp_path / "out",
        base_quant="nf4",
        base_dtype=torch.bfloat16,
        dtype=torch.float32,
        verify="model",
    )
    in_memory = opened(base, "nf4", torch.bfloat16)
    load_adapter(in_memory, adapter)
    merge(in_memory, "dequantize", dtype=torch.float32)
    expected = dequantize_model(in_memory, torch.float32).float().state_dict()
    found = opened(tmp_path / "out").state_dict()
    layers = [key for key in found if key.endswith("proj.weight")]
    assert len(layers) == 14 and all(torch.equal(found[key], expected[key]) for key in layers)
    assert torch.equal(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("quant,double_quant", [("nf4", True), ("fp4", False), ("int8", False)])
def test_a_base_that_is_quantized_on_disk(quant, double_quant, checkpoint, peft_adapter, opened, tmp_path):
    base, adapter = checkpoint("qwen2-tied", True), peft_adapter("qwen2-tied")
    shutil.copytree(base, tmp_path / "stored", ignore=shutil.ignore_patterns("model*", "config.json"))
    opened(base, quant, double_quant=double_quant).save_pretrained(tmp_path / "stored", max_shard_size="60KB")
    for how in ("dequantize", "requantize"):
        text = quiet(tmp_path / "stored", adapter, tmp_path / how, how, base_dtype=torch.float32, verify="model")
        assert "linear layers on disk" in text and "verified logits" in text
    in_memory = opened(tmp_path / "stored")
    load_adapter(in_memory, adapter)
    merge(in_memory, "dequantize")
    expected = dequantize_model(in_memory, torch.float32).state_dict()
    found = opened(tmp_path / "dequantize").state_dict()
    assert found.keys() == expected.keys()
    # bitsandbytes divides by 127 before it multiplies, we after.
    assert all(torch.allclose(found[key], expected[key], rtol=0, atol=1e-7 if quant == "int8" else 0) for key in found)
    theirs = PeftModel.from_pretrained(opened(tmp_path / "stored"), adapter).merge_and_unload()
    same(opened(tmp_path / "requantize"), theirs, exact=not double_quant)
    with pytest.raises(ValueError, match="quantized on disk"):
        merge_checkpoint(tmp_path / "stored", adapter, tmp_path / "c", "original")
    with pytest.raises(ValueError, match="says format"):
        merge_checkpoint(tmp_path / "stored", adapter, tmp_path / "c", base_quant="fp4" if quant == "nf4" else "nf4")


def test_names_without_the_prefix_of_the_model(checkpoint, peft_adapter, opened, tmp_path):
    """As in GPT-2's own checkpoint: `h.0.attn.c_attn.weight`, where the model says `transformer.h.0…`."""
    base, adapter = checkpoint("gpt2"), peft_adapter("gpt2")
    short = shutil.copytree(base, tmp_path / "short")
    renamed = {key.removeprefix("transformer."): t for key, t in load_file(base / "model.safetensors").items()}
    save_file(renamed, short / "model.safetensors", metadata={"format": "pt"})
    for folder, out in ((base, "a"), (short, "b")):
        quiet(folder, adapter, tmp_path / out, base_quant="nf4")
    equal(opened(tmp_path / "b").state_dict(), opened(tmp_path / "a").state_dict())


def test_ranks_alphas_and_rslora(checkpoint, peft_adapter, opened, tmp_path):
    adapter = peft_adapter(
        "llama", use_rslora=True, rank_pattern={"q_proj": 5}, alpha_pattern={"layers.1.mlp.down_proj": 2}
    )
    quiet(checkpoint("llama"), adapter, tmp_path / "out", "original")
    theirs = PeftModel.from_pretrained(opened(checkpoint("llama")), adapter).merge_and_unload()
    equal(opened(tmp_path / "out").state_dict(), theirs.state_dict())


def test_the_dtype_of_the_result(checkpoint, peft_adapter, opened, tmp_path):
    base, adapter = checkpoint("llama"), peft_adapter("llama")
    quiet(base, adapter, tmp_path / "out", "original", dtype=torch.bfloat16)
    quiet(base, adapter, tmp_path / "wide", "original")
    wide = opened(tmp_path / "wide").state_dict()
    equal(tensors_of(tmp_path / "out"), {key: tensor.bfloat16() for key, tensor in wide.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


# What it says before it writes


def test_dry_run_writes_nothing(checkpoint, peft_adapter, tmp_path):
    text = quiet(checkpoint("llama"), peft_adapter("llama"), tmp_path / "out", base_quant="nf4", dry_run=True)
    assert "NF4(block 64), 14 of 15 linear layers" in text and "nothing was written" in text and "q_proj" in text
    assert not list(tmp_path.iterdir())


def test_it_warns_where_requantizing_erases(checkpoint, peft_adapter, tmp_path):
    base, small, large = checkpoint("llama"), peft_adapter("llama", size=0.005), peft_adapter("llama", size=0.2)
    for adapter, how, warned in [
        (small, "requantize", "re-quantizing would erase"),
        (small, "original", "farther from the quantized one"),
        (small, "dequantize", None),
        (large, "requantize", None),
    ]:
        text = quiet(base, adapter, tmp_path / "out", how, base_quant="nf4", dry_run=True)
        assert ("WARNING" in text) == bool(warned) and (warned or "") in text
    text = quiet(
        base, peft_adapter("llama", size=0.001), tmp_path / "out", "original", dtype=torch.bfloat16, dry_run=True
    )
    assert "below the rounding" in text
    assert "never trained" in quiet(base, peft_adapter("llama", size=0), tmp_path / "out", "original")


# What a verification is for


def test_the_verification_can_fail(checkpoint, peft_adapter, tmp_path, monkeypatch):
    base, adapter = checkpoint("gpt2", True), peft_adapter("gpt2")
    real, write = merging._added, merging.ShardWriter.write
    cases = {
        "_added": lambda w_hat, a, b, scaling, dtype: real(w_hat, a, b, scaling / 2, dtype),
        "trained_on": lambda plan, layer: torch.zeros(layer.shape),
    }
    with monkeypatch.context() as patch:
        patch.setattr(merging, "_added", cases["_added"])
        with pytest.raises(RuntimeError, match="computes something else than base and adapter"):
            merge_checkpoint(base, adapter, tmp_path / "out", base_quant="nf4")
        quiet(base, adapter, tmp_path / "unseen", base_quant="nf4", verify="none")
    with monkeypatch.context() as patch:
        patch.setattr(merging, "trained_on", cases["trained_on"])
        with pytest.raises(RuntimeError, match="logits differ"):
            merge_checkpoint(base, adapter, tmp_path / "out", base_quant="nf4", verify="model")

    def damaged(writer, name, tensor):
        write(writer, name, tensor)
        writer._write(writer.entries[name].start, b"\0\0\0\1")

    monkeypatch.setattr(merging.ShardWriter, "write", damaged)
    with pytest.raises(RuntimeError, match="is not what was written"):
        merge_checkpoint(base, adapter, tmp_path / "out", base_quant="nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["unseen"]


# Our own record of the base


@pytest.mark.parametrize("quant,double_quant", [("nf4", True), ("int8", False), (None, False)])
def test_the_record_decides(quant, double_quant, checkpoint, opened, ids, tmp_path):
    base = checkpoint("gpt2")
    model = opened(base, quant, double_quant=double_quant)
    report = add_adapters(model, r=3, lora_alpha=7, target_modules=["c_attn", "mlp.c_proj"])
    for seed, layer in enumerate(report.added.values()):
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
    save_adapter(model, tmp_path / "adapter", base="the base")
    text = quiet(base, tmp_path / "adapter", tmp_path / "out")
    assert "as qlab.json says" in text
    said = {"base_quant": quant or "none"} | ({"double_quant": True} if double_quant else {})
    quiet(base, tmp_path / "adapter", tmp_path / "said", **said)
    equal(opened(tmp_path / "out").state_dict(), opened(tmp_path / "said").state_dict())
    if quant != "int8":  # whose activations are rounded too
        assert apart(opened(tmp_path / "out"), model, ids) < (1e-3 if double_quant else 2e-6)
    for wrong in [{"base_quant": "fp4"}, {"base_dtype": torch.bfloat16}, {"skip_modules": ["lm_head"]}] + (
        [{"base_quant": "nf4", "block_size": 128}] if quant == "nf4" else []
    ):
        with pytest.raises(ValueError, match="qlab.json"):
            merge_checkpoint(base, tmp_path / "adapter", tmp_path / "no", **wrong)
    with pytest.raises(ValueError, match="not the one that the adapter was trained on"):
        merge_checkpoint(checkpoint("gpt2", seed=5), tmp_path / "adapter", tmp_path / "no")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="adapter_model.safetensors has SHA-256"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "no")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out", "said"]


# Bad input


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(folder, function):
    path = folder / "adapter_model.safetensors"
    save_file(function(load_file(path)), path, metadata={"format": "pt"})


def with_nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def moved(tensors):
    return {key.replace("q_proj", "qq_proj"): tensor for key, tensor in tensors.items()}


def extra(key):
    return lambda tensors: tensors | {key: torch.zeros(3)}


ADAPTER, BASE = "adapter_model.safetensors", "model-00002-of"
BAD = {
    "truncated adapter": (lambda b, a: cut(a / ADAPTER), f"{ADAPTER} is cut off"),
    "cut header": (lambda b, a: cut(a / ADAPTER, 0.01), f"{ADAPTER} is cut off"),
    "no safetensors": (lambda b, a: (a / ADAPTER).write_bytes(b"\x08" + b"\0" * 7 + b"not json"), f"{ADAPTER} is no safe"),
    "header of a list": (lambda b, a: (a / ADAPTER).write_bytes(b"\x08" + b"\0" * 7 + b"[1, 2]  "), f"{ADAPTER} is no safe"),
    "broken pattern": (lambda b, a: change(a, rank_pattern={"(": 3}), "rank_pattern=.* regular expressions"),
    "empty adapter": (lambda b, a: change_tensors(a, lambda t: {}), f"{ADAPTER} holds no tensors"),
    "one factor": (lambda b, a: change_tensors(a, lambda t: dict(list(t.items())[1:])), "other factor is missing"),
    "NaN": (lambda b, a: change_tensors(a, with_nan), f"{ADAPTER}: lora_A of .* holds NaN"),
    "another rank": (lambda b, a: change(a, r=4), f"{ADAPTER}: .* has rank 3, and adapter_config.json says 4"),
    "missing target": (lambda b, a: change_tensors(a, moved), f"{ADAPTER} has an adapter for .*qq_proj"),
    "no weights": (lambda b, a: (a / ADAPTER).unlink(), f"has no {ADAPTER}"),
    "no config": (lambda b, a: (a / "adapter_config.json").unlink(), "no adapter_config.json"),
    "broken config": (lambda b, a: cut(a / "adapter_config.json"), "adapter_config.json cannot be read as JSON"),
    "LoHa": (lambda b, a: change(a, peft_type="LOHA"), "adapter_config.json: peft_type is 'LOHA'"),
    "IA3": (lambda b, a: change(a, peft_type="IA3"), "adapter_config.json: peft_type is 'IA3'"),
    "DoRA": (lambda b, a: change(a, use_dora=True), "use_dora=True is not supported: DoRA"),
    "lora_bias": (lambda b, a: change(a, lora_bias=True), "lora_bias=True is not supported"),
    "bias": (lambda b, a: change(a, bias="lora_only"), "bias='lora_only' is not supported"),
    "modules_to_save": (lambda b, a: change(a, modules_to_save=["lm_head"]), "modules_to_save=.* is not supported"),
    "tokens": (lambda b, a: change(a, trainable_token_indices=[1]), "trainable_token_indices=.* is not supported"),
    "parameters": (lambda b, a: change(a, target_parameters=["w"]), "target_parameters=.* is not supported"),
    "PiSSA": (lambda b, a: change(a, init_lora_weights="pissa_niter_4"), "a base that PEFT had changed first"),
    "newer PEFT": (lambda b, a: change(a, use_magic=True), "use_magic=True is not known here"),
    "embedding": (
        lambda b, a: change_tensors(a, extra("base_model.model.model.embed_tokens.lora_embedding_A")),
        "an adapter of an embedding",
    ),
    "magnitudes": (
        lambda b, a: change_tensors(a, extra("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector.weight")),
        "a magnitude vector of DoRA",
    ),
    "whole module": (
        lambda b, a: change_tensors(a, extra("base_model.model.lm_head.weight")),
        "a whole tensor that was trained or saved",
    ),
    "truncated base": (lambda b, a: cut(next(b.glob(BASE + "*"))), "model-00002.*cut off"),
    "missing shard": (lambda b, a: next(b.glob(BASE + "*")).unlink(), "lacks 1 of .* weight files: model-00002"),
    "other shard": (
        lambda b, a: shutil.copy(next(b.glob("model-00003*")), next(b.glob(BASE + "*"))),
        "index.json does not fit its files",
    ),
    "other config": (
        lambda b, a: (b / "config.json").write_text((b / "config.json").read_text().replace("128", "192")),
        "config.json means a float weight",
    ),
    "unknown model": (
        lambda b, a: (b / "config.json").write_text(json.dumps({"model_type": "no such"})),
        "config.json .* is no causal LM",
    ),
    "GPTQ base": (
        lambda b, a: (b / "config.json").write_text(
            json.dumps(json.loads((b / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}})
        ),
        "quantized by 'gptq'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name_and_leaves_nothing(case, checkpoint, peft_adapter, tmp_path):
    base = shutil.copytree(checkpoint("qwen2", True), tmp_path / "base")
    adapter = shutil.copytree(peft_adapter("qwen2"), tmp_path / "adapter")
    spoil, message = BAD[case]
    spoil(base, adapter)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge_checkpoint(base, adapter, tmp_path / "out", base_quant=None if case == "GPTQ base" else "nf4", log=str)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_bad_settings(checkpoint, peft_adapter, opened, trained, tmp_path, tmp_path_factory):
    base, adapter = checkpoint("llama"), peft_adapter("llama")
    for settings, message in [
        ({"how": "add"}, "how is one of"),
        ({"how": "requantize"}, "requantize quantizes as the base was"),
        ({"base_quant": "nf3"}, "nf4, fp4 or int8, got 'nf3'"),
        ({"base_quant": "nf4", "block_size": 48}, "not of 48"),
        ({"base_quant": "int8", "block_size": 64}, "about nf4 and fp4"),
        ({"double_quant": True}, "need base_quant"),
        ({"dtype": torch.int8}, "dtype is a floating-point"),
        ({"verify": "some"}, "verify is one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            merge_checkpoint(base, adapter, tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="for a weight .* is an adapter for another base"):
        merge_checkpoint(checkpoint("llama", intermediate_size=192), adapter, tmp_path / "out")
    tied = trained(opened(checkpoint("qwen2-tied")), ["lm_head", "q_proj"])
    folder = tmp_path_factory.mktemp("tied")
    tied.save_pretrained(folder, save_embedding_layers=False)
    with pytest.raises(ValueError, match="'lm_head' stands on a weight that is tied"):
        merge_checkpoint(checkpoint("qwen2-tied"), folder, tmp_path / "out")
    untied = trained(opened(checkpoint("qwen2")), ["lm_head", "q_proj"])
    untied.save_pretrained(own := tmp_path_factory.mktemp("untied"), save_embedding_layers=False)
    quiet(checkpoint("qwen2"), own, done := tmp_path_factory.mktemp("done"), base_quant="nf4", verify="model")
    assert (opened(done).lm_head.weight - opened(checkpoint("qwen2")).lm_head.weight).norm() > 0.1
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="taken exists"):
        merge_checkpoint(base, adapter, tmp_path / "taken")
    with pytest.raises(FileNotFoundError, match="make it first"):
        merge_checkpoint(base, adapter, tmp_path / "nowhere" / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine"]


def test_an_inf_in_the_base_and_a_dtype_too_narrow(checkpoint, peft_adapter, tmp_path):
    base, adapter = shutil.copytree(checkpoint("llama"), tmp_path / "base"), peft_adapter("llama")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj.weight holds NaN or Inf in torch.float16"):
        merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.float16, log=str)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 Inf") as caught:
        merge_checkpoint(base, adapter, tmp_path / "out", base_quant="nf4", log=str)
    assert "up_proj" in str(caught.value.__notes__)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# Interrupted

IN_A_PROCESS = """
import resource, signal, sys, time
from importlib import import_module
merging = import_module("qlab.adapters.merge_checkpoint")
base, adapter, out, what = sys.argv[1:]
write = merging.ShardWriter.write
def slow(writer, name, tensor):
    write(writer, name, tensor)
    if "layers.1" in name:
        print("writing", flush=True)
        time.sleep(60)
if what == "hang":
    merging.ShardWriter.write = slow
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
merging.merge_checkpoint(base, adapter, out, base_quant="nf4", log=str)
"""


def in_a_process(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", IN_A_PROCESS, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_of_a_write(how, checkpoint, peft_adapter, opened, tmp_path):
    base, adapter, out = checkpoint("llama"), peft_adapter("llama"), tmp_path / "out"
    process = in_a_process(base, adapter, out, "hang")
    assert process.stdout.readline() == "writing\n"
    partial = [path.name for path in tmp_path.iterdir()]
    assert len(partial) == 1 and partial[0].startswith(".out.partial-")
    if how == signal.SIGKILL:  # a merge beside it does not clear away what is still being written
        quiet(base, adapter, tmp_path / "out", dry_run=True)
        with merging._partial_folder(out) as beside:
            assert {path.name for path in tmp_path.iterdir()} == {*partial, beside.name}
        out.rmdir()
    os.kill(process.pid, how)
    process.communicate()
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == (partial if how == signal.SIGKILL else [])
    quiet(base, adapter, out, base_quant="nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert opened(out)


def test_a_full_disk(checkpoint, peft_adapter, tmp_path):
    """A limit on the size of files raises where a full disk does; the message is the same."""
    process = in_a_process(checkpoint("llama"), peft_adapter("llama"), tmp_path / "out", "limit")
    errors = process.communicate()[1]
    assert process.returncode == 1 and "the disk is full: 0.00 GB are to be written" in errors
    assert not list(tmp_path.iterdir())
