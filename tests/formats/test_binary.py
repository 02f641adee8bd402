"""Binary: by hand, against every other choice of signs; and the popcount product against the float product."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.formats import IntAffine, QTensor
from qlab.formats.binary import Binary, popcount, popcount_by_halves, sign_words, xnor_matmul


def signs(rows, k, seed=0):
    return torch.randint(0, 2, (rows, k), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def test_by_hand():
    w = torch.tensor([[0.5, -1.5, 0.0, 2.0], [-0.0, -3.0, -1.0, 0.0]])
    q = Binary("channel").quantize(w)
    assert q.params["scale"].tolist() == [1.0, 1.0]  # (0.5 + 1.5 + 0 + 2) / 4, (3 + 1) / 4
    assert q.codes.tolist() == [[1, 0, 1, 1], [1, 0, 0, 1]]  # sign(0) = sign(−0) = +1
    assert q.packed.tolist() == [0b10111001]
    assert q.dequantize().tolist() == [[1, -1, 1, 1], [1, -1, -1, 1]]
    assert Binary("tensor").fit(w)["scale"] == 1.0
    assert Binary("group", 2).fit(w)["scale"].tolist() == [[1.0, 1.0], [1.5, 0.5]]


def test_filters_of_a_convolution_have_a_scale_each():
    w = torch.randn(5, 3, 3, 3)
    assert torch.equal(Binary().fit(w)["scale"], w.flatten(1).double().abs().mean(1).float())


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=7))
def test_no_other_signs_and_scale_are_closer(numbers):
    """XNOR-Net eqs. (4) and (6) solve min ‖w − scale · b‖²: try every b, each with its own best scale ⟨b, w⟩ / n."""
    w = torch.tensor(numbers, dtype=torch.float32)
    ours = (Binary("tensor").quantize(w).dequantize().double() - w).square().sum()
    best = min(
        (w.double() - (w.double() @ b / len(w)) * b).square().sum()
        for b in (torch.tensor(b, dtype=torch.float64) for b in itertools.product([-1.0, 1.0], repeat=len(w)))
    )
    assert ours <= best + 1e-6 * w.double().square().sum()


def test_codes_do_not_depend_on_the_scale():
    """BinaryConnect: the scale is given, and learned scales must not change the codes."""
    w = torch.randn(3, 10)
    assert torch.equal(Binary("tensor").encode(w, {"scale": torch.tensor(0.05)}), Binary().quantize(w).codes)


def test_idempotent():
    w = torch.randn(7, 33)
    q = Binary().quantize(w)
    again = Binary().quantize(q.dequantize())
    assert torch.equal(again.dequantize(), q.dequantize())


# --- XNOR and popcount


@settings(max_examples=60)
@given(m=st.integers(0, 9), n=st.integers(0, 9), k=st.integers(0, 200), seed=st.integers(0, 2**31))
def test_the_product_equals_the_float_product(m, n, k, seed):
    a, b = signs(m, k, seed), signs(n, k, seed + 1)
    product = xnor_matmul(sign_words(a), sign_words(b), k)
    assert product.dtype == torch.int32
    assert torch.equal(product.float(), a @ b.T)


@pytest.mark.parametrize("m, n, k", [(300, 517, 65), (3, 40000, 64), (130, 129, 1000)])
def test_products_larger_than_a_tile(m, n, k):
    a, b = signs(m, k), signs(n, k, seed=1)
    assert torch.equal(xnor_matmul(sign_words(a), sign_words(b), k).float(), a @ b.T)


@pytest.mark.parametrize("k", [63, 64, 65, 128])
def test_equal_and_opposite_rows(k):
    """The extremes, k and −k: every bit of a word counts, the sign bit too."""
    a = torch.cat([torch.ones(1, k), -torch.ones(1, k)])
    assert xnor_matmul(sign_words(a), sign_words(a), k).tolist() == [[k, -k], [-k, k]]


@pytest.mark.parametrize("columns", [64, 192, 100, 5])
def test_words_of_a_stored_weight(columns):
    """From its packed bytes where 64 divides the row (then without a copy), else from its codes."""
    q = Binary().quantize(torch.randn(16, columns))
    words = sign_words(q)
    assert torch.equal(words, sign_words(q.dequantize()))
    assert (words.data_ptr() == q.packed.data_ptr()) == (columns % 64 == 0)
    misaligned = torch.cat([torch.zeros(1, dtype=torch.uint8), q.packed])[1:]
    assert torch.equal(sign_words(QTensor(q.format, misaligned, q.params, q.shape, q.dtype)), words)


def test_a_layer_on_bits():
    """sign(x) · wᵀ: the popcount product times the scale of each row."""
    x, q = torch.randn(4, 70), Binary().quantize(torch.randn(9, 70))
    expected = torch.where(x >= 0, 1.0, -1.0) @ q.dequantize().T
    got = xnor_matmul(sign_words(x), sign_words(q), 70) * q.params["scale"]
    torch.testing.assert_close(got, expected)


def test_popcount_counts_bits():
    words = torch.randint(-(2**63), 2**63 - 1, (50,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([words, torch.tensor([0, -1, 1, -(2**63), 2**63 - 1])])
    expected = [(int(word) & (2**64 - 1)).bit_count() for word in words]
    assert popcount(words).tolist() == expected
    assert popcount_by_halves(words).tolist() == expected
    assert popcount(words).dtype == popcount_by_halves(words).dtype == torch.uint8


def test_operands_that_do_not_fit_are_refused():
    a = sign_words(torch.ones(2, 65))
    with pytest.raises(ValueError, match=r"k=64 signs take 1 int64 words each, got a of shape \(2, 2\)"):
        xnor_matmul(a, a, 64)
    with pytest.raises(ValueError, match=r"got b of shape \(2, 2\) and torch.float32"):
        xnor_matmul(a, torch.ones(2, 2), 65)
    with pytest.raises(ValueError, match=r"got b of shape \(2,\)"):
        xnor_matmul(a, a[0], 65)


def test_only_signs_have_sign_words():
    with pytest.raises(TypeError, match="format Binary, got IntAffine"):
        sign_words(IntAffine(4).quantize(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="1 NaN"):
        sign_words(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="scalar"):
        sign_words(torch.tensor(1.0))
    with pytest.raises(TypeError, match="int64"):
        sign_words(torch.ones(2, 2, dtype=torch.long))


def test_a_scale_too_small_for_fp16_is_refused():
    with pytest.raises(ValueError, match="0 or Inf in torch.float16"):
        Binary(param_dtype=torch.float16).quantize(torch.full((2, 4), 1e-12))
