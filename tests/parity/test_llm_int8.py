"""LLM.int8() against bitsandbytes: statistics exact, codes but for ties, and the output of its 8-bit layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats import IntAffine
from qlab.models import guard_bitsandbytes
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq.llm_int8 import LLMInt8

guard_bitsandbytes()
import bitsandbytes  # noqa: E402 (after the guard, which quiets its import)
from bitsandbytes.functional import int8_vectorwise_quant  # noqa: E402


def inputs(seed, tokens=12, channels=64, outliers=3):
    """float16 activations, some channels of which have outliers in some tokens, and one token much smaller."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=g)
    x[:, torch.randperm(channels, generator=g)[:outliers]] *= 15
    x[0] *= 0.01
    return x.half()


def on_exact_scales(x, absmax):
    """x with that absmax, 127 · 2^-k, in each row: neither 127 / absmax nor its reciprocal is rounded then."""
    x = x.clamp(-absmax, absmax)
    x[:, 11] = absmax
    return x


def same_but_for_ties(ours, theirs, exact):
    """They multiply by 127 / absmax, we by 1 / (absmax / 127): in float16 exact halves are common, and go either way."""
    apart = ours != theirs
    assert torch.equal((exact[apart] - exact[apart].floor() - 0.5).abs() < 1e-4, torch.ones_like(exact[apart]).bool())
    assert ((ours - theirs).abs() <= 1).all() and apart.double().mean() < 0.01


@given(st.integers(0, 2**31), st.sampled_from([0.01, 0.1, 3.0]))
def test_weights(seed, size):
    w = (torch.randn(24, 96, generator=torch.Generator().manual_seed(seed)) * size).half()
    codes, absmax, _ = int8_vectorwise_quant(w.clone())
    q, _ = LLMInt8().quantize(w, IntAffine(8), None, "layer")
    assert torch.equal(q.params["scale"], absmax / 127)
    same_but_for_ties(q.codes.int(), codes.int(), w.double() * 127 / absmax.double().unsqueeze(1))


@given(st.integers(0, 2**31), st.integers(0, 8), st.sampled_from([1, 2, 12]), st.sampled_from([6.0, 2.5]))
def test_activations(seed, outliers, tokens, threshold):
    x = inputs(seed, tokens, outliers=outliers)
    codes, absmax, columns = int8_vectorwise_quant(x.clone(), threshold=threshold)
    act = ActQuant(threshold=threshold)
    scale = act.params(x)["scale"]
    assert torch.equal(scale, absmax / 127), "an entry below the threshold counts, in whatever column"
    kept = torch.zeros(64, dtype=torch.bool)
    kept[columns] = True
    x_hat = act(x.float())
    assert torch.equal(x_hat[:, kept], x.float()[:, kept]), "their outlier columns are ours"
    ours = (x_hat / scale.unsqueeze(1)).round().int()[:, ~kept]
    same_but_for_ties(ours, codes.int()[:, ~kept], (x.double() * 127 / absmax.double().unsqueeze(1))[:, ~kept])
    assert not codes[:, kept].any()


def test_codes_where_ties_are_the_same():
    w = on_exact_scales(torch.randn(200, 96, generator=torch.Generator().manual_seed(0)) * 0.05, 127 / 1024).half()
    codes, absmax, _ = int8_vectorwise_quant(w.clone())
    q, _ = LLMInt8().quantize(w, IntAffine(8), None, "layer")
    assert torch.equal(q.codes, codes) and torch.equal(q.params["scale"], absmax / 127)
    exact = w.double() * 1024
    assert ((exact - exact.floor()) == 0.5).any()


@pytest.mark.parametrize("outliers", [0, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_of_linear8bitlt(outliers, bias):
    """It decodes the int8 weights of outlier columns, as we do, instead of keeping them in 16 bits."""
    g = torch.Generator().manual_seed(0)
    w = on_exact_scales(torch.randn(48, 64, generator=g) * 0.05, 127 / 1024).half()
    x = on_exact_scales(torch.randn(12, 64, generator=g), 127 / 32)
    x[:, 20 : 20 + outliers] *= 15
    x, b = x.half().float(), torch.randn(48, generator=g)
    theirs = bitsandbytes.nn.Linear8bitLt(64, 48, bias=bias, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bitsandbytes.nn.Int8Params(w.clone(), has_fp16_weights=False, requires_grad=False)
    if bias:
        theirs.bias.data = b.clone()
    theirs = theirs.to("cpu").eval()
    method = LLMInt8()
    q, _ = method.quantize(w.float(), IntAffine(8), None, "layer")
    ours = QuantLinear(q, b if bias else None, method.activations)
    with torch.no_grad():
        expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=5e-5, atol=1e-4)
    plain = QuantLinear(q, b if bias else None, ActQuant())(x)
    assert torch.allclose(plain, expected, rtol=5e-5, atol=1e-4) == (not outliers), "the threshold is what is compared"
    sixteen_bit = ours(x) + torch.where((x.abs() >= 6).any(0), x, 0) @ (w.float() - q.dequantize(torch.float32)).T
    assert torch.allclose(sixteen_bit, expected, rtol=5e-5, atol=1e-4) == (not outliers)
