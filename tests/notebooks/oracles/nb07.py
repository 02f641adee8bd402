"""Notebook 07: sensitivity, Hutchinson's estimator, Taylor terms, the budget and ZeroQ's objective against qlab.ptq."""

import itertools

import torch
from torch import nn
from torch.nn import functional

from qlab.formats import IntAffine
from qlab.ptq import allocate, distill, sensitivities
from qlab.ptq.sensitivity import TraceEstimate, quadratic_forms
from qlab.ptq.zeroq import distance, statistics


def losses():
    """(loss as a function of w, w) of several shapes and curvatures."""
    generator = torch.Generator().manual_seed(7)
    for out, columns in ((3, 5), (1, 7), (4, 1)):
        x = torch.randn(11, columns, generator=generator, dtype=torch.float64)
        y = torch.randint(out, (11,), generator=generator)
        w = torch.randn(out, columns, generator=generator, dtype=torch.float64, requires_grad=True)
        yield lambda w, x=x: functional.linear(x, w).tanh().square().sum(), w
        yield lambda w, x=x, y=y: functional.cross_entropy(functional.linear(x, w), y) + (w**4).sum(), w


def omega(function):
    generator = torch.Generator().manual_seed(1)
    for shape, bits, trace in itertools.product(((5, 7), (16, 64)), (2, 4), (0.3, -2.0)):
        w = torch.randn(shape, generator=generator)
        expected = sensitivities({"w": w}, {"f": IntAffine(bits)}, {"w": TraceEstimate(trace, 0.0)})["w"]["f"]
        found = function(trace, w, IntAffine(bits).quantize(w).dequantize())
        assert abs(found - expected) <= 1e-4 * abs(expected) and expected


def hutchinson(function):
    for loss, w in losses():
        zs = [torch.randint(2, w.shape).double() * 2 - 1 for _ in range(5)]
        (gradient,) = torch.autograd.grad(loss(w), [w], create_graph=True)
        expected = [float(quadratic_forms([gradient], [w], [z])[0]) for z in zs]
        assert torch.allclose(torch.tensor(function(loss(w), w, zs)), torch.tensor(expected))


def taylor(function):
    for loss, w in losses():
        delta = 1e-3 * torch.randn(w.shape, dtype=torch.float64)
        linear, square = function(loss(w), w, delta)
        (gradient,) = torch.autograd.grad(loss(w), [w], create_graph=True)
        expected = float(quadratic_forms([gradient], [w], [delta])[0]) / 2
        assert abs(square - expected) <= 1e-9 * abs(expected)
        change = float(loss(w.detach() + delta) - loss(w.detach()))
        assert abs(linear + square - change) <= 0.05 * abs(square) + 1e-12


def cheapest(function):
    generator = torch.Generator().manual_seed(3)
    for layers in (1, 3, 6):
        cost = torch.randn(layers, 4, generator=generator).double().tolist()
        size = torch.randint(1, 50, (layers, 4), generator=generator).tolist()
        low, high = (sum(end(s) for s in size) for end in (min, max))
        for budget in {low, (low + high) // 2, high}:
            tables = [{i: dict(enumerate(row)) for i, row in enumerate(rows)} for rows in (cost, size)]
            best = allocate(*tables, budget)
            total, chosen = function(cost, size, budget)
            assert abs(total - sum(cost[i][k] for i, k in best.items())) < 1e-9
            assert abs(total - sum(cost[i][k] for i, k in enumerate(chosen))) < 1e-9
            assert sum(size[i][k] for i, k in enumerate(chosen)) <= budget


def mismatch(function):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3), nn.BatchNorm1d(3)).train()
    for _ in range(20):
        net(3 * torch.randn(16, 5) + 1)
    net.eval()
    start = distill(net, (9, 5), steps=0)
    inputs = [start.x, net[:1](start.x), net[:4](start.x)]
    stored = [(torch.zeros(()), torch.ones(())), *((m.running_mean, m.running_var) for m in (net[1], net[4]))]
    assert torch.isclose(function(inputs, stored), start.losses[0], rtol=1e-4)
    for x, (mean, variance) in zip(inputs[1:], stored[1:], strict=True):
        expected = distance(statistics(x), (mean, (variance + 1e-6).sqrt()))
        assert torch.isclose(function([x], [(mean, variance)]), expected, rtol=1e-4)


ORACLES = {f.__name__: f for f in (omega, hutchinson, taylor, cheapest, mismatch)}
