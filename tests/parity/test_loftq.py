"""LoftQ against PEFT's: the same codes and the same B·A, and the two places where PEFT's goes another way.

PEFT computes on "cuda" or "xpu", whatever device the weight is on. Here its own source runs with that one word changed.
"""

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layer
from peft.utils import loftq_utils
from torch import nn

from qlab.adapters.add import add_adapters
from qlab.adapters.loftq import loftq, loftq_init
from qlab.formats import NF4
from qlab.models import guard_bitsandbytes, replace
from qlab.nn import QuantLinear, weight_of

guard_bitsandbytes()
import bitsandbytes as bnb  # noqa: E402 (after the guard)

OUT, IN = 48, 128  # bitsandbytes decodes 4-bit rows right where its block of 64 divides them


def weight(seed=0):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def on_cpu(function):
    """A function of loftq_utils with its device changed."""
    source = inspect.getsource(function)
    assert source.count('"cuda"') == 1
    namespace = dict(vars(loftq_utils)) | {"is_xpu_available": lambda: False}
    exec(source.replace('"cuda"', '"cpu"'), namespace)
    return namespace[function.__name__]


@pytest.mark.skipif(torch.cuda.is_available(), reason="PEFT's LoftQ finds the device it asks for")
def test_peft_cannot_initialize_without_a_gpu():
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        loftq_utils.loftq_init(weight(), num_bits=4, reduced_rank=4)


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("r", [1, 8, 48])
def test_codes_and_product_are_those_of_peft(r, iterations):
    for seed in range(3):
        w = weight(seed)
        dequantized, lora_a, lora_b = on_cpu(loftq_utils.loftq_init)(w, 4, r, iterations)
        q, a, b = loftq(w, NF4(64), r, iterations)
        assert torch.equal(q.dequantize(), dequantized)
        torch.testing.assert_close(b @ a, lora_b @ lora_a, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.abs(), lora_a.abs(), rtol=0, atol=1e-4)
        torch.testing.assert_close(b.abs(), lora_b.abs(), rtol=0, atol=1e-4)


def test_factors_for_given_codes_are_those_of_replace_lora_weights_loftq():
    w, r = weight(), 8
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight.data = w.clone()
    layer = bnb.nn.Linear4bit(IN, OUT, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu")
    lora_a, lora_b = on_cpu(loftq_utils._loftq_init_new)(layer.weight, w, 4, r)
    model = nn.Sequential(layer)
    add_adapters(model, r=r, lora_alpha=3)
    loftq_init(model, {"0": w})
    torch.testing.assert_close(model[0].delta_weight().detach(), lora_b @ lora_a, rtol=0, atol=1e-5)


def test_peft_forgets_the_scaling_unless_lora_alpha_is_r(monkeypatch):
    monkeypatch.setattr(peft_layer, "loftq_init", on_cpu(loftq_utils.loftq_init))
    w, r = weight(), 8
    error = {}
    for lora_alpha in (r, 4 * r):
        ours, peft = nn.Sequential(nn.Linear(IN, OUT)), nn.Sequential(nn.Linear(IN, OUT))
        for model in (ours, peft):
            model[0].weight.data = w.clone()
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            target_modules=["0"],
            init_lora_weights="loftq",
            loftq_config={"loftq_bits": 4, "loftq_iter": 2},
        )
        merged = get_peft_model(peft, config).merge_and_unload()[0].weight.detach()
        replace(ours, ["0"], lambda _, layer: QuantLinear.from_linear(layer, NF4(64)))
        add_adapters(ours, r=r, lora_alpha=lora_alpha)
        loftq_init(ours, {"0": w}, iterations=2)
        error["ours", lora_alpha] = float((weight_of(ours[0]).detach() - w).norm())
        error["peft", lora_alpha] = float((merged - w).norm())
    plain = float((NF4(64).quantize(w).dequantize() - w).norm())
    assert error["ours", r] == pytest.approx(error["ours", 4 * r], rel=1e-4)
    assert error["peft", r] == pytest.approx(error["ours", r], rel=1e-4)
    assert error["peft", 4 * r] > plain > error["ours", r]
