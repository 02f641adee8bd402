"""Entropy calibration: the clipping threshold that keeps the most information, by Kullback–Leibler divergence.

Migacz 2017, "8-bit Inference with TensorRT", GTC; in the form of NVIDIA's pytorch-quantization 2.1.3,
whose conventions are:
    - a histogram of |x|, and the count of its first bin replaced by that of the second (zeros are no information)
    - P: the first i bins, and everything beyond them added to bin i − 1, where clipping would put it
    - Q: the first i bins, without that, merged into `levels` levels; the count of a level is spread evenly over those of
      its bins that are not empty
    - KL(P‖Q) for i = start_bin, start_bin + stride, …, all bins; of equal minima the last one wins
Signed 8-bit integers have 128 magnitudes, so 128 levels.

Axis legend: bins = bins of |x| up to the largest one, candidates = values of i.
"""

import torch
from torch import Tensor

from qlab.calibrate.histogram import Histogram
from qlab.calibrate.observers import Observer


def kl_divergences(counts: Tensor, levels: int = 128, start_bin: int = 128, stride: int = 1) -> tuple[Tensor, Tensor]:
    """(number of bins kept, KL(P‖Q) in nats) of every candidate: (candidates,) int64 and (candidates,) float64.

    counts: (bins,) how many |x| lie in each bin. Infinite where values would be clipped onto an empty bin.
    Raises ValueError if there are fewer bins than start_bin, or 2.
    """
    if counts.dim() != 1 or len(counts) < max(start_bin, 2):
        raise ValueError(f"the search starts at {start_bin} bins, got counts of shape {tuple(counts.shape)}")
    bins = counts.double()
    bins[0] = bins[1]
    present = (bins > 0).double()
    total, cumulative = bins.sum(), bins.cumsum(0)
    kept = torch.arange(start_bin, len(bins) + 1, stride)
    divergences = torch.empty(len(kept), dtype=torch.float64)
    for n, i in enumerate(kept.tolist()):
        p = bins[:i].clone()
        p[-1] += total - cumulative[i - 1]
        level = torch.arange(i) * levels // i
        mean = level.bincount(bins[:i], levels) / level.bincount(present[:i], levels)
        q = torch.where(present[:i] > 0, mean[level], 0)
        p, q = p / total, q / cumulative[i - 1].clamp(min=1)  # 0, not 0 / 0, where all that is kept is empty
        divergences[n] = torch.where(p > 0, p * (p / q).log(), 0).sum()
    return kept, divergences


class Entropy(Observer):
    """The threshold with the least KL divergence between the clipped histogram and its quantized form.

    levels : magnitudes that the integers have: 2**(bits − 1) signed, 2**bits for data without negative values.
    start_bin, stride : the candidates, in bins; see `kl_divergences`.
    bins : a power of two; at least half of them are in use, so at least 2 · start_bin are needed.
    """

    def __init__(self, levels: int = 128, start_bin: int = 128, stride: int = 1, bins: int = 2048):
        super().__init__(Histogram(bins))
        for name, value in {"levels": levels, "start_bin": start_bin, "stride": stride}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if bins < 2 * max(start_bin, 2):
            raise ValueError(f"start_bin={start_bin} needs at least {2 * max(start_bin, 2)} bins, got bins={bins}")
        self.levels, self.start_bin, self.stride = levels, start_bin, stride

    def divergences(self) -> tuple[Tensor, Tensor]:
        """(thresholds in the unit of x, KL in nats) of every candidate, both (candidates,) float64."""
        kept, divergences = kl_divergences(self.seen.magnitudes, self.levels, self.start_bin, self.stride)
        return kept.double() * self.seen.width, divergences

    def threshold(self) -> float:
        if self.seen.amax == 0:
            return 0.0
        thresholds, divergences = self.divergences()
        return float(thresholds[last_argmin(divergences)])


def last_argmin(values: Tensor) -> int:
    """Index of the smallest value of (n,); of equal ones the last."""
    return len(values) - 1 - int(values.flip(0).argmin())
