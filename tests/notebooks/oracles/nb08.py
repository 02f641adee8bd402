"""Notebook 08: the straight-through estimator, LSQ's gradients and PACT's, against qlab.qat."""

import math

import torch

from qlab.formats import IntAffine
from qlab.qat import fake_quantize, first_step, learned_step
from qlab.qat import pact as qlab_pact


def weights():
    """(weights, gradient that comes from above): with an outlier, ties and zeros."""
    generator = torch.Generator().manual_seed(8)
    for shape, size in (((7,), 1.0), ((24, 40), 0.05), ((5, 64), 300.0)):
        w = torch.randn(shape, generator=generator) * size
        w.view(-1)[0] *= 30
        w.view(-1)[1:4] = torch.tensor([0.0, 0.5, 1.5]) * size
        yield w, torch.randn(shape, generator=generator)


def straight_through(function):
    for w, upstream in weights():
        for bits in (2, 3, 4, 8):
            fmt = IntAffine(bits, granularity="tensor")
            for share in (0.05, 0.5, 1.0):
                scale, results = w.abs().max() * share / fmt.qmax, []
                calls = (
                    lambda x, scale=scale, fmt=fmt: function(x, scale, fmt.qmin, fmt.qmax),
                    lambda x, scale=scale, fmt=fmt: fake_quantize(x, fmt, {"scale": scale}),
                )
                for fake in calls:
                    x = w.clone().requires_grad_()
                    y = fake(x)
                    results.append((y.detach(), torch.autograd.grad((y * upstream).sum(), x)[0]))
                assert all(map(torch.equal, *results))


def lsq(function):
    for w, upstream in weights():
        for bits, symmetric in ((2, True), (3, True), (8, True), (2, False), (4, False)):
            fmt = IntAffine(bits, symmetric, "tensor")
            for factor in (0.3, 1.0, 4.0):
                x, s = w.clone().requires_grad_(), (first_step(w, fmt) * factor).requires_grad_()
                y = learned_step(x, fmt, s, None, w.numel())
                dx, ds = torch.autograd.grad((y * upstream).sum(), (x, s))
                w_hat, mask, per_weight = function(w, s.detach(), -fmt.qmin, fmt.qmax)
                torch.testing.assert_close(w_hat, y.detach(), rtol=1e-5, atol=0)
                assert torch.equal(dx, upstream * mask)
                terms = upstream * per_weight / math.sqrt(w.numel() * fmt.qmax)
                torch.testing.assert_close(terms.sum(), ds, rtol=0, atol=1e-5 * float(terms.abs().sum()))


def pact(function):
    x = torch.cat([torch.randn(500, generator=torch.Generator().manual_seed(8)) * 3, torch.tensor([0.0, 1.5, 6.0])])
    for bits in (1, 2, 4, 8):
        for level in (0.4, 1.5, 6.0, 50.0):
            a, alpha = x.clone().requires_grad_(), torch.tensor(level, requires_grad=True)
            y = qlab_pact(a, alpha, bits)
            dx, d_alpha = torch.autograd.grad(y.sum(), (a, alpha))
            y_q, mask, per_input = function(x, level, bits)
            wrong = (y_q - y.detach()).abs() > 1e-5 * level
            assert wrong.sum() <= 1, "a tie may fall either way"
            assert torch.equal(mask, dx) and float(per_input.sum()) == float(d_alpha)


ORACLES = {"straight_through": straight_through, "lsq": lsq, "pact": pact}
