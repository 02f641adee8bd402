"""MXFP4 and NVFP4: by hand, their invariants on hostile weights, and the published error on Gaussian weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats.microscaling import MXFP4, NVFP4, nearest_e2m1

FORMATS = [MXFP4(), NVFP4()]
TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


@st.composite
def weights(draw, smallest=-44):
    shape = (draw(st.integers(0, 4)), draw(st.integers(0, 3)) * 32)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(smallest, 37))
    kind = draw(st.sampled_from(["normal", "zero", "constant", "outlier", "sparse", "ties"]))
    if kind == "zero":
        w = torch.zeros(shape)
    elif kind == "constant":
        w = w[:, :1].expand(shape)
    elif kind == "outlier":
        w[:1, :1] *= 30
    elif kind == "sparse":
        w[torch.rand(shape, generator=generator) < 0.9] = 0
    elif kind == "ties":
        w = torch.randint(-32, 33, shape, generator=generator) / 4
    w = w.clamp(-3e38, 3e38).to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    return w.t().contiguous().t() if draw(st.booleans()) else w


def test_rounding_by_hand():
    x = torch.tensor(TIES)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert grid[nearest_e2m1(x, ties_to_even=False).long()].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    assert grid[nearest_e2m1(x, ties_to_even=True).long()].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    for ties_to_even in (False, True):
        for direction, expected in ((-1.0, range(7)), (9.0, range(1, 8))):  # one float32 step off a tie decides it
            near = x.nextafter(torch.tensor(direction))
            assert nearest_e2m1(near, ties_to_even).tolist() == list(expected)
            assert nearest_e2m1(-near[1:], ties_to_even).tolist() == [8 + code for code in expected][1:]
        assert nearest_e2m1(torch.tensor([7.0, 1e30, -1e30]), ties_to_even).tolist() == [7, 7, 15]
    assert nearest_e2m1(torch.tensor([-0.1, -0.0]), ties_to_even=True).tolist() == [8, 8]
    assert nearest_e2m1(torch.tensor([-0.1, -0.0]), ties_to_even=False).tolist() == [0, 0]


def test_mxfp4_by_hand():
    """amax 7.9: scale 2 ** (2 − 2) = 1, and 7.9 saturates. amax 12: scale 2, −3.5/2 and 0.5/2 are ties, toward zero."""
    w = torch.zeros(2, 32)
    w[0, :4] = torch.tensor([7.9, -3.5, 0.3, -0.2])
    w[1, :4] = torch.tensor([8.0, -3.5, 0.5, 12.0])
    q = MXFP4().quantize(w)
    assert q.params["scale"].float().tolist() == [[1.0], [2.0]]
    assert q.params["scale"].view(torch.uint8).tolist() == [[127], [128]]
    assert q.codes[:, :4].tolist() == [[7, 13, 1, 0], [6, 11, 0, 7]]
    assert q.dequantize()[:, :4].tolist() == [[6.0, -3.0, 0.5, 0.0], [8.0, -3.0, 0.0, 12.0]]
    assert MXFP4().to_bytes(q)[0, :5].tolist() == [127, 0x07, 0x0D, 0x01, 0x00]


@pytest.mark.parametrize("power", [-125, -100, -3, 0, 1, 60, 127])
def test_mxfp4_scale_changes_at_powers_of_2(power):
    w = torch.zeros(2, 32)
    w[0, 5], w[1, 5] = -(2.0**power), 2.0**power * 0.9999  # closer than that, see tests/parity
    scale = MXFP4().fit(w)["scale"].float()
    assert scale.tolist() == [[2.0 ** (power - 2)], [2.0 ** max(power - 3, -127)]]


def test_nvfp4_by_hand():
    """amax of the tensor 2688 = 448 · 6: tensor_scale 1. Block scales 448, and 1.1 / 6 = 0.1833 ≈ 1.5 · 2⁻³ in E4M3."""
    w = torch.zeros(1, 48)
    w[0, 0], w[0, 16:20], w[0, 32] = 2688.0, torch.tensor([1.1, -0.5, 0.2, 0.04]), 1e-6
    q = NVFP4().quantize(w)
    assert q.params["tensor_scale"] == 1.0
    assert q.params["scale"].float().tolist() == [[448.0, 0.1875, 2.0**-6]]
    assert q.codes[0, 16:20].tolist() == [7, 13, 2, 0]
    assert q.dequantize()[0, [0, 16, 17, 18, 32]].tolist() == [2688.0, 1.125, -0.5625, 0.1875, 0.0]


def test_bits_per_weight_counts_every_constant():
    w = torch.randn(4, 256)
    assert MXFP4().quantize(w).bits_per_weight == 4 + 8 / 32
    assert NVFP4().quantize(w).bits_per_weight == 4 + 8 / 16 + 32 / w.numel()
    assert MXFP4().to_bytes(MXFP4().quantize(w)).shape == (4, 256 // 32 * 17)


def test_error_on_gaussian_weights():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    error = [float((fmt.quantize(w).dequantize() - w).norm() / w.norm()) for fmt in FORMATS]
    assert error == pytest.approx([0.115, 0.0953], abs=5e-4)


@given(weights(), st.sampled_from(FORMATS))
def test_every_weight_gets_the_nearest_value_of_its_block(w, fmt):
    q = fmt.quantize(w)
    assert q.codes.shape == w.shape == q.dequantize().shape and q.dequantize().dtype == w.dtype
    w_hat = q.dequantize(torch.float32)
    assert torch.equal(fmt.decode(q.codes, q.params), w_hat) and w_hat.isfinite().all()
    scale = q.params["scale"].float() * q.params.get("tensor_scale", torch.tensor(1.0))
    grid = scale.repeat_interleave(fmt.block_size, -1)[..., None] * fmt.values
    w = w.float()
    assert ((w_hat - w).abs() <= (grid - w[..., None]).abs().amin(-1) + 1e-6 * w.abs() + 2e-45).all()


@given(weights())
def test_mxfp4_is_idempotent_and_comes_back_from_bytes(w):
    fmt = MXFP4()
    q = fmt.quantize(w.float())
    assert torch.equal(fmt.quantize(q.dequantize()).dequantize(), q.dequantize())
    back = fmt.from_bytes(fmt.to_bytes(q))
    assert torch.equal(back.packed, q.packed) and torch.equal(back.dequantize(), q.dequantize())


@given(weights(smallest=-30), st.sampled_from(FORMATS))
def test_scales_fit_their_blocks(w, fmt):
    """MXFP4: amax is 4 to 8 scales, and above 6 is cut off. NVFP4: amax is 6 scales, but for the rounding of E4M3."""
    blocks = fmt.blocks(w.float())
    amax = blocks.abs().amax(-1, keepdim=True)
    error = (fmt.blocks(fmt.quantize(w).dequantize(torch.float32)) - blocks).abs()
    if isinstance(fmt, MXFP4):
        assert (error <= amax / 4).all()
    elif w.numel():
        in_range = amax >= amax.max() / 28672
        assert (error <= amax / 5)[in_range.expand(blocks.shape)].all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_and_the_smallest_and_largest_numbers(fmt):
    assert torch.equal(fmt.quantize(torch.zeros(2, 32)).dequantize(), torch.zeros(2, 32))
    for size in (1e-45, 1e-40, 1e-36, 1e-33, 3.4e38):
        w = torch.linspace(-1, 1, 32) * size
        w_hat = fmt.quantize(w).dequantize()
        assert w_hat.isfinite().all()
        assert size < 1e-35 or (w_hat - w).abs().max() <= size / 3
    empty = fmt.quantize(torch.zeros(3, 0))
    assert empty.codes.shape == (3, 0) and empty.dequantize().shape == (3, 0)


def test_decode_is_differentiable_in_the_scales():
    w = torch.randn(3, 32)
    for fmt in FORMATS:
        q = fmt.quantize(w)
        params = {name: p.float().requires_grad_() for name, p in q.params.items()}
        fmt.decode(q.codes, params).sum().backward()
        per_block = fmt.blocks(fmt.values[q.codes.long()]).sum(-1)
        tensor_scale = q.params.get("tensor_scale", torch.tensor(1.0))
        torch.testing.assert_close(params["scale"].grad, per_block * tensor_scale)
        if isinstance(fmt, NVFP4):
            torch.testing.assert_close(params["tensor_scale"].grad, (per_block * q.params["scale"].float()).sum())


@pytest.mark.parametrize("fmt", FORMATS)
def test_refused(fmt):
    w = torch.ones(2, 32)
    w[1, 3] = float("inf")
    for reject in (fmt.quantize, fmt.fit, lambda w: fmt.encode(w, fmt.fit(torch.ones(2, 32)))):
        with pytest.raises(ValueError, match=r"0 NaN and 1 Inf .* index \[1, 3\]"):
            reject(w)
        with pytest.raises(TypeError, match="int64"):
            reject(torch.ones(2, 32, dtype=torch.int64))
    for shape in ((2, 40), (1,), ()):
        with pytest.raises(ValueError, match=rf"multiple of {fmt.block_size}"):
            fmt.quantize(torch.ones(shape))
    with pytest.raises(ValueError, match="Inf"):
        fmt.quantize(torch.full((32,), 1e300, dtype=torch.float64))
