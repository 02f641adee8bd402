"""Range observers: where to clip activations so that integers of a few bits lose little.

    observer = MSE(bits=8)                  or MinMax(), Percentile(99.9), Entropy()
    for x in batches: observer.observe(x)
    params = fmt.from_range(*observer.range())          or ActQuant(static=True, …).freeze(*observer.range())

Each decides on one *threshold*, the largest |x| that is kept. The range is [−threshold, threshold], cut to what was seen:
data without negative values gets a range that starts at 0. Survey of the methods: Wu et al. 2020, "Integer Quantization
for Deep Learning Inference", arXiv:2004.09602, section 3.4 (max, percentile, entropy); MSE: Nagel et al. 2021,
arXiv:2106.08295, section 3.1.

All work on a stream of batches in bounded memory, and the order and size of batches change nothing.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from qlab.calibrate.histogram import Extremes, Histogram
from qlab.formats import IntAffine


class Observer:
    """`observe` batches, then read `range`. A subclass gives `threshold`.

    Raises TypeError on integers, ValueError on NaN or Inf in a batch, and ValueError where nothing was observed.

    seen : what is remembered of the values: their Extremes, or a Histogram of them.
    """

    def __init__(self, seen: Extremes):
        self.seen = seen

    def observe(self, x: Tensor) -> None:
        """Take in all values of x, any shape, floating point."""
        self.seen.add(x)

    def threshold(self) -> float:
        """The largest |x| to keep, in the unit of x."""
        raise NotImplementedError(f"{type(self).__name__} does not define threshold")

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high), each () float32."""
        seen = self.seen
        if seen.low > seen.high:
            raise ValueError(
                f"{type(self).__name__} has observed no values yet: call observe(x) on calibration data first"
            )
        kept = self.threshold()
        if kept >= seen.amax:
            return torch.tensor(seen.low), torch.tensor(seen.high)
        return torch.tensor(max(min(seen.low, 0.0), -kept)), torch.tensor(min(max(seen.high, 0.0), kept))


class MinMax(Observer):
    """Everything is kept: no value is clipped, and one outlier sets the step of all."""

    def __init__(self):
        super().__init__(Extremes())

    def threshold(self) -> float:
        return self.seen.amax


class Percentile(Observer):
    """At least `percentile` % of the values are kept: the upper border of the histogram's bin in which that rank lies.

    The |x| of that rank itself is less than one bin below, at most amax / 1024 with 2048 bins.
    """

    def __init__(self, percentile: float = 99.99, bins: int = 2048):
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile lies above 0 and up to 100, got {percentile}")
        super().__init__(Histogram(bins))
        self.percentile = percentile

    def threshold(self) -> float:
        cumulative = self.seen.magnitudes.cumsum(0)
        # Exact: 0.9999 · n in floating point can step over an integer, and so to the next outlier.
        rank = math.ceil(Fraction(str(self.percentile)) * int(cumulative[-1]) / 100)
        return self.seen.width * (int(torch.searchsorted(cumulative, rank)) + 1)


class MSE(Observer):
    """The threshold, of a grid of shares of amax, whose quantization has the least mean squared error.

    bits, symmetric, narrow : the integers that the range is meant for, as in IntAffine.
    ratios : the grid, as shares of amax. At equal errors the first one wins.
    The error is that of the middles of the histogram's bins, weighted by their counts.
    """

    def __init__(
        self, bits: int = 8, symmetric: bool = True, narrow: bool = True, ratios: Tensor | None = None, bins: int = 2048
    ):
        super().__init__(Histogram(bins))
        self.format = IntAffine(bits, symmetric, "channel", narrow=narrow)  # one "channel" for each ratio
        self.ratios = torch.linspace(1, 0.01, 100) if ratios is None else torch.as_tensor(ratios, dtype=torch.float32)
        if self.ratios.dim() != 1 or not ((self.ratios > 0) & (self.ratios <= 1)).all() or not len(self.ratios):
            raise ValueError(f"ratios are a list of shares in (0, 1], got {self.ratios.tolist()}")

    def errors(self) -> Tensor:
        """(len(ratios),) float64: the mean squared error at each ratio, in the unit of x squared."""
        seen = self.seen
        values, counts = seen.centers()
        kept = self.ratios * seen.amax
        low, high = (-kept).clamp(min=min(seen.low, 0.0)), kept.clamp(max=max(seen.high, 0.0))
        params = self.format.from_range(low, high)
        values = values.expand(len(kept), -1)
        decoded = self.format.decode(self.format.encode(values, params), params)
        return (decoded - values).double().square() @ counts.double() / counts.sum()

    def threshold(self) -> float:
        return float(self.ratios[self.errors().argmin()]) * self.seen.amax
