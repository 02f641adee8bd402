"""How far quantized weights are from the originals.

Every function takes w and w_hat (same shape, weight units) and returns a Python float. Sums run in float64 over slices, so
no full-size float64 copy is made. Raises ValueError where the shapes differ or a tensor is empty.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qlab.formats import QTensor

SLICE = 1 << 20


def _slices(w: Tensor, w_hat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if w.shape != w_hat.shape:
        raise ValueError(f"the two tensors differ in shape: {tuple(w.shape)} and {tuple(w_hat.shape)}")
    if w.numel() == 0:
        raise ValueError(f"an error of no values is undefined: both tensors are empty, shape {tuple(w.shape)}")
    w, w_hat = w.detach().reshape(-1), w_hat.detach().reshape(-1)
    for start in range(0, w.numel(), SLICE):
        yield w[start : start + SLICE].double(), w_hat[start : start + SLICE].double()


def mse(w: Tensor, w_hat: Tensor) -> float:
    """Mean squared error, in weight units squared."""
    return sum(float((a - b).square().sum()) for a, b in _slices(w, w_hat)) / w.numel()


def sqnr_db(w: Tensor, w_hat: Tensor) -> float:
    """Signal to quantization noise, 10 · log10(Σw² / Σ(w − w')²) in dB. No error: inf. One bit more is worth about 6 dB."""
    signal = sum(float(a.square().sum()) for a, _ in _slices(w, w_hat))
    noise = mse(w, w_hat) * w.numel()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def max_error(w: Tensor, w_hat: Tensor) -> float:
    """The largest |w − w'|, in weight units."""
    return max(float((a - b).abs().max()) for a, b in _slices(w, w_hat))


def cosine(w: Tensor, w_hat: Tensor) -> float:
    """Cosine of the angle between w and w' as vectors. NaN where one of them is zero: it has no direction."""
    dot = norm = norm_hat = 0.0
    for a, b in _slices(w, w_hat):
        dot, norm, norm_hat = dot + float(a @ b), norm + float(a @ a), norm_hat + float(b @ b)
    return dot / math.sqrt(norm * norm_hat) if norm and norm_hat else math.nan


def histogram_kl(w: Tensor, w_hat: Tensor, bins: int = 128) -> float:
    """KL(P‖Q) in nats between the histograms of w and w_hat over their common range, `bins` bins.

    Half a count is added to every bin, so that a bin which quantization emptied gives a large but finite value.
    """
    edges = torch.stack([*torch.aminmax(w.detach()), *torch.aminmax(w_hat.detach())]).float()
    low, high = float(edges.min()), float(edges.max())
    p, q = torch.full((2, bins), 0.5, dtype=torch.float64)
    for a, b in _slices(w, w_hat):
        p += torch.histc(a, bins, low, high)
        q += torch.histc(b, bins, low, high)
    p, q = p / p.sum(), q / q.sum()
    return float((p * (p / q).log()).sum())


def error_shares(w: Tensor, q: QTensor) -> dict[str, float]:
    """How the squared error divides: {"clipping": share, "rounding": share}; they sum to 1 (both 0 without error).

    Clipping is the error of weights beyond the lowest and highest value that their block can store, rounding that of all
    others. Section 2 of arXiv:2106.08295.
    """
    low, high = q.format.limits(q.params, q.shape)
    outside = ((w < low) | (w > high)).reshape(-1).double()
    total = clipped = 0.0
    for i, (a, b) in enumerate(_slices(w, q.dequantize(torch.float32))):
        squared = (a - b).square()
        total, clipped = total + float(squared.sum()), clipped + float(squared @ outside[i * SLICE : (i + 1) * SLICE])
    return (
        {"clipping": clipped / total, "rounding": 1 - clipped / total} if total else {"clipping": 0.0, "rounding": 0.0}
    )
