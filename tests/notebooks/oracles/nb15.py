"""Notebook 15: bits per weight, the Pareto front and the interval, against stored layers, a sort, and qlab.train.evaluate."""

import numpy as np
import pytest
from torch import nn

from qlab.adapters import LoRALinear
from qlab.formats import NF4, Binary, IntAffine
from qlab.nn import QuantLinear
from qlab.train.evaluate import bootstrap
from qlab.train.sweep_methods import bits_per_weight


def stored_bits(function):
    for out, width in ((128, 128), (64, 256)):
        linear = nn.Linear(width, out, bias=False)
        group = IntAffine(3, symmetric=False, granularity="group", group_size=32, float_zero_point=True)
        cases = [(group, 3, 32, 64), (NF4(), 4, 64, 32), (Binary("group", 32), 1, 32, 32), (IntAffine(8), 8, width, 32)]
        for fmt, bits, size, constants in cases:
            layer = QuantLinear(fmt.quantize(linear.weight))
            original = nn.ModuleDict({"a": linear})
            plain = bits_per_weight(nn.ModuleDict({"a": layer}), original, ["a"])
            assert function(bits, size, constants) == pytest.approx(plain)
            for r in (1, 8):
                adapted = nn.ModuleDict({"a": LoRALinear(layer, r=r, lora_alpha=16)})
                expected = bits_per_weight(adapted, original, ["a"])
                assert function(bits, size, constants, r, out, width) == pytest.approx(expected)


def front(function):
    rng = np.random.default_rng(15)
    for count in (1, 2, 40):
        for _ in range(20):
            stored, right = rng.integers(1, 7, count).tolist(), rng.integers(0, 7, count).tolist()
            expected, best = set(), -1
            for bits in sorted(set(stored)):  # from few bits to many: on the front is who beats all before
                top = max(e for b, e in zip(stored, right, strict=True) if b == bits)
                if top > best:
                    expected |= {i for i in range(count) if (stored[i], right[i]) == (bits, top)}
                    best = top
            assert function(stored, right) == sorted(expected)


def interval(function):
    rng = np.random.default_rng(3)
    groups = [f"town {n}" for n in rng.integers(0, 12, 60)]  # of unequal sizes, in no order
    values = rng.random(60).round(2).tolist()
    draws = np.random.default_rng(0).integers(len(set(groups)), size=(1000, len(set(groups))))
    expected = bootstrap(np.array(values), groups)
    np.testing.assert_allclose(function(values, groups, draws), (expected.low, expected.high))


ORACLES = {"stored_bits": stored_bits, "front": front, "interval": interval}
