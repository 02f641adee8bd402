"""KMeans and ProductQuantizer: by hand, exact where they can be, and the error that theory gives for normal weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.formats import NF4, IntAffine
from qlab.formats.vector import KMeans, ProductQuantizer
from qlab.metrics import mse, sqnr_db

# --- KMeans


def test_kmeans_by_hand():
    q = KMeans(bits=1, granularity="channel").quantize(torch.tensor([[1.0, 2.0, 9.0, 3.0], [5.0, 5.0, -1.0, 5.0]]))
    assert q.params["levels"].tolist() == [[2.0, 9.0], [-1.0, 5.0]]
    assert q.codes.tolist() == [[0, 0, 1, 0], [1, 1, 0, 1]] and q.codes.dtype == torch.uint8
    assert q.packed.tolist() == [0b00101101]
    assert q.dequantize().tolist() == [[2.0, 2.0, 9.0, 2.0], [5.0, 5.0, -1.0, 5.0]]


@pytest.mark.parametrize("bits, db", [(1, 4.40), (2, 9.30), (3, 14.62), (4, 20.22)])
def test_the_error_on_normal_weights_is_lloyds_and_maxs(bits, db):
    """Max 1960, "Quantizing for Minimum Distortion", table I: mean squared error .3634, .1175, .03454, .009497 of σ²."""
    w = torch.randn(1 << 17, generator=torch.Generator().manual_seed(bits))
    assert sqnr_db(w, KMeans(bits).quantize(w).dequantize()) == pytest.approx(db, abs=0.06)


def test_no_fixed_grid_is_closer():
    w = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    learned = mse(w, KMeans(4).quantize(w).dequantize())
    for fixed in (IntAffine(4, False, "tensor"), NF4(6400)):
        assert learned < 0.8 * mse(w, fixed.quantize(w).dequantize())


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 300))
def test_few_different_numbers_are_exact(seed, bits, n):
    generator = torch.Generator().manual_seed(seed)
    different = torch.randn(2**bits, generator=generator) * 10.0 ** (seed % 30 - 15)
    w = different[torch.randint(0, 2**bits, (2, n), generator=generator)]
    for granularity in ("tensor", "channel"):
        assert torch.equal(KMeans(bits, granularity).quantize(w).dequantize(), w)


@pytest.mark.parametrize("numbers", [[-1e10, 1e-20, 3e-20, 5.0], [-1e30, 1e-30, 1e30]])
def test_numbers_of_very_different_size_are_exact(numbers):
    """Beside a sum of −1e10 the number 1e-20 vanishes, in a prefix sum too."""
    w = torch.tensor(numbers).repeat(3)
    assert torch.equal(KMeans(2).quantize(w).dequantize(), w)


@pytest.mark.parametrize("fmt", [KMeans(3), ProductQuantizer(2, bits=3)], ids=repr)
def test_unused_entries_repeat_another(fmt):
    w = torch.full((3, 4), 3.5)
    assert all((table == 3.5).all() for table in fmt.fit(w).values())


def test_adjacent_floats_are_told_apart():
    one = torch.tensor(1.0)
    w = torch.stack([one, one.nextafter(torch.tensor(2.0)), one.nextafter(torch.tensor(0.0))])
    assert torch.equal(KMeans(2).quantize(w).dequantize(), w)


def test_a_rare_number_among_many_is_found():
    w = torch.tensor([0.0, 1.0, 2.0]).repeat_interleave(33334)[:-1]
    w[40000] = 1.5
    assert torch.equal(KMeans(2).quantize(w).dequantize(), w)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 200))
def test_every_weight_gets_its_nearest_level(seed, bits, n):
    w = torch.randn(3, n, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 30 - 15)
    fmt = KMeans(bits, "channel", iterations=3)
    params = fmt.fit(w)
    assert (params["levels"].diff() >= 0).all()
    distance = (w.double()[..., None] - params["levels"].double()[:, None]).abs()
    chosen = distance.gather(-1, fmt.encode(w, params).long()[..., None]).squeeze(-1)
    assert torch.equal(chosen, distance.amin(-1))


def test_levels_need_not_stay_in_order():
    """Levels that training moved past each other."""
    params = {"levels": torch.tensor([[3.0, -1.0, 0.0, 7.0], [0.0, 1.0, 2.0, 3.0]])}
    fmt, w = KMeans(2, "channel"), torch.tensor([[2.9, 6.0, -9.0, 0.1], [2.9, 6.0, -9.0, 0.1]])
    assert fmt.encode(w, params).tolist() == [[0, 3, 1, 2], [3, 3, 0, 0]]
    lowest, highest = fmt.limits(params, w.shape)
    assert lowest.tolist() == [[-1.0] * 4, [0.0] * 4] and highest.tolist() == [[7.0] * 4, [3.0] * 4]


def test_the_gradient_of_a_level_is_the_sum_over_its_weights():
    fmt, w = KMeans(1, "tensor"), torch.tensor([1.0, 2.0, 9.0])
    levels = fmt.fit(w)["levels"].requires_grad_()
    (
        fmt.decode(fmt.encode(w, {"levels": levels}), {"levels": levels}) * torch.tensor([1.0, 10.0, 100.0])
    ).sum().backward()
    assert levels.grad.tolist() == [11.0, 100.0]


def test_a_seed_gives_one_result_and_rows_do_not_see_each_other():
    w = torch.randn(5, 700)
    together = KMeans(3, "channel", seed=4).quantize(w)
    assert torch.equal(together.packed, KMeans(3, "channel", seed=4).quantize(w).packed)
    for row, alone in zip(w, together.params["levels"], strict=True):
        assert torch.equal(KMeans(3, "tensor", seed=4).fit(row)["levels"], alone)


def test_many_rows_are_worked_on_in_slices():
    w = torch.randn(3000, 1000, generator=torch.Generator().manual_seed(0))
    levels = KMeans(1, "channel").fit(w)["levels"]
    assert torch.equal(levels[[0, 2999]], KMeans(1, "channel").fit(w[[0, 2999]])["levels"])


# --- ProductQuantizer


def test_product_quantizer_by_hand():
    """Two sub-spaces of 2: three rows, two centres each. (0, 0) and (0, 2) share a centre, their mean."""
    w = torch.tensor([[0.0, 0.0, 5.0, 5.0], [0.0, 2.0, -5.0, 5.0], [9.0, 9.0, 5.0, 5.0]])
    fmt = ProductQuantizer(sub_dim=2, bits=1)
    q = fmt.quantize(w)
    assert sorted(q.params["codebook"][0].tolist()) == [[0.0, 1.0], [9.0, 9.0]]
    assert sorted(q.params["codebook"][1].tolist()) == [[-5.0, 5.0], [5.0, 5.0]]
    assert q.codes.shape == (3, 2) and q.packed.shape == (1,)
    assert q.dequantize().tolist() == [[0, 1, 5, 5], [0, 1, -5, 5], [9, 9, 5, 5]]
    lowest, highest = fmt.limits(q.params, q.shape)
    assert lowest[1].tolist() == [0, 1, -5, 5] and highest[1].tolist() == [9, 9, 5, 5]


def test_a_shared_codebook_by_hand():
    w = torch.tensor([[1.0, 2.0, 7.0, 8.0], [7.0, 8.0, 1.0, 2.0]])
    q = ProductQuantizer(sub_dim=2, bits=1, shared=True).quantize(w)
    assert q.params["codebook"].shape == (1, 2, 2) and torch.equal(q.dequantize(), w)
    assert q.codes[0, 0] == q.codes[1, 1] != q.codes[0, 1]
    separate = ProductQuantizer(sub_dim=2, bits=1).quantize(w)
    assert separate.params["codebook"].shape == (2, 2, 2)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 40), st.booleans())
def test_few_different_vectors_are_exact(seed, bits, rows, shared):
    generator = torch.Generator().manual_seed(seed)
    different = torch.randn(2**bits, 3, generator=generator) * 10.0 ** (seed % 30 - 15)
    w = different[torch.randint(0, 2**bits, (rows, 5), generator=generator)].flatten(1)
    assert torch.equal(ProductQuantizer(3, bits, shared).quantize(w).dequantize(), w)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 40), st.booleans())
def test_every_vector_gets_its_nearest_entry(seed, bits, rows, shared):
    w = torch.randn(rows, 15, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 30 - 15)
    fmt = ProductQuantizer(3, bits, shared, iterations=2)
    q = fmt.quantize(w)
    codebook = q.params["codebook"].double().expand(5, -1, -1)  # (space, entry, 3)
    distance = (w.double().view(rows, 5, 1, 3) - codebook).square().sum(-1)
    chosen = distance.gather(-1, q.codes.long()[..., None]).squeeze(-1)
    assert (chosen <= distance.amin(-1) * (1 + 1e-12)).all()


def test_vectors_of_one_weight_are_scalars():
    """With sub_dim 1 and a shared codebook it is KMeans per tensor, by another road."""
    w = torch.randn(40, 13, generator=torch.Generator().manual_seed(3))
    vector = ProductQuantizer(1, bits=2, shared=True, iterations=300).quantize(w).dequantize()
    assert mse(w, vector) == pytest.approx(mse(w, KMeans(2).quantize(w).dequantize()), rel=0.02)


def test_vectors_beat_scalars_at_equal_bits():
    """2 bits a weight on independent normal weights, without the codebook: the space-filling and shape gain of 4 dimensions."""
    w = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
    vector = sqnr_db(w, ProductQuantizer(4, bits=8, iterations=10).quantize(w).dequantize())
    assert vector > sqnr_db(w, KMeans(2).quantize(w).dequantize()) + 0.5


def test_activations():
    """Fitted to one batch, used on others of any leading shape; rows of another length are refused."""
    fmt = ProductQuantizer(sub_dim=3, bits=4)
    params = fmt.fit(torch.randn(500, 12))
    x = torch.randn(2, 7, 12)
    codes = fmt.encode(x, params)
    assert codes.shape == (2, 7, 4) and fmt.decode(codes, params).shape == x.shape
    assert torch.equal(fmt.encode(x[1, 3], params), codes[1, 3])
    with pytest.raises(ValueError, match=r"4 sub-spaces of 3, rows of a tensor of shape \(7, 15\) have 5"):
        fmt.encode(torch.randn(7, 15), params)


@pytest.mark.parametrize("fmt", [KMeans(2), ProductQuantizer(2, bits=2)], ids=repr)
def test_a_fit_to_a_weight_under_training_keeps_no_graph(fmt):
    assert not any(table.requires_grad for table in fmt.fit(torch.nn.Parameter(torch.randn(9, 4))).values())


def test_more_vectors_than_it_trains_on(monkeypatch):
    w, fmt = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)), ProductQuantizer(2, bits=3)
    trained_on_all = sqnr_db(w, fmt.quantize(w).dequantize())
    monkeypatch.setattr("qlab.formats.vector.TRAINING_VECTORS", 64)
    assert 6 < sqnr_db(w, fmt.quantize(w).dequantize()) < trained_on_all


@pytest.mark.parametrize("make, message", [
    (lambda: KMeans(0), "bits=0"),
    (lambda: KMeans(9), "KMeans takes 1 to 8 bits, got bits=9"),
    (lambda: KMeans(iterations=0), "iterations=0"),
    (lambda: ProductQuantizer(bits=9), "ProductQuantizer takes 1 to 8 bits, got bits=9"),
    (lambda: ProductQuantizer(0), "sub_dim must be at least 1, got 0"),
    (lambda: ProductQuantizer(4).quantize(torch.zeros(3, 30)), r"sub_dim=4 does not divide the row .* \(3, 30\)"),
    (lambda: ProductQuantizer(4).quantize(torch.tensor(1.0)), r"shape \(\)"),
])  # fmt: skip
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
