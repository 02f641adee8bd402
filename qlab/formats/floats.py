"""Half-precision floats as a format: what storing fp16 or bf16 costs and loses.

IEEE 754 binary16: 1 sign, 5 exponent, 10 mantissa bits. bfloat16: 1, 8, 7: the range of float32 at less precision.
"""

import torch
from torch import Tensor

from qlab.formats.base import Format, Params, QTensor, check_weights

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class FloatCast(Format):
    """Each weight cast to fp16 or bf16, round to nearest even. Codes are the 16 bits, read as an int16. No params.

    Raises ValueError for another name, and for weights beyond the format's largest value, saying how many: fp16 ends at
    65504.
    """

    bits = 16
    code_dtype = torch.int16

    def __init__(self, name: str):
        if name not in DTYPES:
            raise ValueError(f"FloatCast takes {' or '.join(map(repr, DTYPES))}, got {name!r}")
        self.name, self.float_dtype = name, DTYPES[name]

    def blocks(self, w: Tensor) -> Tensor:
        return w.reshape(-1, 1)

    def unblocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.view(shape)

    def fit(self, w: Tensor) -> Params:
        check_weights(w)
        return {}

    def encode(self, w: Tensor, params: Params) -> Tensor:
        check_weights(w)
        cast = w.to(self.float_dtype)
        if not cast.isfinite().all():
            largest = torch.finfo(self.float_dtype).max
            raise ValueError(
                f"{int(cast.isinf().sum())} of {w.numel()} weights lie beyond {largest}, the largest {self.name} value "
                f"(largest weight: {float(w.abs().max())}); use bf16 or scale them first"
            )
        return cast.view(torch.int16)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return codes.view(self.float_dtype).float()

    def limits(self, params: Params, shape: torch.Size) -> tuple[Tensor, Tensor]:
        largest = torch.tensor(torch.finfo(self.float_dtype).max)
        return -largest.expand(shape), largest.expand(shape)

    def pack(self, codes: Tensor) -> Tensor:
        return codes.reshape(-1).view(torch.uint8)

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        return packed.view(torch.int16).view(shape)

    def dequantize(self, q: QTensor) -> Tensor:
        return self.decode(q.codes, q.params)

    def __repr__(self) -> str:
        return f"FloatCast({self.name!r})"
