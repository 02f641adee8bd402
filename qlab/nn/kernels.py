"""Weights decoded by bitsandbytes' own kernel, where it is there and right: the bits of `QTensor.dequantize`, sooner."""

import sys

import torch
from torch import Tensor

from qlab.formats import QTensor
from qlab.formats.codebook import BlockCodebook

BLOCK_SIZES = {2**power for power in range(5, 13)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dequantize(q: QTensor, dtype: torch.dtype) -> Tensor:
    """`q.dequantize(dtype)`: NF4 and FP4 by bitsandbytes in a process that has imported it, everything else as it is."""
    if not (isinstance(q.format, BlockCodebook) and "bitsandbytes" in sys.modules and _is_right(q, dtype)):
        return q.dequantize(dtype)
    fmt = q.format
    kernel = torch.ops.bitsandbytes.dequantize_4bit
    return kernel(q.packed, fmt.absmax(q.params), fmt.block_size, fmt.name.lower(), q.shape, dtype)


def _is_right(q: QTensor, dtype: torch.dtype) -> bool:
    """False for what the kernel refuses, and for rows that blocks do not divide: with AVX512 it decodes them wrongly."""
    whole_blocks = q.shape[-1] % q.format.block_size == 0
    return (
        q.format.block_size in BLOCK_SIZES
        and dtype in DTYPES
        and whole_blocks
        and q.packed.device.type in ("cpu", "cuda")
    )
