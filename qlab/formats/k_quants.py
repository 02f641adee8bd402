"""Q4_K of GGUF files: 4-bit codes whose scales and mins are themselves stored in 6 bits.

Defined by code, not by a paper: ggml, https://github.com/ggml-org/llama.cpp, `block_q4_K` in ggml-common.h and
`quantize_row_q4_K_ref`, `make_qkx2_quants` in ggml-quants.c.

    w' = (d · s_j) · q − (dmin · m_j)        q = 0 … 15; s_j, m_j = 0 … 63 for each sub-block j; d, dmin float16

All rounding is half to even.

Axis legend: n_blocks = in / 256; 8 sub-blocks a block, 32 weights a sub-block.
"""

from functools import reduce

import torch
from torch import Tensor

from qlab.formats.base import Format, Params
from qlab.formats.blocks import GGUFBlock, over

SEARCHED_AT_ONCE = 4096  # sub-blocks whose search fits in a processor's cache


class Q4_K(GGUFBlock):
    """4-bit blocks of 256 in 8 sub-blocks of 32, whose scales and mins are themselves stored in 6 bits. 4.5 bits a weight.

    `fit` searches the scale and min of each sub-block (`search_scale_and_min`), stores them as multiples 0 … 63 of d and
    dmin, and codes are the nearest on the stored grid. Where a multiple is 0 every code is 0; llama.cpp leaves others
    there, which decode to the same.

    Params: scale = d, min = dmin, both (…, n_blocks) float16; sub_scales (…, n_blocks, 12) uint8, the 8 + 8 numbers of
    6 bits in ggml's packing.
    """

    bits, block_size, nibble_span = 4, 256, 32
    values = torch.arange(0.0, 16.0)
    constants = {"scale": (torch.float16, 1), "min": (torch.float16, 1), "sub_scales": (torch.uint8, 12)}

    refits = False

    def per_row(self) -> Format:
        raise ValueError(
            f"{self} cannot be encoded column by column: the scales of a block's sub-blocks are stored together"
        )

    def blocks(self, w: Tensor) -> Tensor:
        """(…, n_blocks, 8, 32)."""
        return super().blocks(w).unflatten(-1, (8, 32))

    def fit(self, w: Tensor) -> Params:
        blocks = self.float_blocks(w)
        found = [search_scale_and_min(part) for part in blocks.reshape(-1, 32).split(SEARCHED_AT_ONCE)]
        scale, depth = (torch.cat(parts).view(blocks.shape[:-1]) for parts in zip(*found, strict=True))
        largest = {"scale": scale.amax(-1), "min": depth.amax(-1)}
        multiples = [
            (over(63, unit).unsqueeze(-1) * x).round().clamp(0, 63).to(torch.uint8)
            for unit, x in zip(largest.values(), (scale, depth), strict=True)
        ]
        params = self.half({name: unit / 63 for name, unit in largest.items()})
        return params | {"sub_scales": pack_sub_scales(*multiples)}

    def sub_blocks(self, params: Params) -> tuple[Tensor, Tensor]:
        """The scale and the depth below zero of each sub-block, decoded: (…, n_blocks, 8, 1) float32 each."""
        scale, depth = unpack_sub_scales(params["sub_scales"])
        scale = params["scale"].float().unsqueeze(-1) * scale
        return scale.unsqueeze(-1), (params["min"].float().unsqueeze(-1) * depth).unsqueeze(-1)

    def encode(self, w: Tensor, params: Params) -> Tensor:
        scale, depth = self.sub_blocks(params)
        codes = ((self.float_blocks(w) + depth) / scale).round().clamp(0, 15)
        return self.unblocks(torch.where(scale == 0, 0, codes).to(torch.uint8), w.shape)

    def rescale(self, values: Tensor, params: Params) -> Tensor:
        scale, depth = self.sub_blocks(params)
        return values.mul_(scale).sub_(depth)


def pack_sub_scales(scale: Tensor, depth: Tensor) -> Tensor:
    """Two times 8 numbers of 6 bits, (…, 8) uint8, in 12 bytes, (…, 12) uint8. Numbers 0 … 3 lie in the low 6 bits of
    bytes 0 … 3 (scale) and 4 … 7 (depth); of numbers 4 … 7 the low 4 bits in bytes 8 … 11, the high 2 bits above the others."""
    (scale, late_scale), (depth, late_depth) = scale.split(4, -1), depth.split(4, -1)
    late = (late_scale & 15) | (late_depth & 15) << 4
    return torch.cat([scale | late_scale >> 4 << 6, depth | late_depth >> 4 << 6, late], -1)


def unpack_sub_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_sub_scales`."""
    scale, depth, late = packed.split(4, -1)
    late_scale, late_depth = (late & 15) | scale >> 6 << 4, late >> 4 | depth >> 6 << 4
    return torch.cat([scale & 63, late_scale], -1), torch.cat([depth & 63, late_depth], -1)


def search_scale_and_min(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the depth (−min ≥ 0) with the least weighted error of x ≈ scale · code − depth, codes 0 … 15.

    x: (…, n) float32. Returns two tensors (…). ggml's `make_qkx2_quants`: each weight counts by rms + |x|. The first
    candidate spreads the codes over [min(x, 0), max x]. Each of 21 more takes codes at 14.0, 14.1 … 16.0 steps to that
    range, solves for scale and min by weighted least squares with min ≤ 0, and is kept, its min too, if the error falls.
    """

    def total(values: Tensor) -> Tensor:
        return reduce(torch.add, values)  # in the order of ggml's loops: another order gives other last bits

    x = x.movedim(-1, 0).contiguous()
    mean_square = total(x * x) / len(x)
    weight = mean_square.double().sqrt().float() + x.abs()  # torch's float32 sqrt may miss the last bit
    sum_w, sum_x = total(weight), total(weight * x)
    low, high = x.amin(0).clamp(max=0), x.amax(0)
    inverse = over(15, high - low)
    scale = over(1, inverse)
    error = total(weight * (scale * (inverse * (x - low)).round() + low - x).square())
    for steps in torch.arange(21.0) * 0.1 - 1 + 15:
        codes = (over(steps, high - low) * (x - low)).round().clamp(0, 15)
        sum_l, sum_l2, sum_xl = total(weight * codes), total(weight * codes * codes), total(weight * codes * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        new_scale = torch.where(new_low > 0, sum_xl / sum_l2, new_scale)
        new_low = new_low.clamp(max=0)
        new_error = total(weight * (new_scale * codes + new_low - x).square())
        better = (determinant > 0) & (new_error < error)
        error = torch.where(better, new_error, error)
        scale, low = torch.where(better, new_scale, scale), torch.where(better, new_low, low)
    return scale, low.abs()
