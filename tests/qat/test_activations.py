"""FakeActivations: what shares a range, watching, freezing, gradients, and what it is stored as."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.calibrate import MSE, MinMax, Percentile
from qlab.formats import IntAffine
from qlab.nn import ActQuant
from qlab.qat import FakeActivations


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def activations(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (*draw(st.lists(st.integers(0, 4), max_size=2)), 4 * draw(st.integers(1, 3)))
    x = torch.randn(shape, generator=g) * 10.0 ** draw(st.integers(-20, 4))
    kind = draw(st.sampled_from(["normal", "positive", "zero", "constant", "ties"]))
    x = {"positive": x.abs(), "zero": x * 0, "constant": x * 0 - 3.3, "ties": (x * 4).round() / 2}.get(kind, x)
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@given(activations(), st.integers(2, 8), st.booleans(), st.sampled_from(["token", "tensor"]))
def test_dynamic_is_act_quant(x, bits, symmetric, granularity):
    ours, reference = FakeActivations(bits, symmetric, granularity), ActQuant(bits, symmetric, granularity)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(a), reference(b)
    assert y.dtype == x.dtype and torch.equal(y, expected)
    y.float().sum().backward()
    assert torch.equal(a.grad, torch.ones_like(x))
    assert ours.state_dict() == {} and torch.equal(ours.act_quant()(x), y)


@settings(max_examples=40)
@given(activations(), st.integers(2, 8), st.booleans())
def test_static_per_tensor_is_act_quant_frozen_on_what_was_watched(x, bits, symmetric):
    watched = [random(3, x.shape[-1], seed=1), random(2, x.shape[-1], seed=2)]
    ours, observer = FakeActivations(bits, symmetric, warmup=2, observer=lambda: Percentile(90)), Percentile(90)
    for batch in watched:
        assert ours(batch) is batch, "while it watches, x goes through"
        observer.observe(batch)
    reference = ActQuant(bits, symmetric, "tensor", static=True).freeze(*observer.range())
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(a), reference(b)
    assert torch.equal(y, expected) and torch.equal(ours.act_quant()(x), y)
    y.float().sum().backward()
    expected.float().sum().backward()
    step = reference.scale
    low, high = (reference.format.decode(torch.tensor(end), dict(reference.named_buffers()))
                 for end in (reference.format.qmin, reference.format.qmax))  # fmt: skip
    tie = ((x.float() - low).abs() - step / 2).abs().minimum(((x.float() - high).abs() - step / 2).abs()) < step * 1e-5
    assert torch.equal(a.grad[~tie], b.grad[~tie])


def test_channels_and_groups_share_what_they_say():
    """One column is a hundred times larger than the others: only its own range may know."""
    x = random(50, 6)
    x[:, 2] *= 100
    errors = {}
    for granularity, size in (("tensor", None), ("token", None), ("group", 3), ("channel", None)):
        for warmup in {0, 0 if granularity == "token" else 1}:
            fake = FakeActivations(4, granularity=granularity, group_size=size, warmup=warmup)
            fake(x)
            errors[granularity, warmup] = (fake(x) - x)[:, [0, 1, 3, 4, 5]].square().mean().sqrt()
    assert errors["channel", 0] < 0.15 and errors["channel", 1] < 0.15 and errors["tensor", 0] > 0.9
    assert errors["channel", 0] < errors["group", 0] < errors["tensor", 0] * 1.01
    channel = FakeActivations(4, granularity="channel")(x)
    for column in range(6):
        assert torch.equal(channel[:, column], IntAffine(4, granularity="tensor").quantize(x[:, column]).dequantize())
    group = FakeActivations(4, granularity="group", group_size=3)(x)
    assert torch.equal(group, IntAffine(4, granularity="group", group_size=3).quantize(x).dequantize())
    static = FakeActivations(4, granularity="group", group_size=3, warmup=1)
    static(x)
    for columns in (slice(0, 3), slice(3, 6)):
        expected = IntAffine(4, granularity="tensor").quantize(x[:, columns]).dequantize()
        assert torch.equal(static(x)[:, columns], expected)
    assert static.scale.shape == (2,)


@pytest.mark.parametrize("granularity, size, ranges", [("tensor", None, 1), ("channel", None, 6), ("group", 2, 3)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_watches_then_freezes(granularity, size, ranges, symmetric):
    fake = FakeActivations(8, symmetric, granularity, size, warmup=2)
    x = random(2, 3, 6)
    assert fake(x) is x and fake(2 * x) is not None and not fake.frozen and fake.state_dict() == {}
    fake(x)
    assert fake.frozen and fake.scale.shape == (ranges,) and not fake.observers
    assert set(fake.state_dict()) == ({"scale"} if symmetric else {"scale", "zero_point"})
    before = {name: buffer.clone() for name, buffer in fake.named_buffers()}
    for _ in range(3):
        fake(100 * x)
    assert all(torch.equal(before[name], buffer) for name, buffer in fake.named_buffers()), "frozen is frozen"
    loud = (100 * x).requires_grad_()
    fake(loud).sum().backward()
    assert ((loud.grad == 0) == (loud.grad != 1)).all() and (loud.grad == 0).any() and fake(loud).abs().max() < 10
    again = FakeActivations(8, symmetric, granularity, size, warmup=2)
    again.load_state_dict(fake.state_dict())
    assert again.frozen and torch.equal(again.eval()(x), fake.eval()(x))


def test_eval_mode_never_watches():
    fake = FakeActivations(warmup=2)
    fake(random(2, 4))
    with pytest.raises(RuntimeError, match="1 of 2 batches were watched"):
        fake.eval()(random(2, 4))
    fake.freeze()
    fake(random(2, 4))
    assert fake.watched == 1
    with pytest.raises(RuntimeError, match="nothing was watched"):
        FakeActivations(warmup=2).freeze()


def test_observers_of_every_kind():
    for make in (MinMax, lambda: MSE(4), lambda: Percentile(99)):
        fake = FakeActivations(4, warmup=1, observer=make)
        fake(random(20, 8))
        assert fake(random(20, 8)).unique().numel() <= 15


def test_half_precision_does_not_overflow():
    x = torch.tensor([[65504.0, -1.0]], dtype=torch.float16)
    assert FakeActivations(2, narrow=False)(x).isfinite().all()


def test_copies_watch_apart():
    template = FakeActivations(warmup=1)
    one, other = copy.deepcopy(template), copy.deepcopy(template)
    one(random(2, 4))
    one(random(2, 4))
    assert one.frozen and not other.frozen and not template.frozen


def test_what_cannot_be_stored_says_so():
    for settings_ in ({"granularity": "channel"}, {"granularity": "group", "group_size": 2}):
        with pytest.raises(ValueError, match=f"activations per {settings_['granularity']} cannot be stored"):
            FakeActivations(**settings_).act_quant()
    with pytest.raises(ValueError, match="0 of 3 batches were watched"):
        FakeActivations(warmup=3).act_quant()


@pytest.mark.parametrize("settings_, message", [
    ({"granularity": "row"}, "got 'row'"),
    ({"granularity": "group"}, "group_size=None"),
    ({"group_size": 4}, "group_size=4"),
    ({"granularity": "token", "warmup": 3}, "tokens to come"),
    ({"warmup": -1}, "warmup=-1"),
    ({"bits": 1}, "1 bit"),
])  # fmt: skip
def test_settings_that_contradict_each_other(settings_, message):
    with pytest.raises(ValueError, match=message):
        FakeActivations(**settings_)


def test_inputs_that_do_not_fit():
    fake = FakeActivations(granularity="group", group_size=4, warmup=1)
    with pytest.raises(ValueError, match=r"group_size=4 does not divide the last axis of x, \(2, 6\)"):
        fake(random(2, 6))
    fake(random(2, 8))
    fake(random(2, 8))
    with pytest.raises(ValueError, match=r"2 ranges were watched, x of shape \(2, 4\) needs 1"):
        fake(random(2, 4))
    for bad, error in ((torch.tensor([[float("nan")]]), ValueError), (torch.ones(2, 2, dtype=torch.long), TypeError),
                       (torch.tensor(1.0), ValueError)):  # fmt: skip
        with pytest.raises(error):
            FakeActivations()(bad)
