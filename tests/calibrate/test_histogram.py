"""The growing histogram: by hand, and against one made of all values at once, however the stream was cut."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.calibrate import Histogram
from qlab.calibrate import histogram as module

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def streams(draw):
    """Batches of any dtype, size, layout and magnitude, with zeros, ties with bin borders, negatives and outliers."""
    dtype, batches = draw(st.sampled_from(DTYPES)), []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for _ in range(draw(st.integers(1, 5))):
        shape = draw(st.integers(0, 4)), draw(st.integers(0, 30))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        kind = draw(st.sampled_from(["normal", "zero", "positive", "borders", "one outlier"]))
        if kind == "zero":
            x = torch.zeros(shape)
        elif kind == "positive":
            x = x.abs()
        elif kind == "borders":
            x = torch.randint(-8, 9, shape, generator=generator) / 4
        elif kind == "one outlier" and x.numel():
            x[0, 0] = 900
        x = (x * 2.0 ** draw(st.integers(-12, 6))).to(dtype)
        batches.append(x.t() if draw(st.booleans()) else x)
    return batches


def observed(batches, bins=16):
    histogram = Histogram(bins)
    for x in batches:
        histogram.add(x)
    return histogram


def test_growth_by_hand():
    """0.75 needs bins of 1/4; 1.0 lies on the border of what 4 of them hold, so the width doubles."""
    histogram = observed([torch.tensor([0.75, -0.25, 0.25, 0.1, -0.0])], bins=4)
    assert histogram.width == 0.25 and histogram.counts.tolist() == [[0, 1, 0, 0], [2, 1, 0, 1]]
    histogram.add(torch.tensor([1.0]))
    assert histogram.width == 0.5 and histogram.counts.tolist() == [[1, 0, 0, 0], [3, 1, 1, 0]]
    histogram.add(torch.tensor([-100.0]))
    assert histogram.width == 32 and histogram.counts.tolist() == [[1, 0, 0, 1], [5, 0, 0, 0]]
    assert (histogram.low, histogram.high, histogram.amax) == (-100, 1, 100)
    assert histogram.magnitudes.tolist() == [6, 0, 0, 1]


def test_centers_are_ascending_and_carry_their_counts():
    values, counts = observed([torch.tensor([-3.0, -1.5, 0.0, 1.0, 1.0])], bins=4).centers()
    assert values.tolist() == [-3.5, -1.5, 0.5, 1.5] and counts.tolist() == [1, 1, 1, 2]


@given(streams())
def test_any_cut_of_the_stream_gives_the_histogram_of_all_values(batches):
    values = torch.cat([x.reshape(-1) for x in batches]).double().numpy()
    bins = 16
    histogram = observed(batches, bins)
    assert histogram.counts.shape == (2, bins) and int(histogram.counts.sum()) == len(values)
    if not len(values):
        return
    amax = np.abs(values).max()
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    if amax == 0:
        assert histogram.width == 0 and int(histogram.counts[1, 0]) == len(values)
        return
    assert histogram.width * bins / 2 <= amax < histogram.width * bins and math.log2(histogram.width) % 1 == 0
    edges = np.arange(bins + 1) * histogram.width
    for row, part in ((0, -values[values < 0]), (1, values[values >= 0])):
        assert histogram.counts[row].tolist() == np.histogram(part, edges)[0].tolist()
    assert len(histogram.magnitudes) > bins / 2


def test_large_batches_are_cut(monkeypatch):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = observed([x])
    monkeypatch.setattr(module, "SLICE", 7)
    assert torch.equal(observed([x]).counts, whole.counts)


@pytest.mark.parametrize("values", [[1e-45, 3e-45, 0.0], [3.4e38, -3e38, 1.0], [1e-38, 3e38]])
def test_the_ends_of_float32(values):
    x = torch.tensor(values)
    histogram = observed([x[:1], x[1:]], bins=8)
    assert int(histogram.counts.sum()) == len(values) and histogram.magnitudes[-1] >= 1
    assert histogram.width * 4 <= float(x.double().abs().max()) < histogram.width * 8


def test_gradients_are_not_followed():
    histogram = observed([torch.ones(3, requires_grad=True)])
    assert histogram.high == 1.0 and not histogram.counts.requires_grad


def test_what_cannot_be_counted():
    with pytest.raises(ValueError, match=r"1 NaN and 2 Inf in activations of shape \(2, 2\)"):
        Histogram().add(torch.tensor([[math.nan, 1.0], [math.inf, -math.inf]]))
    with pytest.raises(TypeError, match="int64"):
        Histogram().add(torch.ones(2, dtype=torch.long))
    for bins in (0, -2, 1000):
        with pytest.raises(ValueError, match=f"power of two, got {bins}"):
            Histogram(bins)
