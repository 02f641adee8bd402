"""FakeQuant: where the grid lies, what of it learns, and that what is stored has the bits of the forward pass."""

import copy

import pytest
import torch

from qlab.formats import (
    FP4,
    MXFP4,
    NF4,
    NVFP4,
    Q4_0,
    Q4_1,
    Q4_K,
    Q8_0,
    Binary,
    FloatCast,
    IntAffine,
    KMeans,
    ProductQuantizer,
    Ternary,
)
from qlab.qat import LSQ, BinaryConnect, FakeQuant

FORMATS = [
    IntAffine(8), IntAffine(4, granularity="tensor"), IntAffine(3, False, "group", 32, param_dtype=torch.float16),
    IntAffine(4, False, float_zero_point=True), NF4(64), FP4(32), Binary(), Binary("group", 32, torch.float16),
    Ternary("twn"), Ternary("bitnet"), KMeans(2), KMeans(2, "channel"), ProductQuantizer(4, bits=2), Q4_0(), Q4_1(), Q8_0(),
]  # fmt: skip
NOT_LEARNED = [NF4(64, double_quant=True), FloatCast("fp16"), Q4_K(), MXFP4(), NVFP4()]
every_format = pytest.mark.parametrize("fmt", FORMATS + NOT_LEARNED, ids=repr)
learned_formats = pytest.mark.parametrize("fmt", FORMATS, ids=repr)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


W = random(4, 256)


@every_format
@pytest.mark.parametrize("grid", ["refit", "frozen"])
def test_what_is_stored_is_what_was_computed(fmt, grid):
    fake, w = FakeQuant(fmt, W, grid), random(4, 256, seed=1)
    q = fake.quantize(w)
    assert torch.equal(fake(w), q.dequantize())
    expected = fmt.quantize(w if grid == "refit" else W)
    assert q.nbytes == expected.nbytes
    for name, param in expected.params.items():
        assert q.params[name].dtype == param.dtype and torch.equal(q.params[name].float(), param.float())
    assert torch.equal(fake(W), fmt.quantize(W).dequantize())


@learned_formats
def test_a_learned_grid_is_stored_as_computed(fmt):
    fake, w = FakeQuant(fmt, W, "learned"), random(4, 256, seed=1)
    assert torch.equal(fake(W), fmt.quantize(W).dequantize()), "it starts where the format would be"
    with torch.no_grad():
        for parameter in fake.parameters():
            assert parameter.dtype == torch.float32
            parameter.mul_(1 + 0.1 * random(*parameter.shape, seed=2).abs())
    q, w_hat = fake.quantize(w), fake(w)
    assert torch.equal(w_hat, q.dequantize()) and not torch.equal(w_hat, FakeQuant(fmt, W, "frozen")(w))
    expected = fmt.quantize(W)
    assert q.nbytes == expected.nbytes and not any(param.requires_grad for param in q.params.values())
    assert {n: p.dtype for n, p in q.params.items()} == {n: p.dtype for n, p in expected.params.items()}
    w_hat.square().sum().backward()
    assert all((parameter.grad != 0).any() for parameter in fake.parameters())


@pytest.mark.parametrize("fmt", NOT_LEARNED, ids=repr)
def test_grids_that_cannot_be_learned(fmt):
    if isinstance(fmt, Q4_K):  # d and dmin are float16 numbers; the 6-bit multiples stay as they are
        assert {name for name, _ in FakeQuant(fmt, W, "learned").named_parameters()} == {"scale", "min"}
        return
    with pytest.raises(ValueError, match="cannot be learned") as caught:
        FakeQuant(fmt, W, "learned")
    assert repr(fmt) in str(caught.value)


def test_a_grid_that_follows_the_weights_clips_nothing():
    for fmt in (IntAffine(2), Binary(), Ternary()):
        w = random(4, 256).requires_grad_()
        FakeQuant(fmt, w)(w).sum().backward()
        assert torch.equal(w.grad, torch.ones_like(w))
    w = random(4, 256).requires_grad_()
    FakeQuant(IntAffine(2), w / 4, "frozen")(w).sum().backward()
    assert 0 < w.grad.mean() < 1


def test_state_dicts():
    asymmetric = IntAffine(4, False)
    assert FakeQuant(asymmetric, W).state_dict() == {}
    assert set(FakeQuant(asymmetric, W, "frozen").state_dict()) == {"scale", "zero_point"}
    learned = FakeQuant(asymmetric, W, "learned")
    assert [name for name, _ in learned.named_parameters()] == ["scale"] and set(learned.state_dict()) == {
        "scale",
        "zero_point",
    }
    assert set(FakeQuant(Ternary(), W, "learned").state_dict()) == {"scale", "threshold"}
    again = FakeQuant(asymmetric, random(4, 256, seed=3), "learned")
    with torch.no_grad():
        learned.scale.mul_(1.3)
    again.load_state_dict(learned.state_dict())
    assert torch.equal(again(W), learned(W))


def test_casting_the_model_leaves_frozen_grids_alone():
    fake = FakeQuant(IntAffine(4), W, "frozen")
    before = fake.scale.clone()
    assert torch.equal(fake.bfloat16().scale, before)


def test_the_fitted_weight_is_not_kept():
    w = W.clone()
    fake = FakeQuant(IntAffine(4), w, "frozen")
    before = fake(W)
    w.zero_()
    assert torch.equal(fake(W), before)
    assert not any(isinstance(value, torch.Tensor) and value.numel() == W.numel() for value in vars(fake).values())


@pytest.mark.parametrize("make", [lambda: FakeQuant(IntAffine(4), W, "learned"), lambda: FakeQuant(NF4(64), W, "frozen"),
                                  lambda: LSQ(IntAffine(4), W), lambda: BinaryConnect(Binary("tensor"), W)])  # fmt: skip
def test_training_on_does_not_change_what_was_stored(make):
    fake = make()
    q = fake.quantize(W)
    before = q.dequantize()
    with torch.no_grad():
        for tensor in fake.state_dict().values():
            tensor.mul_(3)
    assert torch.equal(q.dequantize(), before)


def test_a_copy_is_independent():
    fake = FakeQuant(IntAffine(4), W, "learned")
    other = copy.deepcopy(fake)
    with torch.no_grad():
        other.scale.mul_(2)
    assert not torch.equal(other(W), fake(W))


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
def test_a_step_that_was_learned_away(value):
    fake = FakeQuant(IntAffine(4), W, "learned")
    fake.scale.data[0] = value
    for call in (fake, fake.quantize):
        with pytest.raises(RuntimeError, match="lower the learning rate"):
            call(W)


def test_mistakes():
    with pytest.raises(ValueError, match="grid must be one of refit, frozen, learned, got 'fixed'"):
        FakeQuant(IntAffine(4), W, "fixed")
    with pytest.raises(ValueError, match=r"group_size=48 does not divide .*\(4, 256\)"):
        FakeQuant(IntAffine(4, granularity="group", group_size=48), W)
    with pytest.raises(ValueError, match="NaN"):
        FakeQuant(IntAffine(4), W.log(), "frozen")
