"""InputStats: by hand, and against all inputs put together in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.calibrate import STATISTICS, InputStats, output_error
from qlab.calibrate import statistics as module


def observed(*batches, keep=STATISTICS, dtype=torch.float64):
    stats = InputStats(keep, dtype)
    for x in batches:
        stats.observe(x)
    return stats


def test_by_hand():
    stats = observed(torch.tensor([[1.0, -2.0]]), torch.tensor([[[3.0, 0.0]], [[-1.0, 1.0]]]))
    assert stats.tokens == 3
    assert stats.amax.tolist() == [3, 2] and stats.mean_abs.tolist() == pytest.approx([5 / 3, 1])
    assert stats.second_moment.tolist() == pytest.approx([11 / 3, 5 / 3])
    torch.testing.assert_close(stats.hessian, 2 / 3 * torch.tensor([[11.0, -3], [-3, 5]]).double())


@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 12),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(-4, 3),
)
def test_batches_sum_to_the_whole(seed, lengths, channels, dtype, exponent):
    g = torch.Generator().manual_seed(seed)
    batches = [
        (torch.randn(channels, n, 2, generator=g, dtype=torch.float64) * 10.0**exponent).to(dtype).movedim(0, 2)
        for n in lengths
    ]
    x = torch.cat([batch.reshape(-1, channels) for batch in batches]).double()
    stats = observed(*batches)
    assert stats.tokens == len(x)
    if not len(x):
        return
    assert torch.equal(stats.amax.double(), x.abs().amax(0).float().double())
    torch.testing.assert_close(stats.mean_abs.double(), x.abs().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.second_moment, x.square().mean(0), rtol=1e-12, atol=0)
    expected = 2 / len(x) * x.T @ x
    torch.testing.assert_close(stats.hessian, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(stats.hessian.diagonal(), 2 * stats.second_moment, rtol=1e-9, atol=0)
    single = observed(*batches, keep=("hessian",), dtype=torch.float32).hessian
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_inputs_are_summed_in_slices(monkeypatch):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = observed(x)
    monkeypatch.setattr(module, "SLICE", 13)  # two rows at a time
    sliced = observed(x)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(sliced, name), getattr(whole, name))
    assert sliced.tokens == 50


def test_many_bf16_tokens_do_not_stop_the_sums():
    """A sum in bf16 would stay at 256: adding 1 to it changes nothing."""
    stats = observed(torch.ones(3000, 2, dtype=torch.bfloat16), dtype=torch.float32)
    assert stats.mean_abs.tolist() == stats.second_moment.tolist() == [1, 1]
    assert stats.hessian.tolist() == [[2, 2], [2, 2]]


def test_reading_changes_nothing():
    stats = observed(torch.ones(4, 2))
    first = stats.hessian
    first.zero_()
    assert stats.hessian.tolist() == [[2, 2], [2, 2]]


def test_gradients_are_not_followed():
    assert not observed(torch.ones(2, 3, requires_grad=True)).hessian.requires_grad


def test_an_overflow_of_the_hessian_is_found():
    x = torch.full((2, 2), 1e30)
    with pytest.raises(ValueError, match="not finite in torch.float32: capture with dtype=torch.float64"):
        _ = observed(x, dtype=torch.float32).hessian
    assert observed(x).hessian.isfinite().all() and observed(x).second_moment[0] == pytest.approx(1e60)


def test_only_what_is_kept_takes_memory():
    stats = observed(torch.ones(2, 500), keep=("amax",))
    assert sum(tensor.numel() for tensor in stats._sums.values()) == 500
    with pytest.raises(ValueError, match=r"hessian was not kept, only amax: pass keep=\('amax', 'hessian'\)"):
        _ = stats.hessian
    assert "hessian" not in InputStats().keep, "in² numbers a layer are kept only where they are asked for"


def test_what_cannot_be_observed():
    stats = observed(torch.ones(2, 3))
    with pytest.raises(ValueError, match="had 3 channels, this one has 4"):
        stats.observe(torch.ones(2, 4))
    with pytest.raises(ValueError, match="1 NaN and 0 Inf"):
        stats.observe(torch.tensor([[1.0, 2.0, math.nan]]))
    with pytest.raises(ValueError, match="scalar"):
        stats.observe(torch.tensor(1.0))
    with pytest.raises(TypeError, match="int64"):
        stats.observe(torch.ones(2, 3, dtype=torch.long))
    assert stats.tokens == 2 and stats.mean_abs.tolist() == [1, 1, 1], "a refused input leaves no trace"
    for empty in (InputStats(), observed(torch.ones(0, 3))):
        with pytest.raises(ValueError, match="no input was observed yet"):
            _ = empty.amax
    with pytest.raises(ValueError, match=r"keep some of amax, .* got \('trace',\)"):
        InputStats(keep=("trace",))
    with pytest.raises(ValueError, match="bfloat16"):
        InputStats(dtype=torch.bfloat16)


def test_divided_by_is_what_the_divided_inputs_would_give():
    x, scale = torch.randn(50, 6, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1, 7.0])
    stats, expected = InputStats(STATISTICS, torch.float64), InputStats(STATISTICS, torch.float64)
    stats.observe(x)
    expected.observe(x / scale)
    divided = stats.divided_by(scale)
    assert divided.tokens == 50
    for name in STATISTICS:
        torch.testing.assert_close(getattr(divided, name), getattr(expected, name))
    for wrong in (scale[:5], scale * 0, scale * torch.inf):
        with pytest.raises(ValueError, match=r"a scale is \(6,\), finite and above 0"):
            stats.divided_by(wrong)


def test_output_error_needs_no_forward():
    x, w, changed = torch.randn(40, 6), torch.randn(3, 6), torch.randn(3, 6)
    stats = InputStats(("hessian",))
    stats.observe(x)
    torch.testing.assert_close(output_error(changed - w, stats.hessian), (x @ (changed - w).T).square().mean(0))
