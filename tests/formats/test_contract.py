"""What every format promises, whatever it stores: the binary, ternary and codebook formats on hostile weights."""

import inspect

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlab.formats.binary import Binary
from qlab.formats.ternary import Ternary
from qlab.formats.vector import KMeans, ProductQuantizer

FORMATS = [
    Binary(), Binary("tensor"), Binary("group", 3),
    Ternary("twn"), Ternary("twn", "channel"), Ternary("twn", "head", heads=3, head_axis=1),
    Ternary("bitnet"), Ternary("bitnet", "group", 3),
    KMeans(2), KMeans(3, "channel"), KMeans(1, "group", 3), KMeans(8),
    ProductQuantizer(3, bits=2), ProductQuantizer(1, bits=3), ProductQuantizer(3, bits=2, shared=True),
]  # fmt: skip
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=repr)


@st.composite
def weights(draw):
    """A 2-D weight, columns divisible by 3 and seldom by 8, of some dtype, magnitude and memory layout."""
    shape = draw(st.integers(1, 6)), 3 * draw(st.integers(1, 11))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-20, 4))
    kind = draw(st.sampled_from(["normal", "positive", "outlier", "zero row", "zero column", "ties"]))
    if kind == "positive":
        w = w.abs()
    elif kind == "outlier":
        w[0, 0] *= 1000
    elif kind == "zero row":
        w[0] = 0
    elif kind == "zero column":
        w[:, 1] = 0
    elif kind == "ties":
        w = torch.randint(-4, 5, shape, generator=generator) / 2
    w = w.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    return w.t().contiguous().t() if draw(st.booleans()) else w


@every_format
@settings(max_examples=15)
@given(w=weights())
@example(w=torch.tensor([[3e38, -3e38, 1e38]]))
@example(w=torch.tensor([[1e-45, -1e-44, 0.0]]))
@example(w=torch.randn(4, 6, 30)[:, ::2, ::2])
def test_every_weight(fmt, w):
    if w.dim() != 2 and "heads" in repr(fmt):
        w = w.flatten(1)  # heads are cut from matrices
    before = w.clone()
    q = fmt.quantize(w)
    assert torch.equal(w, before), "the weight itself must not change"
    assert q.shape == w.shape and q.dequantize().shape == w.shape and q.dequantize().dtype == w.dtype
    decoded = q.dequantize(torch.float32)
    assert decoded.isfinite().all()
    assert torch.equal(fmt.decode(q.codes, q.params), decoded)
    assert torch.equal(fmt.pack(q.codes), q.packed) and q.packed.dtype == torch.uint8
    assert torch.equal(fmt.encode(w, fmt.fit(w)), q.codes), "quantize is fit and encode"
    assert torch.equal(fmt.quantize(w.contiguous()).codes, q.codes), "the memory layout must not matter"
    assert torch.equal(fmt.unblocks(fmt.blocks(w), w.shape), w)
    lowest, highest = fmt.limits(q.params, q.shape)
    assert lowest.shape == highest.shape == w.shape
    assert (lowest <= decoded).all() and (decoded <= highest).all()
    if "bitnet" not in repr(fmt):  # the others fit by least squares, so they lose less than storing zeros would
        signal = w.double().square().sum()
        assert (w.double() - decoded).square().sum() <= signal * (1 + 1e-6) + 1e-74


@every_format
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3])
def test_constant_weights_are_exact(fmt, constant):
    w = torch.full((7, 33), constant)
    assert torch.equal(fmt.quantize(w).dequantize(), w)


@every_format
def test_one_weight_per_block(fmt):
    w = torch.tensor([[0.3, 0.3, 0.3]])
    assert torch.equal(fmt.quantize(w).dequantize(), w)


@pytest.mark.parametrize(
    "fmt", [Binary("tensor"), Ternary(), Ternary("bitnet"), KMeans(), ProductQuantizer(1)], ids=repr
)
def test_a_single_weight(fmt):
    w = torch.tensor([-0.3])
    assert torch.equal(fmt.quantize(w).dequantize(), w)
    if not isinstance(fmt, ProductQuantizer):
        assert torch.equal(fmt.quantize(w[0]).dequantize(), w[0]), "a scalar"


@every_format
@pytest.mark.parametrize("shape", [(0, 6), (4, 0)])
def test_empty(fmt, shape):
    q = fmt.quantize(torch.zeros(shape))
    assert q.dequantize().shape == shape and fmt.decode(q.codes, q.params).shape == shape


@every_format
def test_decode_is_differentiable_in_the_params(fmt):
    """decode is linear in the params of these formats, so ⟨gradient, params⟩ is the value itself."""
    w = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    params = fmt.fit(w)
    codes, cotangent = fmt.encode(w, params), torch.randn(4, 9)
    params = {name: p.requires_grad_() for name, p in params.items() if name != "threshold"}
    value = (fmt.decode(codes, params) * cotangent).sum()
    value.backward()
    assert value != 0
    torch.testing.assert_close(sum((p * p.grad).sum() for p in params.values()), value)


@every_format
def test_learned_params_are_accepted(fmt):
    """A weight under training, and params that require a gradient."""
    w = torch.nn.Parameter(torch.randn(4, 9))
    params = {name: p.detach().requires_grad_() for name, p in fmt.fit(w).items()}
    assert torch.equal(fmt.encode(w, params), fmt.quantize(w).codes)


@every_format
def test_nan_and_inf_are_refused(fmt):
    w = torch.ones(2, 9)
    w[1, 2], w[0, 5] = float("nan"), float("inf")
    for call in (fmt.fit, fmt.quantize, lambda w: fmt.encode(w, fmt.fit(torch.ones(2, 9)))):
        with pytest.raises(ValueError, match=r"1 NaN and 1 Inf in 18 values of shape \(2, 9\)"):
            call(w)


@every_format
def test_integers_are_refused(fmt):
    with pytest.raises(TypeError, match="int64"):
        fmt.quantize(torch.ones(2, 9, dtype=torch.long))


@pytest.mark.parametrize(
    "cls", [Binary, lambda **s: Ternary("bitnet", **s), lambda **s: KMeans(4, **s)], ids=["Binary", "Ternary", "KMeans"]
)
def test_groups(cls):
    with pytest.raises(ValueError, match=r"group_size=48 does not divide the row: a weight of shape \(4, 128\)"):
        cls(granularity="group", group_size=48).quantize(torch.zeros(4, 128))
    with pytest.raises(ValueError, match="'row'"):
        cls(granularity="row")
    with pytest.raises(ValueError, match="group_size=None"):
        cls(granularity="group")


@pytest.mark.parametrize("fmt, bits", [
    (Binary(), 1 + 32 / 256),
    (Binary("group", 64, param_dtype=torch.float16), 1 + 16 / 64),
    (Ternary("twn", "group", 128), 8 * 205 / 1024 + 32 / 128),  # ceil(1024 / 5) = 205 bytes
    (KMeans(3), 3 + 8 * 32 / 1024),
    (KMeans(3, "channel", param_dtype=torch.float16), 3 + 8 * 16 / 256),
    (ProductQuantizer(4, bits=2), 2 / 4 + 4 * 32 / 4),
    (ProductQuantizer(4, bits=2, shared=True, param_dtype=torch.float16), 2 / 4 + 4 * 4 * 16 / 1024),
], ids=repr)  # fmt: skip
def test_bits_per_weight_counts_every_constant(fmt, bits):
    q = fmt.quantize(torch.randn(4, 256))
    assert q.bits_per_weight == pytest.approx(bits, rel=1e-12)
    assert q.nbytes == q.packed.nbytes + sum(p.nbytes for p in q.params.values())


@pytest.mark.parametrize("fmt", [Binary(param_dtype=torch.float16), Ternary(param_dtype=torch.float16),
                                 KMeans(1, param_dtype=torch.float16), ProductQuantizer(2, param_dtype=torch.float16)],
                         ids=repr)  # fmt: skip
def test_param_dtype(fmt):
    q = fmt.quantize(torch.randn(4, 8))
    assert all(p.dtype == torch.float16 for p in q.params.values())
    with pytest.raises(ValueError, match="Inf in torch.float16"):
        fmt.quantize(torch.full((4, 8), 1e6))


@every_format
def test_it_can_be_made_again_from_its_own_settings(fmt):
    """A checkpoint's config relies on it: every constructor argument is kept under its own name."""
    settings = {name: getattr(fmt, name) for name in inspect.signature(type(fmt)).parameters}
    again, w = type(fmt)(**settings), torch.randn(4, 9)
    assert repr(again) == repr(fmt) and torch.equal(again.quantize(w).packed, fmt.quantize(w).packed)


@pytest.mark.parametrize("fmt, text", [
    (Binary("group", 64, param_dtype=torch.float16), "Binary(group 64, float16)"),
    (Ternary("bitnet", "channel"), "Ternary('bitnet', per channel)"),
    (KMeans(3), "KMeans(bits=3, per tensor)"),
    (ProductQuantizer(4, shared=True, param_dtype=torch.bfloat16), "ProductQuantizer(bits=8 for 4 weights, shared, bfloat16)"),
])  # fmt: skip
def test_repr(fmt, text):
    assert repr(fmt) == text
