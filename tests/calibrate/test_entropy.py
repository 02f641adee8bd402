"""Entropy calibration against NVIDIA's library, a written-out loop, and the cases that decide ties."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.calibrate import Entropy, kl_divergences
from qlab.calibrate.entropy import last_argmin

LIBRARY = json.loads(Path(__file__).with_name("pytorch_quantization.json").read_text())


def by_the_book(counts, levels, start_bin, stride):
    """The definition in float64, one bin at a time. (bins kept, divergence) of every candidate."""
    bins = [float(count) for count in counts]
    bins[0] = bins[1]
    total, rows = math.fsum(bins), []
    for i in range(start_bin, len(bins) + 1, stride):
        borders = np.linspace(0, i, levels + 1)
        members = [[] for _ in range(levels)]
        for j in range(i):
            if bins[j]:
                members[np.searchsorted(borders, j, side="right") - 1].append(j)
        q = [0.0] * i
        for level in members:
            for j in level:
                q[j] = sum(bins[k] for k in level) / len(level)
        p = bins[:i]
        p[-1] += sum(bins[i:])
        terms = [
            a / total * math.log(a / total / (b / math.fsum(q))) if b else math.inf
            for a, b in zip(p, q, strict=True)
            if a
        ]
        rows.append((i, math.fsum(terms)))
    return rows


@st.composite
def histograms(draw):
    bins = draw(st.integers(16, 60))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    values = random.exponential(bins / draw(st.integers(2, 20)), draw(st.integers(1, 2000)))
    counts = np.bincount(np.minimum(values.astype(int), bins - 1), minlength=bins)
    counts[random.uniform(size=bins) < draw(st.sampled_from([0, 0.3, 0.9]))] = 0
    counts[-1] = max(counts[-1], 1)
    return torch.from_numpy(counts)


@settings(max_examples=60)
@given(histograms(), st.sampled_from([1, 4, 8, 16]), st.sampled_from([8, 16]), st.integers(1, 3))
def test_every_divergence_is_that_of_the_definition(counts, levels, start_bin, stride):
    before = counts.clone()
    kept, divergences = kl_divergences(counts, levels, start_bin, stride)
    expected = by_the_book(counts.tolist(), levels, start_bin, stride)
    assert kept.tolist() == [i for i, _ in expected] and divergences.dtype == torch.float64
    np.testing.assert_allclose(divergences, [kl for _, kl in expected], rtol=1e-9, atol=1e-13)
    assert torch.equal(counts, before), "the caller's histogram is left alone"


def test_by_hand():
    """4 bins, 2 levels. Kept 2: Q is P, but 6 values are clipped onto bin 1. Kept 4: levels (4, 4) and (3, 3)."""
    kept, divergences = kl_divergences(torch.tensor([9, 4, 2, 4]), levels=2, start_bin=2)
    assert kept.tolist() == [2, 3, 4]
    p = torch.tensor([4, 10]) / 14
    assert divergences[0] == pytest.approx(float((p * (p / 0.5).log()).sum()))
    p, q = torch.tensor([4, 4, 2, 4]) / 14, torch.tensor([4, 4, 3, 3]) / 14
    assert divergences[2] == pytest.approx(float((p * (p / q).log()).sum()))


def test_clipping_onto_an_empty_bin_is_infinitely_bad():
    _, divergences = kl_divergences(torch.tensor([5, 5, 0, 5, 5]), levels=2, start_bin=2)
    assert [math.isinf(kl) for kl in divergences] == [False, True, False, False]


@pytest.mark.parametrize("levels", [8, 128, 256])
@pytest.mark.parametrize("case", LIBRARY, ids=lambda case: f"{case['name']}-{len(case['counts'])}")
def test_the_threshold_is_that_of_pytorch_quantization(case, levels):
    kept, divergences = kl_divergences(torch.tensor(case["counts"]), levels, start_bin=max(levels, 128))
    assert int(kept[last_argmin(divergences)]) == case[str(levels)]


def test_the_observer_searches_the_histogram_of_magnitudes():
    case = next(case for case in LIBRARY if case["name"] == "outliers" and len(case["counts"]) == 512)
    values = torch.arange(512.0) * 0.25 + 0.125
    values[1::2] *= -1
    x = values.repeat_interleave(torch.tensor(case["counts"]))
    observer = Entropy(bins=512)
    for batch in x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].split(3000):
        observer.observe(batch)
    assert observer.seen.width == 0.25
    assert observer.threshold() == 0.25 * case["128"] and max(observer.range()) == 0.25 * case["128"]
    thresholds, divergences = observer.divergences()
    assert thresholds[0] == 32 and thresholds[-1] == 128 and len(thresholds) == len(divergences) == 385


def test_of_equal_minima_the_last_wins():
    assert last_argmin(torch.tensor([3.0, 1.0, 2.0, 1.0, math.inf])) == 3
    few = Entropy(bins=256)  # no level holds two of these values, so every candidate that clips none is exact
    few.observe(torch.tensor([255.0, 200.0, 130.0, 1.0]))
    assert few.divergences()[1][-1] == 0 and few.threshold() == 256


def test_zeros_alone():
    observer = Entropy()
    observer.observe(torch.zeros(4))
    assert [float(end) for end in observer.range()] == [0, 0]


def test_bins_that_cannot_be_searched():
    with pytest.raises(ValueError, match=r"starts at 128 bins, got counts of shape \(100,\)"):
        kl_divergences(torch.ones(100))
    with pytest.raises(ValueError, match="start_bin=128 needs at least 256 bins, got bins=128"):
        Entropy(bins=128)
    for name in ("levels", "start_bin", "stride"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Entropy(**{name: 0})
