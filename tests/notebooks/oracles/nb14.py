"""Notebook 14: the two merges, the count of flips and its interval, against qlab and PEFT's formula."""

import numpy as np
import torch
from torch import nn

from qlab.adapters import LoRALinear, QALoRALinear, merge, qtensor_of
from qlab.formats import NF4, IntAffine
from qlab.nn import QuantLinear
from qlab.train.evaluate import paired_difference


def trained(kind, base, r, lora_alpha, **settings):
    """An adapter whose A and B are away from their start."""
    layer = kind(base, r, lora_alpha, **settings)
    generator = torch.Generator().manual_seed(r)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.copy_(torch.randn(factor.shape, generator=generator))
    return layer


def weight(shape):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(14)) + 0.02


def merged_weight(function):
    for fmt in (NF4(64, double_quant=True), NF4(), IntAffine(3, granularity="group", group_size=32)):
        for r, lora_alpha in ((2, 7), (4, 4), (3, 16)):  # lora_alpha ≠ r among them
            layer = trained(LoRALinear, QuantLinear(fmt.quantize(weight((6, 128)))), r, lora_alpha)
            with torch.no_grad():
                ours = function(layer.base.dequantized_weight(), layer.lora_A, layer.lora_B, lora_alpha)
            merged = merge(nn.Sequential(layer), "dequantize").model[0]
            torch.testing.assert_close(ours, merged.weight.data, rtol=1e-6, atol=1e-6)


def merged_zero(function):
    for bits, size, shape in ((4, 32, (6, 128)), (3, 8, (5, 24)), (2, 16, (7, 16))):
        fmt = IntAffine(bits, symmetric=False, granularity="group", group_size=size, float_zero_point=True)
        for r, lora_alpha in ((2, 7), (3, 3)):
            base = QuantLinear(fmt.quantize(weight(shape)))
            layer = trained(QALoRALinear, base, r, lora_alpha, pooling="mean")
            q = qtensor_of(base)
            with torch.no_grad():
                ours = function(q.params["zero_point"], q.params["scale"], layer.lora_A, layer.lora_B, lora_alpha, size)
            merged = merge(nn.Sequential(layer), "zero-points").model[0]
            torch.testing.assert_close(ours, qtensor_of(merged).params["zero_point"], rtol=1e-5, atol=1e-5)


def answers():
    """(first, second, groups): pairs of answer sheets with groups of several sizes; the last two are equal."""
    generator = np.random.default_rng(14)
    for questions, towns, change in ((200, 25, 0.3), (37, 5, 0.9), (8, 8, 0.5), (50, 10, 0.0)):
        first = generator.random(questions) < 0.6
        second = first ^ (generator.random(questions) < change)
        yield first, second, [f"town {n}" for n in generator.integers(towns, size=questions)]


def flips(function):
    for first, second, groups in answers():
        lost, gained, change = function(first, second)
        assert lost == sum(a and not b for a, b in zip(first, second, strict=True))
        assert lost + gained == (first != second).sum()
        assert np.isclose(change, paired_difference(first, second, groups).value)


def paired_interval(function):
    for first, second, groups in answers():
        for seed in (0, 3):
            theirs = paired_difference(first, second, groups, seed=seed)
            assert np.allclose(function(first, second, groups, seed=seed), (theirs.low, theirs.high))


ORACLES = {
    "merged_weight": merged_weight,
    "merged_zero": merged_zero,
    "flips": flips,
    "paired_interval": paired_interval,
}
