"""GGUF blocks: by hand, down to the bytes; their invariants on hostile weights; what they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats.blocks import Q4_0, Q4_1, Q8_0
from qlab.formats.k_quants import Q4_K, pack_sub_scales, unpack_sub_scales

FORMATS = [Q4_0(), Q4_1(), Q8_0(), Q4_K()]
HALF_SUBNORMAL = 2.0**-24


@st.composite
def weights(draw, fmt):
    """A weight with rows of 0 to 3 blocks, of some dtype, size of numbers, number of axes and memory layout."""
    shape = (draw(st.integers(0, 4)), draw(st.integers(0, 3)) * fmt.block_size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-45, 4))
    kind = draw(st.sampled_from(["normal", "zero", "constant", "positive", "negative", "outlier", "sparse", "ties"]))
    if kind == "zero":
        w = torch.zeros(shape)
    elif kind == "constant":
        w = w[:, :1].expand(shape)
    elif kind == "positive":
        w = w.abs()
    elif kind == "negative":
        w = -w.abs()
    elif kind == "outlier":
        w[:1, :1] *= 10
    elif kind == "sparse":
        w[torch.rand(shape, generator=generator) < 0.9] = 0
    elif kind == "ties":
        w = torch.randint(-16, 17, shape, generator=generator) / 4
    w = w.clamp(-6e4, 6e4).to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    if draw(st.booleans()):
        w = w.t().contiguous().t()
    return w.reshape(draw(st.sampled_from([shape, (1, *shape), shape[1:] if shape[0] == 1 else shape])))


any_format = st.sampled_from(FORMATS).flatmap(lambda fmt: st.tuples(st.just(fmt), weights(fmt)))


def block(*weights):
    """One block of 32: the given weights, then zeros."""
    return torch.nn.functional.pad(torch.tensor(weights), (0, 32 - len(weights)))


# --- by hand


def test_q4_0_by_hand():
    """d = 4 / −8. In units of d the ties are −0.5 and 0.5: half up, so to 0 and 1. −4 would need +8: it saturates at 7."""
    q = Q4_0().quantize(block(4.0, 0.25, -0.25, 0.24, -4.0, -3.5))
    assert q.params["scale"].tolist() == [-0.5]
    assert q.codes[:7].tolist() == [-8, 0, 1, 0, 7, 7, 0] and q.codes.dtype == torch.int8
    assert q.dequantize()[:6].tolist() == [4.0, 0.0, -0.5, 0.0, -3.5, -3.5]


@pytest.mark.parametrize("first, d", [(3.0, -0.375), (-3.0, 0.375)])
def test_q4_0_of_two_equal_extremes_the_first_gives_the_sign(first, d):
    q = Q4_0().quantize(block(0.0, first, -first))
    assert q.params["scale"].tolist() == [d]
    assert q.dequantize()[1:3].tolist() == [first, -first * 7 / 8]


def test_q4_1_by_hand():
    """min −1, max 14: d = 1. Ties go up: 2.5 to 3, where half to even would give 2."""
    q = Q4_1().quantize(torch.tensor([-1.0, 14.0, 1.5, 0.5, 0.49, 0.0] + [3.0] * 26))
    assert (q.params["scale"].tolist(), q.params["min"].tolist()) == ([1.0], [-1.0])
    assert q.codes[:6].tolist() == [0, 15, 3, 2, 1, 1] and q.codes.dtype == torch.uint8
    assert q.dequantize()[:6].tolist() == [-1.0, 14.0, 2.0, 1.0, 0.0, 0.0]


def test_q8_0_by_hand():
    """amax 127: d = 1. Ties go away from zero, and the number just below a tie does not."""
    below_half = float(torch.tensor(0.5).nextafter(torch.tensor(0.0)))
    q = Q8_0().quantize(block(-127.0, 0.5, -0.5, 2.5, -2.5, below_half))
    assert q.params["scale"].tolist() == [1.0]
    assert q.codes[:6].tolist() == [-127, 1, -1, 3, -3, 0]


def test_q4_k_by_hand():
    """Sub-block j holds s_j · (0 … 15) − m_j, which the format stores exactly: d = dmin = 1."""
    s, m = torch.tensor([63, 42, 21, 1, 2, 62, 37, 5]), torch.tensor([63, 0, 7, 15, 30, 16, 33, 48])
    w = (s[:, None] * torch.arange(16.0).repeat(2) - m[:, None]).flatten()
    q = Q4_K().quantize(w)
    assert torch.equal(q.dequantize(), w)
    assert torch.equal(q.codes, torch.arange(16, dtype=torch.uint8).repeat(16))
    assert (q.params["scale"].tolist(), q.params["min"].tolist()) == ([1.0], [1.0])
    scale, depth = unpack_sub_scales(q.params["sub_scales"][0])
    assert torch.equal(scale, s) and torch.equal(depth, m)
    # Numbers 4 … 7 are cut in two: 2 = 00|0010, 62 = 11|1110, 37 = 10|0101, 5 = 00|0101; 30, 16, 33, 48 likewise.
    assert q.params["sub_scales"].tolist() == [
        [63, 0b11 << 6 | 42, 0b10 << 6 | 21, 1]
        + [0b01 << 6 | 63, 0b01 << 6 | 0, 0b10 << 6 | 7, 0b11 << 6 | 15]
        + [0b1110 << 4 | 0b0010, 0b0000 << 4 | 0b1110, 0b0001 << 4 | 0b0101, 0b0000 << 4 | 0b0101]
    ]


def test_q4_k_takes_the_grid_with_the_least_error():
    """The weights lie on 0 … 15 but for one at 15.9: stretching the grid to it would cost all others."""
    w = torch.arange(16.0).repeat(16)
    w[15] = 15.9
    q = Q4_K().quantize(w)
    assert (q.dequantize() - w).abs().max() <= 0.9 + 1e-3
    assert (q.dequantize()[:15] - w[:15]).abs().max() < 0.2  # the widest grid has step 1.06 and errs by up to 0.5


def test_bytes_by_hand():
    """1.0 in float16 is 0x3C00, stored low byte first; code i lies in the low nibble of byte i, code i + 16 in the high."""
    data = Q4_0().to_bytes(Q4_0().quantize(block(-8.0, 1.0, *[0.0] * 14, 2.0, 7.0)))
    assert data.tolist() == [0x00, 0x3C, 0xA0, 0xF9] + [0x88] * 14
    data = Q4_1().to_bytes(Q4_1().quantize(block(15.0, 1.0)))
    assert data.tolist() == [0x00, 0x3C, 0, 0, 0x0F, 0x01] + [0] * 14
    data = Q8_0().to_bytes(Q8_0().quantize(block(-127.0, 3.0)))
    assert data.tolist() == [0x00, 0x3C, 0x81, 3] + [0] * 30
    codes = torch.arange(16.0).repeat(16)
    codes[32:64] = 15 - codes[32:64]  # sub-blocks 0 and 1 share 32 bytes: low nibbles and high nibbles
    data = Q4_K().to_bytes(Q4_K().quantize(codes * 63))
    assert data[:16].tolist() == [0x00, 0x3C, 0, 0] + [0xFF] * 4 + [0] * 4 + [0x0F] * 4
    assert data[16:32].tolist() == [code | (15 - code) << 4 for code in range(16)]
    assert data.shape == (144,)


@pytest.mark.parametrize("fmt, bits", list(zip(FORMATS, [4.5, 5.0, 8.5, 4.5], strict=True)))
def test_bits_per_weight_counts_every_constant(fmt, bits):
    q = fmt.quantize(torch.randn(4, 512))
    assert q.bits_per_weight == bits
    assert fmt.to_bytes(q).numel() == q.nbytes


def test_error_on_gaussian_weights():
    """Q4_K at 4.5 bits beats Q4_1 at 5: the search for scale and min is worth more than the bits of their float16."""
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    error = [float((fmt.quantize(w).dequantize() - w).norm() / w.norm()) for fmt in FORMATS]
    assert error == pytest.approx([0.0859, 0.0783, 0.00535, 0.0713], rel=0.01)


# --- invariants


@given(any_format)
def test_shapes_dtypes_and_the_way_back_from_bytes(case):
    fmt, w = case
    before = w.clone()
    q = fmt.quantize(w)
    assert torch.equal(w, before) and torch.equal(fmt.unblocks(fmt.blocks(w), w.shape), w)
    assert q.codes.shape == w.shape == q.dequantize().shape and q.dequantize().dtype == w.dtype
    assert torch.equal(fmt.decode(q.codes, q.params), q.dequantize(torch.float32))
    back = fmt.from_bytes(fmt.to_bytes(q), dtype=w.dtype)
    assert back.shape == q.shape and torch.equal(back.packed, q.packed)
    assert back.params.keys() == q.params.keys()
    assert all(torch.equal(back.params[name], param) for name, param in q.params.items())
    assert torch.equal(back.dequantize(), q.dequantize())
    assert torch.equal(fmt.quantize(w.contiguous()).packed, q.packed), "the memory layout must not matter"


@given(any_format)
def test_errors_are_at_most_half_a_step_inside_the_limits(case):
    fmt, w = case
    q = fmt.quantize(w)
    w = w.float()
    low, high = fmt.limits(q.params, q.shape)
    assert (low <= q.dequantize(torch.float32)).all() and (q.dequantize(torch.float32) <= high).all()
    step = (high - low) / (255 if fmt.bits == 8 else 15)
    # Codes are chosen before d and m are cut to 11 bits, or to a multiple of the smallest float16.
    slack = (w.abs() + low.abs() + high.abs()) * 2.0**-10 + (127 if fmt.bits == 8 else 16) * HALF_SUBNORMAL
    clipped = torch.maximum(torch.minimum(w, high), low)
    assert ((fmt.decode(q.codes, q.params) - clipped).abs() <= step / 2 + slack).all()
    if not isinstance(fmt, Q4_K):  # Q4_0 gives up one step at one end; the others span the block
        assert ((w - clipped).abs() <= (step if isinstance(fmt, Q4_0) else 0) + slack).all()


@given(st.sampled_from([Q4_0(), Q8_0()]).flatmap(lambda fmt: st.tuples(st.just(fmt), weights(fmt))))
def test_idempotent(case):
    fmt, w = case
    once = fmt.quantize(w.float())
    assert torch.equal(fmt.quantize(once.dequantize()).dequantize(), once.dequantize())


@pytest.mark.parametrize("fmt", FORMATS)
def test_zero_and_constant_blocks(fmt):
    assert torch.equal(fmt.quantize(torch.zeros(2, 256)).dequantize(), torch.zeros(2, 256))
    for c in (3.3, -0.1, 1000.0, 1e-3):
        error = (fmt.quantize(torch.full((1, 256), c)).dequantize() - c).abs().max()
        steps = {Q8_0: 127, Q4_K: 15 * 63}.get(type(fmt), 15)  # each as wrong as the float16 that it is counted in
        assert error <= abs(c) * 2.0**-11 + steps * HALF_SUBNORMAL / 2


@pytest.mark.parametrize("fmt", FORMATS)
def test_numbers_too_small_for_float16_constants_become_zero(fmt):
    for size in (1e-9, 1e-38, 1e-41, 1e-45):
        q = fmt.quantize(torch.linspace(-1, 1, 256) * size)
        assert torch.equal(q.dequantize(), torch.zeros(256)) and q.params["scale"].abs().max() == 0
        assert size > 1e-38 or (q.codes == 0).all()  # 1/d is beyond float32


@pytest.mark.parametrize("fmt", FORMATS)
def test_encode_with_other_params_takes_the_nearest_code_of_their_grid(fmt):
    w = torch.randn(2, 256)
    params = {name: p * 2 if p.is_floating_point() else p for name, p in fmt.fit(w * 0.37).items()}
    codes = (torch.arange(2**fmt.bits) + fmt.lowest_code).clamp(min=-127)  # Q8_0 leaves −128 unused
    grid = torch.stack([fmt.decode(code.expand(w.shape), params) for code in codes])
    error = (fmt.decode(fmt.encode(w, params), params) - w).abs()
    assert (error <= (grid - w).abs().amin(0) + 1e-6).all()


@given(st.lists(st.integers(0, 63), min_size=16, max_size=16))
def test_sub_scales_come_back(numbers):
    numbers = torch.tensor(numbers, dtype=torch.uint8).view(2, 8)
    assert torch.equal(torch.stack(unpack_sub_scales(pack_sub_scales(*numbers))), numbers)


@pytest.mark.parametrize("fmt", FORMATS)
def test_decode_is_differentiable_in_the_constants(fmt):
    w = torch.randn(3, 256)
    q = fmt.quantize(w)
    params = {n: p.float().requires_grad_() if p.is_floating_point() else p for n, p in q.params.items()}
    fmt.decode(q.codes, params).sum().backward()
    if isinstance(fmt, Q4_K):
        scale, depth = unpack_sub_scales(q.params["sub_scales"])
        torch.testing.assert_close(params["scale"].grad, (fmt.blocks(q.codes).sum(-1) * scale).sum(-1).float())
        torch.testing.assert_close(params["min"].grad, -32.0 * depth.sum(-1))
    else:
        torch.testing.assert_close(params["scale"].grad, fmt.blocks(q.codes).sum(-1).float())


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_parameter_is_quantized_without_its_graph(fmt):
    q = fmt.quantize(torch.nn.Parameter(torch.randn(256)))
    assert not any(param.requires_grad for param in q.params.values())


# --- what is refused


@pytest.mark.parametrize("fmt", FORMATS)
def test_refused(fmt):
    size = fmt.block_size
    w = torch.ones(2, size)
    w[1, 3] = float("nan")
    for reject in (fmt.quantize, fmt.fit, lambda w: fmt.encode(w, fmt.fit(torch.ones(2, size)))):
        with pytest.raises(ValueError, match=r"1 NaN and 0 Inf .* index \[1, 3\]"):
            reject(w)
        with pytest.raises(TypeError, match="int64"):
            reject(torch.ones(2, size, dtype=torch.int64))
    for shape in ((2, size + 1), (2, size // 2), (1,), ()):
        with pytest.raises(ValueError, match=rf"blocks of {size}.*multiple of {size}"):
            fmt.quantize(torch.ones(shape))
    with pytest.raises(ValueError, match="beyond 65504"):
        fmt.quantize(torch.linspace(-1e9, 1e9, size))
    with pytest.raises(ValueError, match="beyond 65504"):
        fmt.quantize(torch.linspace(-1, 1, size) * 3e38)
    with pytest.raises(ValueError, match="Inf"):
        fmt.quantize(torch.full((size,), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("fmt", FORMATS)
def test_bytes_refused(fmt):
    q = fmt.quantize(torch.randn(2, 256))
    data = fmt.to_bytes(q)
    with pytest.raises(ValueError, match=rf"\(2, {data.shape[1] - 1}\)"):
        fmt.from_bytes(data[:, 1:])
    with pytest.raises(TypeError, match="int8"):
        fmt.from_bytes(data.view(torch.int8))
    q.params["scale"] = q.params["scale"].float()
    with pytest.raises(TypeError, match="scale as torch.float16, got torch.float32"):
        fmt.to_bytes(q)


def test_bytes_at_an_odd_address_are_read():
    """As in a memory-mapped file: a slice that float16 cannot be read from in place."""
    data = Q4_0().to_bytes(Q4_0().quantize(torch.randn(32)))
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), data])[1:]
    assert torch.equal(Q4_0().from_bytes(shifted).dequantize(), Q4_0().from_bytes(data).dequantize())


def test_limits_are_in_order_where_the_scale_is_negative():
    fmt, w = Q4_0(), torch.linspace(-1, 2, 32).view(1, 32)  # the largest |w| is positive: d = 2 / −8
    low, high = fmt.limits(fmt.fit(w), w.shape)
    assert (low == -1.75).all() and (high == 2).all()
