"""LLM.int8(): 8-bit products for all input columns but the few that hold outliers.

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv:2208.07339, section 3.

    O = the columns of X with any |x| ≥ threshold
    X·Wᵀ ≈ Σ_{j ∈ O} X_j·W_jᵀ + Σ_{j ∉ O} (absmax of each row of X, and of W, over 127) · int8 X_j · int8 W_jᵀ          eq. (8)

The second sum is what QuantLinear computes from an ActQuant; the first is the columns that its threshold leaves alone.
Which those are is known only when X comes, so the layer keeps all columns of W as int8 and decodes those of O, as
bitsandbytes does; the paper has them in 16 bits.

Axis legend: rows of X = tokens; rows of W = output channels; j = input column.
"""

import torch
from torch import Tensor

from qlab.calibrate import InputStats
from qlab.formats import Format, IntAffine, QTensor
from qlab.nn import ActQuant
from qlab.ptq.method import Method


class LLMInt8(Method):
    """Weights rounded to int8 per output channel, inputs to int8 per token, columns with outliers left as they are.

    threshold : see ActQuant; 6.0 is the paper's. None: all columns are quantized, the paper's "vector-wise" baseline.

    Needs no data. Format: IntAffine(bits=8), which is symmetric, narrow and per channel.
    """

    def __init__(self, threshold: float | None = 6.0):
        self.threshold = threshold
        self.activations = ActQuant(bits=8, granularity="token", threshold=threshold)

    def check(self, fmt: Format, shape: torch.Size | None = None) -> None:
        wanted = isinstance(fmt, IntAffine) and fmt.bits == 8 and fmt.symmetric and fmt.narrow
        if not (wanted and fmt.granularity == "channel"):
            raise ValueError(
                f"LLM.int8() multiplies int8 by int8 with one scale per row, so it takes IntAffine(8), not {fmt}"
            )

    def quantize(self, w: Tensor, fmt: Format, stats: InputStats | None, name: str) -> tuple[QTensor, None]:
        return fmt.quantize(w), None
