"""IntAffine against torch's fake-quantize (bit for bit, ties included) and torchao."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats import IntAffine


def hostile(seed, shape=(16, 48)):
    """Random weights of a random size, with rows of exact ties, an outlier, a zero row and a constant row."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * 10.0 ** float(torch.randint(-6, 4, (), generator=g))
    w[0] = torch.randint(-31, 32, shape[1:], generator=g) / 2 * w.abs().max()
    w[1, 3] *= 1000
    w[2], w[3] = 0, w[3, 0].clone()
    return w


@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans())
def test_per_tensor_equals_torch_bit_for_bit(seed, bits, symmetric):
    w = hostile(seed)
    fmt = IntAffine(bits, symmetric, "tensor")
    q = fmt.quantize(w)
    zero_point = 0 if symmetric else int(q.params["zero_point"])
    expected = torch.fake_quantize_per_tensor_affine(w, float(q.params["scale"]), zero_point, fmt.qmin, fmt.qmax)
    assert torch.equal(q.dequantize(), expected)


@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans())
def test_per_channel_equals_torch_bit_for_bit(seed, bits, symmetric):
    w = hostile(seed)
    fmt = IntAffine(bits, symmetric, "channel")
    q = fmt.quantize(w)
    scale = q.params["scale"]
    zero_point = torch.zeros(len(w), dtype=torch.int32) if symmetric else q.params["zero_point"].int()
    expected = torch.fake_quantize_per_channel_affine(w, scale, zero_point, 0, fmt.qmin, fmt.qmax)
    assert torch.equal(q.dequantize(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_tie_equals_torch(bits, symmetric):
    """w = (k + 1/2) · scale, for every k and scales that are not powers of 2."""
    fmt = IntAffine(bits, symmetric, "tensor")
    ties = torch.arange(2 * fmt.qmin - 5, 2 * fmt.qmax + 6) / 2
    for scale in (0.1, 0.3, 1 / 7, 0.0123, 3.0):
        params = {"scale": torch.tensor(scale)}
        if not symmetric:
            params["zero_point"] = torch.tensor(2 ** (bits - 1) - 1, dtype=torch.uint8)
        zero_point = 0 if symmetric else 2 ** (bits - 1) - 1
        w = ties * params["scale"]
        expected = torch.fake_quantize_per_tensor_affine(w, float(params["scale"]), zero_point, fmt.qmin, fmt.qmax)
        assert torch.equal(fmt.decode(fmt.encode(w, params), params), expected)


@given(st.integers(0, 2**31), st.integers(2, 8))
def test_groups_equal_torch_channels_of_the_regrouped_weight(seed, bits):
    w = hostile(seed)
    q = IntAffine(bits, False, "group", group_size=16).quantize(w)
    scale, zero_point = q.params["scale"].flatten(), q.params["zero_point"].flatten().int()
    expected = torch.fake_quantize_per_channel_affine(w.view(-1, 16), scale, zero_point, 0, 0, 2**bits - 1)
    assert torch.equal(q.dequantize(), expected.view(w.shape))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_torchao_params_and_codes(bits, symmetric):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    mapping = primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(bits))
    fmt = IntAffine(bits, symmetric, "group", group_size=32, narrow=False)
    params = fmt.fit(w)
    dtype = torch.int8 if symmetric else torch.uint8
    scale, zero_point = primitives.choose_qparams_affine(w, mapping, (1, 32), dtype, fmt.qmin, fmt.qmax)
    torch.testing.assert_close(params["scale"], scale, rtol=2e-7, atol=0)
    if not symmetric:
        assert torch.equal(params["zero_point"].int(), zero_point.int())
    codes = primitives.quantize_affine(w, (1, 32), params["scale"], zero_point, dtype, fmt.qmin, fmt.qmax)
    assert torch.equal(fmt.encode(w, params), codes)
