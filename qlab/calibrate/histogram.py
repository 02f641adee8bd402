"""A histogram of a stream of numbers, in bounded memory, that does not depend on how the stream was cut into batches.

The width of a bin is the smallest power of two at which the largest |x| so far lies inside the last bin. When a larger
value arrives, the width doubles and neighbouring bins are added together. Bin borders of one width are bin borders of
every smaller one, so the counts are exactly those that all values at once would have given.
"""

import math

import torch
from torch import Tensor

from qlab.nn import check_activations

SLICE = 1 << 20  # values turned into float64 and bin numbers at a time


class Extremes:
    """The smallest and the largest value of a stream. low, high: exact; inf and −inf before any value."""

    def __init__(self):
        self.low, self.high = math.inf, -math.inf

    @property
    def amax(self) -> float:
        """The largest |x|."""
        return max(-self.low, self.high)

    def add(self, x: Tensor) -> None:
        """Take in all values of x (any shape, floating point). Raises TypeError on integers, ValueError on NaN or Inf."""
        check_activations(x)
        if x.numel():
            low, high = torch.aminmax(x.detach())
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))


class Histogram(Extremes):
    """Counts of |x|, negative and other values apart.

    Parameters
    ----------
    bins : bins from 0 to the largest |x|, a power of two. Between half and all of them are in use.

    counts : (2, bins) int64. Row 0: x < 0, row 1: x ≥ 0. Bin i holds width · i ≤ |x| < width · (i + 1).
    width : in the unit of x; 0.0 while only zeros were seen.

    >>> h = Histogram(bins=4)
    >>> h.add(torch.tensor([0.0, 0.5, 0.75]))
    >>> h.width, h.counts[1].tolist()
    (0.25, [1, 0, 1, 1])
    >>> h.add(torch.tensor([-1.5]))
    >>> h.width, h.counts.tolist()
    (0.5, [[0, 0, 0, 1], [1, 2, 0, 0]])
    """

    def __init__(self, bins: int = 2048):
        if bins < 1 or bins & (bins - 1):
            raise ValueError(f"bins must be a power of two, got {bins}")
        super().__init__()
        self.bins = bins
        self.counts = torch.zeros(2, bins, dtype=torch.int64)
        self._exponent: int | None = None  # width = 2**exponent

    @property
    def width(self) -> float:
        return 0.0 if self._exponent is None else math.ldexp(1.0, self._exponent)

    @property
    def magnitudes(self) -> Tensor:
        """(used,) int64: counts of |x|, up to the bin of the largest one."""
        counts = self.counts.sum(0)
        used = counts.nonzero()
        return counts[: int(used[-1]) + 1] if len(used) else counts[:0]

    def add(self, x: Tensor) -> None:
        super().add(x)
        if self.amax > 0:
            self._widen(math.frexp(self.amax)[1] - int(math.log2(self.bins)))  # amax < 2**frexp's exponent
        for part in x.reshape(-1).split(SLICE):
            bin_number = (part.abs().double() / (self.width or 1)).long() + self.bins * (part >= 0)
            self.counts += bin_number.bincount(minlength=2 * self.bins).view(2, self.bins).cpu()

    def _widen(self, exponent: int) -> None:
        if self._exponent is not None and exponent != self._exponent:  # larger: amax never shrinks
            merged = min(2 ** (exponent - self._exponent), self.bins)  # neighbours that become one bin
            sums = self.counts.view(2, -1, merged).sum(2)
            self.counts = torch.nn.functional.pad(sums, (0, self.bins - sums.shape[1]))
        self._exponent = exponent

    def centers(self) -> tuple[Tensor, Tensor]:
        """(values, counts) of the bins in use, ascending: the middle of each, (m,) float32, and its count, (m,) int64."""
        middle = (torch.arange(self.bins) + 0.5) * self.width
        values, counts = torch.cat([-middle.flip(0), middle]), torch.cat([self.counts[0].flip(0), self.counts[1]])
        return values[counts > 0], counts[counts > 0]
