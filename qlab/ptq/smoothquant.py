"""SmoothQuant: outliers of the activations moved into the weights, where they are easier to quantize.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, section 4.

    Y = (X · diag(s)⁻¹) · (diag(s) · Wᵀ)                   eq. (3), the same product for any s > 0
    s_j = max |X_j|^α / max |W_j|^(1−α)                    eq. (4)

α = 0 moves all of the difficulty to the activations, α = 1 to the weights.

Axis legend: out, in = rows and columns of a weight; j = input channel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlab.calibrate import InputStats
from qlab.formats import Format, QTensor
from qlab.formats.base import check_weights
from qlab.nn import ActQuant
from qlab.ptq.method import RTN, Method

SMALLEST = 1e-5  # of a weight column's maximum and of s, as in the paper's own code


def smooth_scale(amax: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """s, (in,) float32, finite and at least 1e-5: what the input is divided by and the columns of W are multiplied by.

    amax : (in,), the largest |x| of each input channel on calibration data.
    weights : (out, in) each, of ALL the layers that share this input: the maximum is taken over all of them, for they
        share s too.
    alpha : α in [0, 1], an exponent.

    A channel that is 0 throughout the calibration data gets s = 1e-5 (for α > 0): harmless where it stays 0.

    Raises ValueError for shapes that do not fit, for α out of range, and for NaN, Inf or a negative amax.

    >>> smooth_scale(torch.tensor([16.0, 1.0]), [torch.tensor([[0.5, -2.0]]), torch.tensor([[-1.0, 4.0]])])
    tensor([4.0000, 0.5000])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is an exponent between 0 and 1, got {alpha}")
    shapes = [tuple(w.shape) for w in weights]
    if not shapes or any(len(shape) != 2 or not shape[0] or shape[1:] != tuple(amax.shape) for shape in shapes):
        raise ValueError(
            f"amax must be (in,) and the weights (out, in) with the same in, at least one; got {tuple(amax.shape)} and "
            f"{shapes}"
        )
    if not (amax.isfinite() & (amax >= 0)).all():
        raise ValueError(f"amax must be finite and not negative, got {float(amax.min())} to {float(amax.max())}")
    for w in weights:
        check_weights(w)
    largest = torch.stack([w.detach().abs().amax(0).float() for w in weights]).amax(0)
    return (amax.float().pow(alpha) / largest.clamp(min=SMALLEST).pow(1 - alpha)).clamp(min=SMALLEST)


class SmoothQuant(Method):
    """The input of layers smoothed before they are quantized; activations are 8-bit integers per token unless the caller
    says otherwise.

    alpha : see `smooth_scale`. codes : the method that chooses the codes of the smoothed weights.
    norms_only : smooth what a norm gives, the inputs of attention and of the first MLP layer, as the paper does (section 4).
        False: the others too. Behind an activation function the channel that is the largest in X is often the largest in W
        as well. If it stands out more in W than in X, s divides it by less than the others, and it stands out more.

    Raises ValueError for codes that transform the input, or quantize it, in a way of their own.
    """

    def __init__(self, alpha: float = 0.5, codes: Method | None = None, norms_only: bool = True):
        codes = codes or RTN()
        if type(codes).scale is not Method.scale or codes.activations is not None:
            raise ValueError(
                f"SmoothQuant scales and quantizes the input, and {codes} would do so too: pass a method that only chooses "
                "codes"
            )
        self.alpha, self.codes, self.norms_only = alpha, codes, norms_only
        self.keep = tuple(dict.fromkeys(("amax", *codes.keep)))
        self.activations = ActQuant(bits=8, granularity="token")

    def check(self, fmt: Format, shape: torch.Size | None = None) -> None:
        self.codes.check(fmt, shape)

    def scale(self, weights: list[Tensor], stats: InputStats, formats: list[Format]) -> Tensor:
        return smooth_scale(stats.amax, weights, self.alpha)

    def quantize(self, w: Tensor, fmt: Format, stats: InputStats | None, name: str) -> tuple[QTensor, Tensor | None]:
        return self.codes.quantize(w, fmt, stats, name)
