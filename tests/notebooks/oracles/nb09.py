"""Notebook 09: a LoRA layer, its merge, wrapping every linear layer and the best rank-r approximation, against qlab.adapters."""

import copy

import torch
from torch import nn

from qlab.adapters import LoRALinear, adapters_of, add_adapters, merge


def trained(make, base, r, lora_alpha, use_rslora, seed):
    """An adapter with A and B away from their start, the same for every class."""
    layer = make(base, r, lora_alpha, use_rslora=use_rslora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.copy_(torch.randn(factor.shape, generator=generator))
    return layer


def settings():
    """(base, r, lora_alpha, use_rslora), lora_alpha ≠ r among them, wide and narrow, with and without a bias."""
    torch.manual_seed(9)
    for out_features, in_features, bias in ((4, 6, True), (7, 3, False), (32, 64, True)):
        for r, lora_alpha in ((1, 16), (3, 7), (8, 8)):
            for use_rslora in (False, True):
                yield nn.Linear(in_features, out_features, bias=bias), r, lora_alpha, use_rslora


def run(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad((y * y.detach().cos()).sum(), (layer.lora_A, layer.lora_B, x))]


def lora(make):
    for seed, (base, r, lora_alpha, use_rslora) in enumerate(settings()):
        fresh = make(base, r, lora_alpha, use_rslora=use_rslora)
        package = LoRALinear(copy.deepcopy(base), r, lora_alpha, use_rslora=use_rslora)
        assert not fresh.lora_B.any() and fresh.lora_A.abs().max() <= base.in_features**-0.5
        assert fresh.lora_A.shape == package.lora_A.shape and fresh.lora_B.shape == package.lora_B.shape
        assert len(fresh.lora_A.unique()) > 1
        assert [name for name, p in fresh.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
        assert fresh.scaling == package.scaling
        for shape in ((5,), (2, 3), (1, 4, 2)):
            x = torch.randn(*shape, base.in_features)
            pair = (trained(cls, base, r, lora_alpha, use_rslora, seed) for cls in (make, LoRALinear))
            for mine, other in zip(*(run(layer, x) for layer in pair), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


class Tree(nn.Module):
    """Layers at the top, nested and shared, one of them under two parents; and modules that are no linear layers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.embed = nn.Embedding(5, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))) for _ in range(2))
        self.again, self.twice = self.blocks[0][0], self.blocks[1]
        self.nothing = None


def wrap_linears(function):
    for make in (Tree, lambda: nn.Sequential(nn.Linear(3, 3)), lambda: nn.Sequential(nn.Tanh())):
        ours, package = make(), make()
        expected = list(add_adapters(package, r=2, lora_alpha=8).added) if list(package.parameters()) else []
        bases = {id(module): name for name, module in ours.named_modules() if isinstance(module, nn.Linear)}
        assert function(ours, 2, 8) == len(expected)
        wrapped = {name: module for name, module in ours.named_modules() if hasattr(module, "lora_A")}
        assert list(wrapped) == expected == [bases[id(module.base)] for module in wrapped.values()]
        assert all(module.scaling == 4 and len(module.lora_A) == 2 for module in wrapped.values())
        assert list(adapters_of(package)) == expected
        assert function(ours, 2, 8) == 0 and not any(hasattr(m.base, "lora_A") for m in wrapped.values())
        if make is Tree:
            assert ours.again is ours.blocks[0][0] and ours.twice is ours.blocks[1]


def best_rank(function):
    generator = torch.Generator().manual_seed(10)
    for shape in ((5, 5), (12, 7), (7, 12)):
        delta = torch.randn(shape, generator=generator, dtype=torch.float64)
        sigma = torch.linalg.svdvals(delta)
        for r in range(len(sigma) + 1):
            cut = function(delta, r)
            assert cut.shape == delta.shape and torch.linalg.matrix_rank(cut, atol=1e-9) == r
            left = (delta - cut).square().sum()
            torch.testing.assert_close(left, sigma[r:].square().sum(), rtol=1e-9, atol=1e-12)
            for _ in range(
                3 if r else 0
            ):  # no other matrix of this rank is nearer: LoRA's own form, refined by least squares
                b = torch.randn(shape[0], r, generator=generator, dtype=torch.float64)
                a = torch.linalg.lstsq(b, delta).solution
                assert (delta - b @ a).square().sum() >= left - 1e-9


def merged_weight(function):
    for seed, (base, r, lora_alpha, _) in enumerate(settings()):
        layer = trained(LoRALinear, base, r, lora_alpha, False, seed)
        with torch.no_grad():
            weight = function(base.weight, layer.lora_A, layer.lora_B, lora_alpha, r)
        assert torch.equal(weight, merge(layer, "dequantize").model.weight)


ORACLES = {
    "LoRA": lora,
    "wrap_linears": wrap_linears,
    "best_rank": best_rank,
    "merged_weight": merged_weight,
}
