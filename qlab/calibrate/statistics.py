"""Statistics of a layer's input, summed batch by batch: what SmoothQuant, AWQ and GPTQ ask of calibration data.

    amax_j          = max |x_j|                 SmoothQuant, arXiv:2211.10438, eq. (4)
    mean_abs_j      = mean |x_j|                AWQ, arXiv:2306.00978, section 3.2
    second_moment_j = mean x_j²                 the diagonal of X·Xᵀ over the number of tokens
    hessian         = (2 / tokens) · X·Xᵀ       GPTQ, arXiv:2210.17323, section 3

Axis legend: X = (in, tokens), the inputs x as columns; j = input channel.
"""

import torch
from torch import Tensor

from qlab.nn import check_activations

STATISTICS = ("amax", "mean_abs", "second_moment", "hessian")
SLICE = 1 << 20  # values converted to another dtype at a time


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """Mean square of each output's error on the observed inputs: (out,), half of the diagonal of D·H·Dᵀ.

    difference: (out, in), D = W' − W. hessian: (in, in), of InputStats. The objective of GPTQ, eq. (1), over the number of
    tokens, without running the layer.
    """
    difference = difference.to(hessian.dtype)
    return (difference @ hessian).mul_(difference).sum(1) / 2


class InputStats:
    """`observe` inputs, then read the statistics.

    Parameters
    ----------
    keep : which of STATISTICS to sum. amax, mean_abs and second_moment take (in,) each; hessian takes (in, in).
    dtype : of X·Xᵀ, torch.float32 or torch.float64. The other sums are float64 whatever the dtype of x.

    tokens : rows observed so far.

    Reading raises ValueError where nothing was observed or the statistic was not kept.

    >>> stats = InputStats(keep=("mean_abs", "hessian"))
    >>> stats.observe(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    >>> stats.tokens, stats.mean_abs.tolist(), stats.hessian.tolist()
    (2, [2.0, 1.0], [[10.0, -2.0], [-2.0, 4.0]])
    """

    def __init__(self, keep: tuple[str, ...] = STATISTICS[:3], dtype: torch.dtype = torch.float32):
        if not keep or set(keep) - set(STATISTICS):
            raise ValueError(f"keep some of {', '.join(STATISTICS)}, got {keep!r}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"X·Xᵀ is summed in torch.float32 or torch.float64, got {dtype}")
        self.keep, self.dtype, self.tokens = tuple(keep), dtype, 0
        self._sums: dict[str, Tensor] = {}

    def observe(self, x: Tensor) -> None:
        """x: (…, in), floating point: each vector along the last axis is one token.

        Raises TypeError on integers, ValueError on NaN or Inf, on a scalar, and where `in` is not that of earlier inputs.
        """
        check_activations(x)
        if x.dim() == 0:
            raise ValueError("an input is (…, in), got a scalar")
        x = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
        if not self._sums:
            self._sums = self._zeros(x)
        channels = next(iter(self._sums.values())).shape[0]
        if x.shape[1] != channels:
            raise ValueError(f"inputs so far had {channels} channels, this one has {x.shape[1]}")
        for rows in x.split(max(1, SLICE // max(1, channels))):
            self._add(rows)
        self.tokens += len(x)

    def _zeros(self, x: Tensor) -> dict[str, Tensor]:
        channels = x.shape[1]
        sums = {name: x.new_zeros(channels, dtype=torch.float64) for name in self.keep if name != "hessian"}
        if "hessian" in self.keep:
            sums["hessian"] = x.new_zeros((channels, channels), dtype=self.dtype)
        return sums

    def _add(self, rows: Tensor) -> None:
        if not len(rows):
            return
        for name, total in self._sums.items():
            if name == "hessian":
                same = rows.to(self.dtype)
                total.addmm_(same.T, same)
            elif name == "amax":
                torch.maximum(total, rows.abs().amax(0).double(), out=total)
            else:
                values = rows.double().abs() if name == "mean_abs" else rows.double().square()
                total += values.sum(0)

    def _sum(self, name: str) -> Tensor:
        if name not in self.keep:
            raise ValueError(f"{name} was not kept, only {', '.join(self.keep)}: pass keep={(*self.keep, name)}")
        if not self.tokens:
            raise ValueError("no input was observed yet")
        return self._sums[name]

    @property
    def amax(self) -> Tensor:
        """(in,) float32, largest |x| of each channel."""
        return self._sum("amax").float()

    @property
    def mean_abs(self) -> Tensor:
        """(in,) float32, mean |x| of each channel."""
        return (self._sum("mean_abs") / self.tokens).float()

    @property
    def second_moment(self) -> Tensor:
        """(in,) float64, mean x² of each channel."""
        return self._sum("second_moment") / self.tokens

    @property
    def hessian(self) -> Tensor:
        """(in, in) in `dtype`: (2 / tokens) · X·Xᵀ, the Hessian of ‖WX − W'X‖² / tokens in a row of W'. A new tensor.

        Raises ValueError if the sum overflowed.
        """
        hessian = self._sum("hessian") * (2 / self.tokens)
        if not hessian.isfinite().all():
            raise ValueError(f"X·Xᵀ is not finite in {self.dtype}: capture with dtype=torch.float64, or look at amax")
        return hessian

    def divided_by(self, scale: Tensor) -> "InputStats":
        """The statistics of x / scale, as if those inputs had been observed. scale: (in,) > 0.

        Raises ValueError where the shape does not fit or a scale is not finite and above 0.
        """
        channels = next(iter(self._sums.values())).shape[-1] if self._sums else len(scale)
        if tuple(scale.shape) != (channels,) or not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"a scale is ({channels},), finite and above 0, got shape {tuple(scale.shape)}: {scale}")
        scaled = InputStats(self.keep, self.dtype)
        scaled.tokens = self.tokens
        inverse = 1 / scale.double()
        powers = {"amax": inverse, "mean_abs": inverse, "second_moment": inverse.square()}
        powers["hessian"] = torch.outer(inverse, inverse)
        scaled._sums = {name: (total * powers[name]).to(total.dtype) for name, total in self._sums.items()}
        return scaled

    def __repr__(self) -> str:
        return f"InputStats({self.tokens} tokens, {', '.join(self.keep)})"
