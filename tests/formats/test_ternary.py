"""Ternary: both rules by hand, TWN beside the exact optimum, and five trits to a byte."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.formats.ternary import Ternary, pack_trits, unpack_trits
from qlab.metrics import sqnr_db


def squared_error(w, q):
    return float((w.double() - q.dequantize(torch.float64)).square().sum())


def best_ternary_error(w):
    """min ‖w − α·b‖² over all 3ⁿ choices of b, each with its best α = ⟨b, w⟩ / ⟨b, b⟩; summed over the rows w (…, n)."""
    w = w.double()
    b = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=w.shape[-1])), dtype=torch.float64)
    gain = (w @ b.T).square() / b.square().sum(1).clamp(min=1)
    return float(w.square().sum() - gain.amax(-1).sum())


def test_twn_by_hand():
    w = torch.tensor([[1.0, -0.5, 0.25, 0.0], [2.0, -0.25, 0.0, 0.0]])
    params = Ternary("twn", "channel").fit(w)
    assert params["threshold"].tolist() == pytest.approx([0.7 * 1.75 / 4, 0.7 * 2.25 / 4])
    assert params["scale"].tolist() == [0.75, 2.0]  # (1 + 0.5) / 2, 2 / 1
    q = Ternary("twn", "channel").quantize(w)
    assert q.codes.tolist() == [[1, -1, 0, 0], [1, 0, 0, 0]] and q.codes.dtype == torch.int8
    assert q.dequantize().tolist() == [[0.75, -0.75, 0, 0], [2, 0, 0, 0]]
    assert Ternary("twn").fit(w)["scale"] == 3.5 / 3  # Δ = 0.35 leaves 1, 0.5 and 2


def test_bitnet_by_hand():
    w = torch.tensor([2.0, 1.0, 0.5, -0.5, -1.0, -1.0, 0.75, -1.25])  # mean |w| = 1
    q = Ternary("bitnet").quantize(w)
    assert q.params.keys() == {"scale"} and q.params["scale"] == 1.0
    assert q.codes.tolist() == [1, 1, 0, 0, -1, -1, 1, -1]  # 0.5 is a tie: to the even 0


def test_bitnets_scale_has_a_floor():
    q = Ternary("bitnet").quantize(torch.tensor([4e-6, -8e-6, 0.0]))
    assert q.params["scale"] == torch.tensor(1e-5)
    assert q.codes.tolist() == [0, -1, 0]
    assert Ternary("bitnet").fit(torch.zeros(3))["scale"] == torch.tensor(1e-5)


def test_a_weight_at_the_threshold_is_zero():
    params = {"scale": torch.tensor(1.0), "threshold": torch.tensor(0.25)}
    assert Ternary("twn").encode(torch.tensor([0.25, -0.25, 0.26, -0.26]), params).tolist() == [0, 0, 1, -1]


def test_without_a_threshold_the_nearest_code_is_taken():
    params = {"scale": torch.tensor(2.0)}
    assert Ternary("twn").encode(torch.tensor([0.9, -0.9, 1.1, -1.1, 9.0]), params).tolist() == [0, 0, 1, -1, 1]


def test_the_stored_weight_has_no_threshold():
    q = Ternary("twn", "channel").quantize(torch.randn(3, 20))
    assert q.params.keys() == {"scale"} and q.nbytes == 12 + 3 * 4


def test_zeros_and_subnormal_weights_have_a_scale_that_can_be_divided_by():
    assert Ternary("twn", param_dtype=torch.float16).fit(torch.zeros(3))["scale"] == 1
    assert (1 / Ternary("twn").fit(torch.tensor([1e-44, 0.0]))["scale"]).isfinite()


# --- how good TWN's closed form is


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6))
def test_the_scale_is_the_best_for_its_codes(numbers):
    w = torch.tensor(numbers, dtype=torch.float32)
    q = Ternary("twn").quantize(w)
    b = q.codes.double()
    if b.any():
        assert float(q.params["scale"]) == pytest.approx(float(b @ w.double() / (b @ b)), rel=1e-6)
    assert squared_error(w, q) >= best_ternary_error(w) - 1e-6 * float(w.double().square().sum())


@pytest.mark.parametrize("draw, ratio", [(torch.randn, 1.09), (torch.rand, 1.05)])
def test_twn_is_close_to_the_exact_optimum(draw, ratio):
    """Rows of 8 weights, normal or uniform, against all 3⁸ choices: how much more squared error TWN leaves."""
    w = draw(400, 8, generator=torch.Generator().manual_seed(0))
    assert squared_error(w, Ternary("twn", "channel").quantize(w)) / best_ternary_error(w) == pytest.approx(
        ratio, abs=0.015
    )


def test_normal_weights():
    """By integration over N(0, 1): TWN 7.175 dB (the best −α, 0, α: 7.208 dB), BitNet 5.794 dB."""
    w = torch.randn(500_000, generator=torch.Generator().manual_seed(1))
    assert sqnr_db(w, Ternary("twn").quantize(w).dequantize()) == pytest.approx(7.175, abs=0.02)
    assert sqnr_db(w, Ternary("bitnet").quantize(w).dequantize()) == pytest.approx(5.794, abs=0.02)


@pytest.mark.parametrize("rule", ["twn", "bitnet"])
def test_twn_is_idempotent_and_bitnet_is_not(rule):
    """TWN finds its own scale again; the mean of BitNet's |w'| is smaller, since some are 0."""
    w = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    once = Ternary(rule, "channel").quantize(w).dequantize()
    twice = Ternary(rule, "channel").quantize(once).dequantize()
    assert torch.equal(once, twice) == (rule == "twn")
    assert torch.equal(once.sign(), twice.sign())


# --- five trits to a byte


@given(st.lists(st.integers(0, 2), max_size=23))
def test_a_byte_is_a_number_in_base_3(trits):
    packed = pack_trits(torch.tensor(trits, dtype=torch.uint8))
    padded = trits + [0] * (-len(trits) % 5)
    assert packed.tolist() == [int("".join(map(str, padded[i : i + 5])), 3) for i in range(0, len(padded), 5)]
    assert unpack_trits(packed, len(trits)).tolist() == trits


def test_every_byte():
    every = torch.arange(243, dtype=torch.uint8)
    assert torch.equal(pack_trits(unpack_trits(every, 5 * 243)), every)


def test_packed_memory_is_its_own():
    codes = torch.ones(4, 5, dtype=torch.int8)
    packed = Ternary().pack(codes)
    assert packed.untyped_storage().nbytes() == 4 and (codes == 1).all()
    assert Ternary().bits == 8 * packed.numel() / codes.numel()


def test_bad_trits_are_refused():
    with pytest.raises(ValueError, match="0, 1 or 2, got 3"):
        pack_trits(torch.tensor([0, 3], dtype=torch.uint8))
    with pytest.raises(ValueError, match="got 3"):
        Ternary().pack(torch.tensor([2], dtype=torch.int8))
    with pytest.raises(TypeError, match="int8"):
        pack_trits(torch.tensor([0], dtype=torch.int8))
    with pytest.raises(ValueError, match="11 trits take 3 bytes"):
        unpack_trits(torch.zeros(2, dtype=torch.uint8), 11)
    with pytest.raises(ValueError, match="a byte of 243"):
        unpack_trits(torch.tensor([243], dtype=torch.uint8), 4)


def test_an_unknown_rule():
    with pytest.raises(ValueError, match="'median'"):
        Ternary("median")


def test_a_clipping_range_chosen_elsewhere():
    """The integer grid's own entry: the scale is the larger end of the range."""
    fmt = Ternary("twn", "channel")
    params = fmt.from_range(torch.tensor([-1.0, -0.5]), torch.tensor([0.5, 2.0]))
    assert params["scale"].tolist() == [1.0, 2.0]
    assert fmt.limits(params, torch.Size([2, 1]))[1].tolist() == [[1.0], [2.0]]
