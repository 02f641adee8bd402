"""Hutchinson's traces against whole Hessians by torch.autograd.functional, closed forms, and everything left as it was."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qlab.formats import IntAffine
from qlab.models import find_linears, weight_of
from qlab.ptq.sensitivity import TraceEstimate, hessian_traces, loss_increase, model_loss, sensitivities, sizes

from ..models.conftest import build


def batch(seed, rows=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator), torch.randint(3, (rows,), generator=generator)


def cross_entropy(model, batch):
    x, y = batch
    return functional.cross_entropy(model(x), y)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3, bias=False)).double()


@pytest.fixture
def batches():
    return [tuple(t.double() if t.is_floating_point() else t for t in batch(seed)) for seed in (1, 2, 3)]


def exact_trace(net, name, batches, loss=cross_entropy):
    """Tr(H) / n from the whole Hessian of the layer's weight."""
    module = net.get_submodule(name)
    kept = module.weight

    def of_weight(w):
        parameters = dict(net.named_parameters()) | {f"{name}.weight": w}

        def call(*args, **kwargs):
            return torch.func.functional_call(net, parameters, args, kwargs)

        return sum(loss(call, b) for b in batches) / len(batches)

    net.eval()
    hessian = torch.autograd.functional.hessian(of_weight, kept.detach())
    n = kept.numel()
    return float(hessian.reshape(n, n).trace()) / n


def test_equals_the_exact_trace_within_its_own_error(net, batches):
    traces = hessian_traces(net, batches, cross_entropy, samples=2000)
    assert list(traces) == ["0", "3"]
    for name, trace in traces.items():
        exact = exact_trace(net, name, batches)
        assert 0 < trace.standard_error < 0.05 * abs(exact)
        assert abs(trace.mean - exact) < 4 * trace.standard_error


def test_unbiased_and_the_standard_error_is_honest(net, batches):
    """Over many seeds: the mean meets the exact trace, and the spread of the means is the standard error they claim."""
    runs = [hessian_traces(net, batches, cross_entropy, samples=8, seed=seed) for seed in range(300)]
    for name in ("0", "3"):
        means = torch.tensor([r[name].mean for r in runs], dtype=torch.float64)
        claimed = torch.tensor([r[name].standard_error for r in runs], dtype=torch.float64).square().mean().sqrt()
        assert abs(means.mean() - exact_trace(net, name, batches)) < 4 * means.std() / math.sqrt(len(runs))
        assert means.std() == pytest.approx(float(claimed), rel=0.15)


def test_a_diagonal_hessian_is_exact_with_any_z():
    """loss = ½ Σ a_k w_k²: H = diag(a), and zᵀ H z = Σ a_k for every z of ±1."""
    net = nn.Linear(4, 3, bias=False)
    a = torch.arange(12.0).reshape(3, 4)
    traces = hessian_traces(net, [None], lambda model, _: (a * model.weight.square()).sum() / 2, samples=2)
    assert traces[""].mean == pytest.approx(float(a.mean())) and traces[""].standard_error == pytest.approx(0, abs=1e-6)


def test_mean_square_loss_has_the_input_moment_for_a_trace():
    """loss = mean over rows of ‖W x‖² / 2: H = I ⊗ mean(x xᵀ), so Tr(H) / n = mean of x²; batches are averaged."""
    net, xs = nn.Linear(6, 2, bias=False), [torch.randn(8, 6), 3 * torch.randn(8, 6)]
    traces = hessian_traces(net, xs, lambda model, x: model(x).square().sum(1).mean() / 2, samples=400)
    exact = float(torch.stack(xs).square().mean())
    assert abs(traces[""].mean - exact) < 4 * traces[""].standard_error < exact


def test_negative_curvature_is_reported_and_a_straight_loss_has_none():
    net = nn.Linear(3, 2, bias=False)
    assert hessian_traces(net, [0], lambda m, _: -m.weight.square().sum() / 2)[""].mean == pytest.approx(-1)
    assert hessian_traces(net, [0], lambda m, _: m.weight.sum())[""] == TraceEstimate(0.0, 0.0)


def test_same_seed_same_traces_and_layers_can_be_chosen(net, batches):
    one = hessian_traces(net, batches, cross_entropy, samples=4, seed=3)
    assert one == hessian_traces(net, batches, cross_entropy, samples=4, seed=3)
    assert one != hessian_traces(net, batches, cross_entropy, samples=4, seed=4)
    alone = hessian_traces(net, iter(batches), cross_entropy, layers="3", samples=500)
    assert list(alone) == ["3"]
    assert abs(alone["3"].mean - exact_trace(net, "3", batches)) < 4 * alone["3"].standard_error


def test_leaves_everything_as_it_was(net, batches):
    net[0].weight.requires_grad_(False)
    net[3].weight.grad = torch.ones_like(net[3].weight)
    net.train()
    net[1].eval()
    before = {name: p.clone() for name, p in net.named_parameters()}
    for run in (
        lambda loss: hessian_traces(net, batches, loss, samples=2),
        lambda loss: loss_increase(net, batches, {"int2": IntAffine(2)}, loss),
    ):
        run(cross_entropy)
        with pytest.raises(ZeroDivisionError):
            run(lambda model, batch: 1 / 0)
        assert [m.training for m in net] == [True, False, True, True] and net.training
        assert [p.requires_grad for p in net.parameters()] == [False, True, True]
        assert net[0].weight.grad is None and torch.equal(net[3].weight.grad, torch.ones_like(net[3].weight))
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert-mlm"])
def test_transformers_models_with_their_own_loss(architecture):
    model = build(architecture)
    assert model.config._attn_implementation == "sdpa"
    ids = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids}]
    traces = hessian_traces(model, batches, samples=64)
    assert set(traces) == set(find_linears(model)) - {"lm_head", "cls.predictions.decoder"}
    name = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.attn.c_attn"}.get(
        architecture, "bert.encoder.layer.0.attention.self.value"
    )
    assert isinstance(model.get_submodule(name), Conv1D) == (architecture == "gpt2")
    alone = hessian_traces(model, batches, layers=[name], samples=64, seed=1)[name]
    both = math.hypot(alone.standard_error, traces[name].standard_error)
    assert alone.standard_error > 0 and abs(alone.mean - traces[name].mean) < 4 * both


def test_eager_and_sdpa_attention_agree():
    model = build("llama")
    batches = [{"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.arange(12).reshape(2, 6)}]
    fused = hessian_traces(model, batches, samples=4)
    model.set_attn_implementation("eager")
    for name, trace in hessian_traces(model, batches, samples=4).items():
        assert trace.mean == pytest.approx(fused[name].mean, rel=1e-3, abs=1e-7)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_an_operation_without_a_second_derivative_says_what_to_do():
    with pytest.raises(RuntimeError) as error:
        hessian_traces(nn.Linear(2, 2), [torch.ones(3, 2)], lambda model, x: Once.apply(model(x)).square().sum())
    assert "eager" in error.value.__notes__[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"samples": 1}, "at least 2 samples"),
        ({"batches": []}, "no batches"),
        ({"layers": ["1"]}, "'1' is no linear layer"),
        ({"layers": []}, "no linear layer"),
        ({"loss": lambda model, batch: model(batch[0])}, "one finite number"),
        ({"loss": lambda model, batch: cross_entropy(model, batch) * math.nan}, "one finite number"),
        ({"loss": lambda model, batch: model[3].weight.square().sum()}, "does not depend on the weight of 0"),
        ({"loss": lambda model, batch: torch.tensor(1.0)}, "does not depend on the weight of 0, 3"),
    ],
)
def test_refuses(net, batches, change, words):
    arguments = {"batches": batches, "loss": cross_entropy} | change
    with pytest.raises(ValueError, match=words):
        hessian_traces(net, **arguments)


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match="computed no loss: add labels"):
        model_loss(build("llama"), {"input_ids": torch.arange(4)[None]})
    with pytest.raises(ValueError, match="no batches"):
        loss_increase(build("llama"), [], {})


def test_integer_weights_are_refused(net, batches):
    net[3].weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="'3' is torch.int8 codes"):
        hessian_traces(net, batches, cross_entropy)


def test_sensitivity_is_trace_times_squared_error():
    weights = {"a": torch.randn(3, 8), "b": torch.randn(5, 7)}  # neither size is a multiple of 8 bits
    traces = {"a": TraceEstimate(2.0, 0.1), "b": TraceEstimate(-1.0, 0.1)}
    formats = {"int2": IntAffine(2), "int8": IntAffine(8), "float": None}
    omega = sensitivities(weights, formats, traces)
    for name, w in weights.items():
        for label in ("int2", "int8"):
            error = (formats[label].quantize(w).dequantize() - w).double().square().sum()
            assert omega[name][label] == pytest.approx(traces[name].mean * float(error))
        assert omega[name]["float"] == 0
    assert omega["a"]["int2"] > omega["a"]["int8"] > 0 > omega["b"]["int2"]
    assert sizes(weights, formats, weights) == {
        name: {label: f.quantize(w).nbytes if f else w.nbytes for label, f in formats.items()}
        for name, w in weights.items()
    }


def test_weights_are_read_from_a_model_whatever_its_layers():
    model = build("gpt2")
    name = "transformer.h.0.attn.c_attn"  # Conv1D: stored (in, out), quantized as (out, in)
    trace, formats = {name: TraceEstimate(1.0, 0.0)}, {"int4": IntAffine(4)}
    weights = {name: weight_of(model.get_submodule(name))}
    assert sensitivities(model, formats, trace) == sensitivities(weights, formats, trace)
    assert sizes(model, formats, [name]) == sizes(weights, formats, [name])


def test_errors_name_the_layer_and_the_format():
    weights, trace = {"a": torch.randn(3, 10)}, {"a": TraceEstimate(1.0, 0.0)}
    with pytest.raises(ValueError, match="does not divide") as error:
        sensitivities(weights, {"g4": IntAffine(4, granularity="group", group_size=4)}, trace)
    assert error.value.__notes__ == ["while quantizing 'a' to 'g4'"]
    with pytest.raises(ValueError, match="no weight for 'b', only for a"):
        sensitivities(weights, {}, {"b": trace["a"]})


def test_loss_increase_is_what_replacing_the_layer_does(net, batches):
    formats = {"int2": IntAffine(2), "float": None}
    increases = loss_increase(net, iter(batches), formats, cross_entropy)
    net.eval().requires_grad_(False)
    before = sum(float(cross_entropy(net, b)) for b in batches) / len(batches)
    for name, layer in find_linears(net).items():
        assert increases[name]["float"] == 0
        kept = layer.weight.data
        layer.weight.data = formats["int2"].quantize(kept).dequantize()
        after = sum(float(cross_entropy(net, b)) for b in batches) / len(batches)
        layer.weight.data = kept
        assert increases[name]["int2"] == pytest.approx(after - before, abs=1e-12) and after != before


def test_half_of_it_is_the_mean_increase_under_random_errors(net, batches):
    """What Ω stands for: Σ over random directions of loss(w + δ) + loss(w − δ) − 2 loss(w), the gradient term cancelled."""
    trace = hessian_traces(net, batches, cross_entropy, layers="3", samples=2000)["3"]
    layer, size, changes = net[3], 1e-3, []
    net.eval().requires_grad_(False)
    kept = layer.weight.data.clone()

    def loss_at(w):
        layer.weight.data = w
        return sum(float(cross_entropy(net, b)) for b in batches) / len(batches)

    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        delta = size * torch.randn(kept.shape, generator=generator, dtype=kept.dtype)
        changes.append((loss_at(kept + delta) + loss_at(kept - delta) - 2 * loss_at(kept)) / 2)
    predicted = trace.mean * size**2 * kept.numel() / 2
    assert sum(changes) / len(changes) == pytest.approx(predicted, rel=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu():
    model = build("llama")
    ids = torch.arange(12).reshape(2, 6)
    batches = [{"input_ids": ids, "labels": ids}]
    here = hessian_traces(model, batches, samples=4)
    for name, trace in hessian_traces(model.cuda(), batches, samples=4).items():
        assert trace.mean == pytest.approx(here[name].mean, rel=1e-2, abs=1e-6)
