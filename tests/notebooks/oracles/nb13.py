"""Notebook 13: the rounding of a group, the merged school's forward and its gradients, against QATLoRALinear and autograd."""

import torch
from torch import nn

from qlab.adapters import QATLoRALinear
from qlab.formats import IntAffine
from qlab.qat import FakeQuant


def fmt(bits, group):
    return IntAffine(bits, symmetric=False, granularity="group", group_size=group, float_zero_point=True)


def fake_round(function):
    generator = torch.Generator().manual_seed(13)
    for bits, group, shape in ((4, 8, (6, 32)), (3, 16, (5, 16)), (2, 4, (3, 12)), (8, 32, (2, 64))):
        w = (0.1 * torch.randn(shape, generator=generator) + 0.03).requires_grad_(True)
        upstream = torch.randn(shape, generator=generator)
        ours, theirs = function(w, bits, group), FakeQuant(fmt(bits, group), w)(w)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad((ours * upstream).sum(), w)
        assert torch.equal(gradient, upstream)


def layers():
    """QATLoRALinears with B ≠ 0 and lora_alpha ≠ r, and inputs of two shapes."""
    generator = torch.Generator().manual_seed(14)
    for bits, group, out, width, r, alpha in ((4, 8, 6, 32, 2, 7), (3, 16, 5, 16, 3, 4), (2, 4, 9, 12, 5, 5)):
        torch.manual_seed(bits)
        layer = QATLoRALinear(nn.Linear(width, out, bias=False), r, alpha, fmt=fmt(bits, group), school="merged")
        layer.lora_B.data = torch.randn(out, r, generator=generator)
        for shape in ((4,), (2, 3)):
            x, upstream = (torch.randn(*shape, size, generator=generator) for size in (width, out))
            yield layer, x, upstream, bits, group


def merged_forward(function):
    for layer, x, _, bits, group in layers():
        with torch.no_grad():
            ours = function(x, layer.base.weight, layer.lora_A, layer.lora_B, layer.scaling, bits, group)
            torch.testing.assert_close(ours, layer(x), rtol=1e-5, atol=1e-5)


def merged_gradients(function):
    for layer, x, upstream, _, _ in layers():
        with torch.no_grad():
            ours = function(x, upstream, layer.lora_A, layer.lora_B, layer.scaling)
        theirs = torch.autograd.grad((layer(x) * upstream).sum(), (layer.lora_A, layer.lora_B))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


ORACLES = {"fake_round": fake_round, "merged_forward": merged_forward, "merged_gradients": merged_gradients}
