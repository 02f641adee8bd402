"""Distilled data: nearer to the stored statistics than noise, from every kind of BatchNorm, and the model left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from qlab.formats import IntAffine
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq.method import RTN, Method
from qlab.ptq.quantize import quantize_model
from qlab.ptq.zeroq import ZeroQ, distance, distill, statistics

KINDS = {
    "1d": (lambda: nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Linear(13, 5)), (33, 7)),
    "1d over a sequence": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)
        ),
        (5, 3, 11),
    ),
    "2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 3), nn.BatchNorm2d(3)),
        (3, 3, 9, 7),
    ),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, affine=False)), (3, 2, 5, 4, 3)),
}


def trained(make, shape):
    """A net whose BatchNorms have seen data far from the noise that distillation starts from."""
    torch.manual_seed(0)
    net = make()
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        net(data(shape, generator))
    return net


def data(shape, generator):
    """Mean 0 and variance 1 over the batch in every channel, but channels strongly correlated and heavy-tailed."""
    common = torch.randn(shape[0], 1, *shape[2:], generator=generator)
    x = common.expand(shape) ** 3 + 0.3 * torch.randn(shape, generator=generator)
    return (x - x.mean()) / x.std()


def mismatch(net, x):
    """The BatchNorm terms of the objective, each written out."""
    terms = []

    def hook(norm, args):
        v = args[0].transpose(0, 1).flatten(1)
        terms.append((v.mean(1) - norm.running_mean).square().mean())
        terms.append(((v.var(1) + 1e-6).sqrt() - (norm.running_var + 1e-6).sqrt()).square().mean())

    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [m.register_forward_pre_hook(hook) for m in norms]
    with torch.no_grad():
        net.eval()(x)
    for handle in handles:
        handle.remove()
    return float(sum(terms))


@pytest.fixture(params=KINDS)
def kind(request):
    make, shape = KINDS[request.param]
    return trained(make, shape), shape


def test_statistics_match_better_than_noise(kind):
    net, shape = kind
    result = distill(net, shape, steps=300)
    assert result.x.shape == shape and not result.x.requires_grad
    assert len(result.losses) == 301 and result.losses[-1] < 0.2 * result.losses[0]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert mismatch(net, result.x) < 0.2 * mismatch(net, noise)
    mean, deviation = statistics(result.x)
    assert float(result.losses[-1]) == pytest.approx(
        mismatch(net, result.x) + float(mean.square().mean() + (deviation - 1).square().mean()), rel=1e-3
    )


def test_leaves_the_model_as_it_was(kind):
    net, shape = kind
    net.train()
    net[0].training = False
    net[0].bias.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    state = copy.deepcopy(net.state_dict())
    distill(net, shape, steps=3)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())  # num_batches_tracked too
    assert [m.training for m in net] == [False] + [True] * (len(net) - 1)
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight)) and net[0].bias.grad is None
    assert not net[0].bias.requires_grad and net[0].weight.requires_grad
    assert all(not m._forward_pre_hooks for m in net)
    assert all(p.grad is None for name, p in net.named_parameters() if name != "0.weight")


def test_statistics_by_hand():
    mean, deviation = statistics(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    assert mean.tolist() == [2, 0] and deviation.tolist() == pytest.approx([2**0.5, 1e-3], rel=1e-4)
    assert float(distance((torch.tensor([1.0, 2.0]), torch.tensor([3.0])), (torch.zeros(2), torch.ones(1)))) == 2.5 + 4


def test_no_steps_is_the_noise_and_seeds_differ(kind):
    net, shape = kind
    start = distill(net, shape, steps=0)
    assert torch.equal(start.x, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert len(start.losses) == 1
    assert torch.equal(distill(net, shape, steps=5).x, distill(net, shape, steps=5).x)
    assert not torch.equal(distill(net, shape, steps=5, seed=1).x, distill(net, shape, steps=5).x)


def test_the_learning_rate_is_used():
    net, shape = trained(*KINDS["1d"]), KINDS["1d"][1]
    moved = distill(net, shape, steps=1, lr=0.25).x - distill(net, shape, steps=0).x
    assert float(moved.abs().max()) == pytest.approx(0.25, rel=1e-3)  # Adam's first step is lr in each coordinate


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(5), nn.Linear(5, 5)

    def forward(self, x):
        return self.linear(self.norm(x))


def test_a_model_without_batch_norm_is_refused_by_name():
    with pytest.raises(ValueError, match="Transformer stores none: it has no BatchNorm layer.*text"):
        distill(Transformer(), (4, 5))
    with pytest.raises(ValueError, match="Transformer stores none"):
        quantize_model(Transformer(), IntAffine(8), ZeroQ((4, 5)), progress=False)


def test_batch_norm_without_running_statistics():
    net = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"keep no running statistics \(1\)"):
        distill(net, (4, 7))
    assert len(distill(nn.Sequential(net, nn.BatchNorm1d(3)), (9, 7), steps=2).losses) == 3  # one that does is enough


@pytest.mark.parametrize(
    "shape, words",
    [
        ((4,), "at least 2 values per channel"),
        ((1, 7), "at least 2 values per channel"),
        ((0, 7), "at least 2 values per channel"),
    ],
)
def test_shapes_without_statistics(shape, words):
    with pytest.raises(ValueError, match=words):
        distill(trained(*KINDS["1d"]), shape)


def test_a_shape_that_the_model_does_not_take():
    net = trained(*KINDS["1d"])
    with pytest.raises(RuntimeError, match="cannot be multiplied") as error:
        distill(net, (4, 6))
    assert "on noise of shape (4, 6)" in error.value.__notes__[0]
    assert all(not m._forward_pre_hooks for m in net)


def test_one_value_per_channel_inside_the_net():
    net = nn.Sequential(nn.Conv2d(2, 3, 4), nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="'1' gets one value per channel"):
        distill(net, (1, 2, 4, 4), steps=1)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.first(self.first(x))


def test_a_norm_that_is_not_reached_and_one_that_runs_twice():
    net = Unused()
    with pytest.raises(ValueError, match="x did not reach second"):
        distill(net, (4, 3), steps=1)
    del net.second
    net.first.running_mean += 5
    # x has mean 0 and enters a norm that remembers 5; it leaves with mean −5, and enters the same norm again.
    assert float(distill(net, (4000, 3), steps=0).losses[0]) == pytest.approx(5**2 + 10**2, rel=0.05)


def test_it_comes_to_rest():
    """At a constant learning rate, Adam near a minimum goes on jumping."""
    net, shape = trained(*KINDS["1d"]), KINDS["1d"][1]
    one, next_one = (distill(net, shape, steps=steps).x for steps in (600, 601))
    assert float((one - next_one).abs().max()) < 1e-3


def test_float64():
    net = trained(*KINDS["1d"]).double()
    assert distill(net, (8, 7), steps=2).x.dtype == torch.float64


class Asking(Method):
    keep = ("amax",)

    def __init__(self):
        self.calls = []

    def check(self, fmt, shape=None):
        raise ValueError("not this one")

    def scale(self, weights, stats, fmt):
        self.calls.append("scale")
        return None

    def quantize(self, w, fmt, stats, name):
        self.calls.append(name)
        return RTN().quantize(w, fmt, stats, name)


def test_the_method_hands_everything_else_to_codes():
    method = ZeroQ((33, 7), steps=2, codes=Asking())
    assert method.keep == ("amax",)
    with pytest.raises(ValueError, match="not this one"):
        method.check(IntAffine(4))
    assert method.scale([], None, IntAffine(4)) is None
    assert torch.equal(method.quantize(torch.eye(3), IntAffine(4), None, "x")[0].dequantize(), torch.eye(3))
    assert method.codes.calls == ["scale", "x"]
    assert repr(ZeroQ((3, 7), steps=4)) == "ZeroQ(shape=(3, 7), steps=4, lr=0.5, seed=0, codes=RTN())"


def test_calibration_data_that_the_caller_has_is_used():
    method, net = ZeroQ((33, 7), steps=2), trained(*KINDS["1d"])
    given = [torch.zeros(2, 7)]
    assert method.batches(net, given) is given
    assert torch.equal(method.batches(net, None)[0], distill(net, (33, 7), steps=2).x)


def test_quantize_model_with_static_ranges_from_distilled_data():
    make, shape = KINDS["1d"]
    net = trained(make, shape)
    x = distill(net, shape, steps=50).x
    with torch.no_grad():
        hidden = net.eval()[:3](x)
    expected = copy.deepcopy(net)
    report = quantize_model(net, IntAffine(8), ZeroQ(shape, steps=50), progress=False)
    assert list(report.layers) == ["0", "3"] and isinstance(net[0], QuantLinear)
    for layer, seen in ((net[0], x), (net[3], None)):
        assert layer.act_quant.static and layer.act_quant.calibrated and layer.act_quant.format.bits == 8
        if seen is not None:
            assert float(layer.act_quant.scale) == pytest.approx(float(seen.abs().max()) / 127)
    assert float(net[3].act_quant.scale) == pytest.approx(float(hidden.abs().max()) / 127, rel=0.05)
    fresh = data((500, 7), torch.Generator().manual_seed(5)).clamp(-2, 2)
    error = functional.mse_loss(net(fresh), expected.eval()(fresh)) / expected(fresh).var()
    assert 0 < error < 0.01


def test_activations_can_be_chosen():
    net = trained(*KINDS["1d"])
    act = ActQuant(4, symmetric=False, granularity="tensor", static=True)
    quantize_model(net, IntAffine(4), ZeroQ((33, 7), steps=2), activations=act, progress=False)
    assert net[3].act_quant.format.bits == 4 and not act.calibrated


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    net = trained(*KINDS["1d"])
    here = distill(net, (33, 7), steps=5)
    there = distill(net.cuda(), (33, 7), steps=5)
    assert there.x.is_cuda and torch.allclose(there.x.cpu(), here.x, atol=1e-2)
