"""GPTQ on the layers of two real models, on inputs of all kinds, and as a Method."""

import random

import pytest
import torch

from qlab.calibrate import InputStats, capture, output_error
from qlab.formats import Q4_K, Binary, FloatCast, IntAffine, ProductQuantizer
from qlab.models import find_linears, load
from qlab.nn import QuantLinear, weight_of
from qlab.ptq.gptq import GPTQ, gptq
from qlab.train.corpus import Corpus

IN = 96


def grouped():
    return IntAffine(3, symmetric=False, granularity="group", group_size=16)


def weight(out=6, columns=IN):
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.05


def hessian_of():
    """Of correlated inputs, some channels larger than others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3 * IN, IN, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(IN, IN, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x)


def error_of(w_hat, w, hessian):
    return float(output_error(w_hat - w, hessian).sum())


def text_for(name, tokenizer, batches, seed):
    corpus, rng = Corpus(), random.Random(seed)
    if name == "qlab-mini":
        return [corpus.batch(tokenizer, seed, step, rows=8, length=64) for step in range(batches)]
    texts = [[corpus.document(rng) for _ in range(8)] for _ in range(batches)]
    return [dict(tokenizer(rows, padding=True, truncation=True, max_length=64, return_tensors="pt")) for rows in texts]


@pytest.mark.parametrize("name", ["qlab-mini", "all-MiniLM-L6-v2"])
def test_every_layer_of_a_model(name):
    """Output error below that of rounding to nearest on every linear layer, on text it was calibrated on and on other text."""
    model, tokenizer = load(name)
    seen = capture(model, text_for(name, tokenizer, 10, seed=0), keep=("hessian",))
    other = capture(model, text_for(name, tokenizer, 4, seed=1), keep=("hessian",))
    fmt = IntAffine(4)
    for layer, module in find_linears(model).items():
        w = weight_of(module).detach()
        q, _ = GPTQ().quantize(w, fmt, seen[layer], layer)
        ours, nearest = q.dequantize(), fmt.quantize(w).dequantize()
        ratios = [error_of(ours, w, x[layer].hessian) / error_of(nearest, w, x[layer].hessian) for x in (seen, other)]
        moved = float((ours - w).norm() / (nearest - w).norm())
        print(
            f"{layer:45} output error, seen and other text {ratios[0]:.3f} {ratios[1]:.3f}   weight error {moved:.2f}"
        )
        assert ratios[0] < 0.8 and ratios[1] < 0.9 and moved > 1


# --- inputs of all kinds


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape):
    q, g_idx = gptq(torch.zeros(shape), torch.eye(shape[1]), IntAffine(4))
    assert q.shape == shape and q.dequantize().shape == shape and g_idx is None


def test_nothing_that_is_passed_in_changes():
    w, hessian = weight(), hessian_of()
    w.requires_grad_()
    before = w.detach().clone(), hessian.clone()
    q, _ = gptq(w, hessian, grouped(), act_order=True)
    assert torch.equal(w, before[0]) and torch.equal(hessian, before[1])
    assert not any(param.requires_grad for param in q.params.values())
    transposed, _ = gptq(w.T.contiguous().T, hessian, grouped(), act_order=True)
    assert torch.equal(transposed.packed, q.packed)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("fmt", [IntAffine(3), grouped(), Binary()], ids=repr)
def test_dead_inputs(fmt, act_order):
    """Their weights become 0 before anything is fitted, and do not touch the others, which come out as without them."""
    w, hessian = weight(), hessian_of()
    dead = torch.zeros(IN, dtype=torch.bool)
    dead[[0, 17, 50, 95]] = True
    w[:, dead] = 7  # would stretch every scale
    hessian[dead], hessian[:, dead] = 0, 0
    q, g_idx = gptq(w, hessian, fmt, act_order=act_order)
    alive = w.clone()
    alive[:, dead] = 0
    hessian[dead, dead] = 1
    expected, expected_g_idx = gptq(alive, hessian, fmt)
    if not act_order:
        assert torch.equal(q.packed, expected.packed)
    ours = QuantLinear(q, g_idx=g_idx).dequantized_weight()
    assert ours.abs().max() < 1
    if fmt.lowest_code < 0:
        assert (ours[:, dead] == 0).all()
    if act_order and g_idx is not None:
        assert (g_idx[dead] == 5).all()  # the diagonal before it was set to 1 is what counts: they come last


def test_all_inputs_dead():
    q, _ = gptq(weight(), torch.zeros(IN, IN), IntAffine(3))
    assert (q.dequantize() == 0).all()


def test_an_input_so_small_that_its_square_is_zero_is_dead():
    x = torch.ones(4, 3)
    x[:, 1] = 1e-25
    x[:2, 2] = -1
    stats = InputStats(("hessian",))
    stats.observe(x)
    assert stats.hessian[1, 1] == 0 and stats.hessian[0, 1] != 0
    q, _ = gptq(weight(2, 3), stats.hessian, IntAffine(3))
    assert (q.codes[:, 1] == 0).all()


@pytest.mark.parametrize(
    "w, hessian, settings, message",
    [
        (torch.ones(3), torch.eye(3), {}, r"\(out, in\), got shape \(3,\)"),
        (torch.ones(2, 3), torch.eye(2), {}, r"shape \(3, 3\), got \(2, 2\)"),
        (torch.ones(2, 3), torch.eye(3).long(), {}, "floating-point hessian .*int64"),
        (torch.ones(2, 3), torch.eye(3) * torch.nan, {}, "9 values that are NaN or Inf"),
        (torch.full((2, 3), torch.nan), torch.eye(3), {}, "6 NaN"),
        (torch.ones(2, 2), torch.tensor([[1.0, 0.5], [0.1, 1.0]]), {}, "symmetric: .* differ from their mirror by 0.4"),
        (torch.ones(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), {}, "damping=0.01 .* is not positive definite"),
        (torch.ones(2, 2), -torch.eye(2), {}, "not positive definite"),
        (torch.ones(2, 2), torch.ones(2, 2), {"damping": 0}, "damping=0 .* raise damping, or observe more inputs"),
        (torch.ones(2, 2), torch.eye(2), {"damping": -0.1}, "damping must be 0 or more, got -0.1"),
        (torch.ones(2, 2), torch.eye(2), {"damping": torch.nan}, "damping must be 0 or more, got nan"),
        (torch.ones(2, 2), torch.eye(2), {"block_size": 0}, "block_size must be at least 1, got 0"),
    ],
)
def test_refuses(w, hessian, settings, message):
    with pytest.raises(ValueError, match=message):
        gptq(w, hessian, IntAffine(4), **settings)


def test_float64_is_worked_on_in_float64():
    """A hessian that float32 cannot decompose: 1 / (i + j + 1)."""
    i = torch.arange(10, dtype=torch.float64)
    hilbert = 1 / (i[:, None] + i + 1)
    gptq(weight(2, 10), hilbert, IntAffine(4), damping=0)
    with pytest.raises(ValueError, match="not positive definite in torch.float32"):
        gptq(weight(2, 10).float(), hilbert, IntAffine(4), damping=0)


def test_refuses_integer_weights():
    with pytest.raises(TypeError, match="floating-point weights, got torch.int8"):
        gptq(torch.ones(2, 2, dtype=torch.int8), torch.eye(2), IntAffine(4))


# --- as a method


@pytest.mark.parametrize("fmt", [FloatCast("fp16"), ProductQuantizer(4, 4), Q4_K()], ids=repr)
def test_formats_that_cannot_be(fmt):
    for call in (lambda: GPTQ().check(fmt), lambda: gptq(weight(), hessian_of(), fmt)):
        with pytest.raises(ValueError) as error:
            call()
        assert "GPTQ" in str(error.value) and repr(fmt) in str(error.value)


def test_method():
    stats = InputStats(GPTQ.keep, torch.float64)
    stats.observe(torch.randn(200, IN, generator=torch.Generator().manual_seed(5)))
    settings = {"damping": 0.1, "act_order": True, "static_groups": True, "block_size": 7}
    q, g_idx = GPTQ(**settings).quantize(weight(), grouped(), stats, "layer")
    expected, _ = gptq(weight(), stats.hessian, grouped(), **settings)
    assert torch.equal(q.packed, expected.packed) and g_idx is None
    method = GPTQ()
    method.block_size = 0  # the one setting that does not show in the result
    with pytest.raises(ValueError, match="block_size"):
        method.quantize(weight(), grouped(), stats, "layer")
    assert repr(GPTQ(**settings)) == "GPTQ(damping=0.1, act_order=True, static_groups=True, block_size=7)"
    for wrong, message in (({"damping": -1}, "damping must be"), ({"block_size": 0}, "block_size must be")):
        with pytest.raises(ValueError, match=message):
            GPTQ(**wrong)
    with pytest.raises(ValueError, match="'model.layer': .*calibration data"):
        GPTQ().quantize(weight(), grouped(), None, "model.layer")
