"""The repacking trap of bitsandbytes on CPUs with AVX512_BF16, and the guard against it (both orders)."""

import json
import subprocess
import sys

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.nn import functional

from qlab.models import guard_bitsandbytes, weight_of

OUT, IN, RANK = 64, 128, 4

# Runs in its own process, so that no patched state leaks: eval forward, then read the weight, then a gradient.
MEASURE = """
import json, sys, torch
import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit

def measure():
    torch.manual_seed(0)
    weight, x = torch.randn(64, 128), torch.randn(8, 128)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    before = dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone()
    with torch.no_grad():
        layer.eval()(x)
    after = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    x.requires_grad_(True)
    out = layer.train()(x)
    out.sum().backward()
    gradient = torch.zeros_like(x) if x.grad is None else x.grad  # None: lost without an error
    expected = before.sum(0).expand_as(x)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)
    return {"weight_error": float((after - before).norm() / before.norm()), "gradient_cosine": float(cosine)}

def odd_rows():
    layer = bnb.nn.Linear4bit(128, 40, bias=False).to("cpu").eval()
    try:
        layer(torch.randn(2, 128))
    except AssertionError as error:
        return str(error)

unguarded, odd_unguarded = measure(), odd_rows()
from qlab.models import guard_bitsandbytes
guard_bitsandbytes()
print(json.dumps({"unguarded": unguarded, "guarded": measure(), "odd": [odd_unguarded, odd_rows()]}))
"""


def linear_4bit(weight):
    layer = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


@pytest.fixture
def layer():
    guard_bitsandbytes()
    torch.manual_seed(0)
    return linear_4bit(torch.randn(OUT, IN))


@pytest.fixture
def x():
    return torch.randn(8, IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(),
    reason="this CPU has no AVX512_BF16, so bitsandbytes never repacks here",
)
def test_the_trap_without_the_guard_and_its_absence_with_it():
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert seen["unguarded"]["weight_error"] > 1.2
    assert abs(seen["unguarded"]["gradient_cosine"]) < 0.3
    assert seen["guarded"]["weight_error"] == 0.0
    assert seen["guarded"]["gradient_cosine"] > 0.999999
    assert seen["odd"] == ["N must be divisible by block_n", None]


def test_train_eval_merge_is_the_merge_that_was_trained(layer, x):
    a = torch.randn(RANK, IN, requires_grad=True)
    b = torch.randn(OUT, RANK, requires_grad=True)
    base = weight_of(layer).clone()
    layer.train()
    (layer(x) + x @ a.T @ b.T).square().mean().backward()
    assert a.grad.norm() > 0 and b.grad.norm() > 0
    layer.eval()
    with torch.no_grad():
        adapted = layer(x) + x @ a.T @ b.T
        merged = functional.linear(x, weight_of(layer) + b @ a, layer.bias)
    assert torch.equal(weight_of(layer), base)
    assert torch.allclose(merged, adapted, rtol=1e-4, atol=1e-4)


def test_eval_train_gradients_are_those_of_the_dequantized_weight(layer, x):
    with torch.no_grad():
        layer.eval()(x)
    layer.train()
    target = torch.randn(8, OUT)
    gradients = []
    for forward in (layer, lambda x: functional.linear(x, weight_of(layer), layer.bias)):
        leaf = x.clone().requires_grad_(True)
        functional.mse_loss(forward(leaf), target).backward()
        gradients.append(leaf.grad)
    assert gradients[1].norm() > 0
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)


def test_an_eval_pass_changes_nothing_that_is_saved(layer, x):
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        layer.eval()(x)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_peft_merge_is_the_same_with_and_without_an_eval_pass_before_it(x):
    from peft import LoraConfig, get_peft_model

    merged = []
    for evaluate in (False, True):
        guard_bitsandbytes()
        torch.manual_seed(0)
        base = nn.Sequential(linear_4bit(torch.randn(OUT, IN)))
        base.is_loaded_in_4bit = True  # what PEFT asks a transformers model
        model = get_peft_model(base, LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False))
        model.train()(x).square().mean().backward()
        model.eval()
        if evaluate:
            with torch.no_grad():
                model(x)
        with pytest.warns(UserWarning, match="rounding errors"):  # PEFT re-quantizes the merged weight
            merged.append(weight_of(model.merge_and_unload()[0]))
    assert torch.equal(*merged)


def test_layers_built_before_the_guard_are_switched_off(monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32), nn.ModuleList([bitsandbytes.nn.LinearNF4(64, 32)]))
    assert model[0].support_avx512bf16_for_cpu and model[1][0].support_avx512bf16_for_cpu
    assert guard_bitsandbytes(model).layers == 2
    assert not model[0].support_avx512bf16_for_cpu and not model[1][0].support_avx512bf16_for_cpu
    assert guard_bitsandbytes(model).layers == 0


def test_the_guard_is_idempotent_and_holds_for_layers_built_after_it(monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    first = guard_bitsandbytes()
    patched = bitsandbytes.nn.modules.has_avx512bf16
    assert guard_bitsandbytes() == first and bitsandbytes.nn.modules.has_avx512bf16 is patched
    assert first.cpu_repacks == bool(bitsandbytes.functional.has_avx512bf16())  # the CPU's answer, not the guard's
    assert bitsandbytes.nn.Linear4bit(64, 32).support_avx512bf16_for_cpu is False


def test_layers_that_were_already_repacked_are_refused_by_name(layer):
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match=r"1 Linear4bit layer\(s\): inner.0\. .*bfloat16"):
        guard_bitsandbytes(nn.ModuleDict({"inner": nn.Sequential(layer)}))


def test_without_bitsandbytes_there_is_nothing_to_guard(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    state = guard_bitsandbytes()
    assert not state.installed and "not installed" in str(state)
