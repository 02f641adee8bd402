"""Notebook 12: QA-LoRA's layer and merge, the nearest group-constant change, and Q4_1's bytes, against qlab and gguf."""

import gguf
import torch
from torch import nn

from qlab.adapters import QALoRALinear, merge, to_q4_1
from qlab.formats import IntAffine
from qlab.nn import QuantLinear


def bases():
    """QuantLinears of several widths, groups and shapes, one group in a row among them."""
    generator = torch.Generator().manual_seed(12)
    for bits, group, shape in ((4, 32, (6, 128)), (3, 8, (5, 24)), (2, 16, (7, 16)), (8, 2, (3, 10))):
        fmt = IntAffine(bits, symmetric=False, granularity="group", group_size=group, float_zero_point=True)
        yield QuantLinear(fmt.quantize(0.1 * torch.randn(shape, generator=generator) + 0.02))


def dequantize(function):
    for base in bases():
        q = base.qtensor
        ours = function(q.codes, q.params["scale"], q.params["zero_point"])
        assert ours.shape == q.shape
        torch.testing.assert_close(ours, q.dequantize(), rtol=1e-6, atol=1e-7)


def pairs(make):
    """(the lesson's layer, qlab's) with the same A and B, away from their start; lora_alpha ≠ r among the settings."""
    for base in bases():
        q = base.qtensor
        for r, lora_alpha in ((2, 7), (5, 5), (3, 16)):
            for pooling in ("sum", "mean"):
                theirs = QALoRALinear(base, r, lora_alpha, pooling=pooling)
                ours = make(q.codes, q.params["scale"], q.params["zero_point"], r, lora_alpha, pooling)
                assert not ours.lora_B.any() and ours.lora_A.shape == theirs.lora_A.shape
                assert 0 < ours.lora_A.abs().max() <= ours.lora_A.shape[1] ** -0.5
                generator = torch.Generator().manual_seed(r)
                with torch.no_grad():
                    for mine, other in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
                        other.copy_(torch.randn(mine.shape, generator=generator))
                        mine.copy_(other)
                yield ours, theirs


LAYERS = []  # merge_zeros is given the lesson's layers, which the cell before it defines


def qalora(make):
    LAYERS[:] = pairs(make)
    for ours, theirs in LAYERS:
        assert {name for name, p in ours.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        for shape in ((4,), (2, 3)):
            x = torch.randn(*shape, theirs.shape[1])
            results = []
            for layer in (ours, theirs):
                y = layer(x)
                results.append([y.detach(), *torch.autograd.grad(y.cos().sum(), (layer.lora_A, layer.lora_B))])
            for mine, other in zip(*results, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def merge_zeros(function):
    assert LAYERS, "the layer is checked first"
    for ours, theirs in LAYERS:
        with torch.no_grad():
            zero = function(ours)
        merged = merge(nn.Sequential(theirs), "zero-points").model[0]
        torch.testing.assert_close(zero, merged.zero_point, rtol=1e-5, atol=1e-4)


def group_constant(function):
    delta = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for size in (1, 2, 8, 24):
        ours = function(delta, size)
        blocks = torch.block_diag(*[torch.ones(size, 1, dtype=torch.float64)] * (24 // size))
        expected = torch.linalg.lstsq(
            blocks, delta.T
        ).solution  # the nearest in the span of the groups, by least squares
        torch.testing.assert_close(ours, (blocks @ expected).T)


def q4_1_bytes(function):
    generator = torch.Generator().manual_seed(2)
    fmt = IntAffine(4, symmetric=False, granularity="group", group_size=32, float_zero_point=True)
    for shape in ((3, 64), (1, 32)):
        q = fmt.quantize(torch.randn(shape, generator=generator))
        block, ours = to_q4_1(q), function(q.codes, q.params["scale"], q.params["zero_point"])
        assert torch.equal(ours, block.format.to_bytes(block))
        read = torch.from_numpy(gguf.quants.dequantize(ours.numpy(), gguf.GGMLQuantizationType.Q4_1))
        assert torch.equal(read, block.dequantize()) and (read - q.dequantize()).abs().max() < 5e-3


ORACLES = {
    "dequantize": dequantize,
    "QALoRA": qalora,
    "merge_zeros": merge_zeros,
    "group_constant": group_constant,
    "q4_1_bytes": q4_1_bytes,
}
