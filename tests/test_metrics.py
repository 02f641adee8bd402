"""Error metrics by hand and against numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from qlab import metrics
from qlab.formats import NF4, FloatCast, IntAffine


@pytest.fixture
def pair():
    w = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    return w, (w * 4).round() / 4


def test_against_numpy(pair, monkeypatch):
    monkeypatch.setattr(metrics, "SLICE", 999)  # several slices, the last one short
    w, w_hat = (x.double().numpy().ravel() for x in pair)
    assert metrics.mse(*pair) == pytest.approx(np.mean((w - w_hat) ** 2))
    assert metrics.sqnr_db(*pair) == pytest.approx(10 * np.log10(np.sum(w**2) / np.sum((w - w_hat) ** 2)))
    assert metrics.max_error(*pair) == pytest.approx(np.abs(w - w_hat).max())
    assert metrics.cosine(*pair) == pytest.approx(w @ w_hat / np.linalg.norm(w) / np.linalg.norm(w_hat))
    low, high = min(w.min(), w_hat.min()), max(w.max(), w_hat.max())
    p, q = (np.histogram(x, 20, (low, high))[0] + 0.5 for x in (w, w_hat))
    p, q = p / p.sum(), q / q.sum()
    assert metrics.histogram_kl(*pair, bins=20) == pytest.approx(np.sum(p * np.log(p / q)))


def test_no_error():
    w = torch.ones(3)
    assert metrics.sqnr_db(w, w) == math.inf and metrics.histogram_kl(w, w) == 0 and metrics.mse(w, w) == 0
    assert math.isnan(metrics.cosine(w, 0 * w)) and metrics.sqnr_db(0 * w, w) == -math.inf


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        metrics.mse(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="empty"):
        metrics.cosine(torch.ones(0), torch.ones(0))


def test_error_shares_by_hand():
    """Range [−1, 1] at 3 levels: 0.4 → 0 is a rounding error of 0.4, 3 → 1 a clipping error of 2."""
    fmt = IntAffine(bits=2, symmetric=True, granularity="tensor")
    w = torch.tensor([0.4, 3.0, -1.0])
    params = fmt.from_range(torch.tensor(-1.0), torch.tensor(1.0))
    q = fmt.quantize(torch.tensor([0.4, 1.0, -1.0]))
    assert q.params["scale"] == params["scale"] and torch.equal(q.codes, fmt.encode(w, params))
    for sign in (1, -1):
        q = fmt.quantize(sign * torch.tensor([0.4, 1.0, -1.0]))
        shares = metrics.error_shares(sign * w, q)
        assert shares["clipping"] == pytest.approx(4 / 4.16) and shares["rounding"] == pytest.approx(0.16 / 4.16)


def test_error_shares_see_clipping_within_a_step_of_the_top_code():
    fmt = IntAffine(bits=4, symmetric=True, granularity="tensor")
    params = {"scale": torch.tensor(1.0)}
    w = torch.tensor([7.9, -7.9, 0.3])
    q = replace(fmt.quantize(w), params=params, packed=fmt.pack(fmt.encode(w, params)))
    assert metrics.error_shares(w, q)["clipping"] == pytest.approx(1.62 / 1.71)


@pytest.mark.parametrize("fmt", [IntAffine(3, True, "channel"), NF4(), FloatCast("bf16")])
def test_min_max_ranges_do_not_clip(fmt):
    w = torch.randn(8, 64)
    assert metrics.error_shares(w, fmt.quantize(w))["rounding"] == pytest.approx(1, abs=1e-6)
