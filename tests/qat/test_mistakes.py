"""Three mistakes of popular snippets, run on purpose; and a toy problem that is learned with the estimator and not without."""

import pytest
import torch
from torch import nn

from qlab.formats import IntAffine
from qlab.qat import FakeQuant, fake_quantize, prepare_qat, trainable_parameters


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_an_integer_cannot_be_a_parameter():
    with pytest.raises(RuntimeError, match="Only Tensors of floating point and complex dtype can require gradients"):
        nn.Parameter(torch.zeros((), dtype=torch.uint8))
    fake = FakeQuant(IntAffine(4, symmetric=False), random(4, 8), "learned")
    assert fake.zero_point.dtype == torch.uint8 and "zero_point" not in dict(fake.named_parameters())


def test_a_scale_of_one_rounds_every_weight_of_that_size_to_zero():
    w, fmt = 0.02 * random(64, 64), IntAffine(8, granularity="tensor")
    assert (fake_quantize(w, fmt, {"scale": torch.tensor(1.0)}) == 0).all()
    assert (fake_quantize(w, fmt, fmt.fit(w)) != 0).float().mean() > 0.97


def test_rounding_without_the_estimator_has_zero_gradient():
    w, fmt = random(4, 8).requires_grad_(), IntAffine(4)
    scale = fmt.fit(w.detach())["scale"].unsqueeze(1).requires_grad_()
    ((w / scale).round().clamp(-7, 7) * scale).square().sum().backward()
    assert (w.grad == 0).all() and (scale.grad != 0).all(), "the weights stand still, the scale trains"
    w.grad = None
    fake_quantize(w, fmt, fmt.fit(w.detach())).square().sum().backward()
    assert (w.grad != 0).float().mean() > 0.7


class Rounded(nn.Linear):
    """The snippet: rounded with torch.round, and nothing done about its gradient."""

    def forward(self, x):
        scale = self.weight.detach().abs().max() / 1
        return nn.functional.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


def trained(model, steps=150):
    """Loss before and after, and how far the first layer's weights moved."""
    x = random(256, 6)
    y = (x[:, :1] * x[:, 1:2] > 0).float()
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.01)
    start, losses = model[0].weight.detach().clone(), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1], (model[0].weight - start).abs().max().item()


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_a_toy_problem_at_two_bits(method):
    def net(first):
        torch.manual_seed(0)
        return nn.Sequential(first(6, 24), nn.ReLU(), first(24, 1))

    before, with_estimator, moved = trained(_prepared(net(nn.Linear), method))
    _, without, stood = trained(net(Rounded))
    assert moved > 0.05 and stood == 0.0
    assert with_estimator < 0.35 < 0.55 < without < 0.75


def _prepared(model, method):
    prepare_qat(model, IntAffine(2, granularity="channel"), method)
    return model
