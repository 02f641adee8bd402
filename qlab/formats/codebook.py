"""4-bit codebooks: 16 levels in [−1, 1], scaled by the absmax of each block. NF4 and FP4 as bitsandbytes stores them.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314: section 3, "4-bit NormalFloat
Quantization" (eq. 4) and "Double Quantization".

    absmax = max |w| of a block                       block_size weights of the flattened tensor
    code   = the level nearest to w / absmax          boundaries: the midpoints between levels
    w'     = absmax · levels[code]

Axis legend: n_blocks = ceil(w.numel() / block_size); the last block may be short.
"""

import copy

import torch
from torch import Tensor

from qlab.formats.base import Format, Params, QTensor, check_weights
from qlab.formats.packing import unpack_values

# The format's own table, as released with the paper; `normal_float_levels` derives it.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two exponent bits, one mantissa bit, in code order. Not the OCP E2M1 grid (0, .5, 1, 1.5, 2, 3, 4, 6).
FP4_LEVELS = tuple(
    sign * magnitude / 12 for sign in (1, -1) for magnitude in (0, 0.0625, 8, 12, 4, 6, 2, 3)
)  # fmt: skip
SMALLEST_ABSMAX = 1e-38  # bitsandbytes' floor: 1/absmax must not overflow
DOUBLE_QUANT_BLOCK = 256
# Weights decoded at once. On a CPU their float32 values, 512 KiB, stay in a core's cache while they are scaled and
# rounded; an accelerator wants few and large steps.
CPU_TILE, TILE = 2**17, 2**24


def normal_float_levels(bits: int = 4, offset: float = 0.9677083) -> Tensor:
    """The levels of NormalFloat: quantiles of N(0, 1), divided by the largest. (2**bits,) float32, ascending.

    An even number of levels cannot be symmetric and hold 0, so the two sides are cut apart: 2**(b−1) quantiles between
    1/2 and `offset` for the positive side, one fewer for the negative side, and 0 between them. `offset` is the mean of
    1 − 1/32 and 1 − 1/30: the outermost quantile that keeps the end bins as full as the others.
    """
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(offset, 0.5, count + 1)[:-1].double())

    levels = torch.cat([quantiles(half), torch.zeros(1, dtype=torch.float64), -quantiles(half - 1)]).float()
    return levels.sort().values / levels.max()


def dynamic_map() -> Tensor:
    """The 256 levels of the signed dynamic 8-bit type, ascending, in [−0.993, 1]. (256,) float32.

    Dettmers 2015, arXiv:1511.04561, section 2: the more leading zeros, the fewer bits are left for the fraction. Decade i
    (10⁻⁶ … 10⁰) holds 2**i levels of each sign, evenly spaced over [0.1, 1] of the decade; then 0 and 1.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        levels += (10 ** (i - 6) * middles).tolist() + (-(10 ** (i - 6)) * middles).tolist()
    return torch.tensor(levels).sort().values


def nearest_code(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to x, uint8; at a midpoint the lower level. levels: (k,) float32, ascending or not."""
    ascending, order = levels.sort()
    position = torch.bucketize(x, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
    if not torch.equal(ascending, levels):
        position = order.to(torch.int32)[position]
    return position.to(torch.uint8)


class BlockCodebook(Format):
    """16 levels × the absmax of each block of `block_size` weights, cut from the flattened tensor as bitsandbytes does.

    Parameters
    ----------
    block_size : weights per block. bitsandbytes accepts powers of 2 from 32 to 4096.
    double_quant : store absmax itself in 8 bits: its mean is subtracted, and blocks of 256 of the rest are quantized to
        the dynamic map with one float32 absmax each. 32/64 = 0.5 bits a weight become 8/64 + 32/(64·256) = 0.127.

    Params: absmax (n_blocks,) float32; with double_quant they are stored as absmax_code (n_blocks,) uint8, absmax_scale
    (ceil(n_blocks / 256),) float32, absmax_offset () float32.
    """

    bits = 4
    name: str

    def __init__(self, block_size: int = 64, double_quant: bool = False):
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size, self.double_quant = block_size, double_quant

    @property
    def levels(self) -> Tensor:
        """(16,) the values in [−1, 1], in code order."""
        return self.values

    def blocks(self, w: Tensor) -> Tensor:
        """(n_blocks, block_size); a short last block is filled with zeros."""
        return _flat_blocks(w, self.block_size or w.shape[-1])

    def unblocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.reshape(-1)[: shape.numel()].view(shape)

    def fit(self, w: Tensor) -> Params:
        """The exact absmax: as in bitsandbytes codes are chosen with it, and only then is absmax itself quantized."""
        low, high = torch.aminmax(self.blocks(w), dim=-1)
        check_weights(w, low, high)
        return {"absmax": torch.maximum(-low, high).float()}

    def stored(self, params: Params) -> Params:
        return self._double_quantize(params["absmax"]) if self.double_quant else params

    refits = True

    def per_row(self) -> "BlockCodebook":
        rows = copy.copy(self)
        rows.block_size, rows.double_quant = None, False  # None: as long as the row
        return rows

    def row_params(self, params: Params, shape: torch.Size) -> Params:
        if shape[1] % self.block_size:
            raise ValueError(
                f"{self} cannot be encoded column by column on a weight of shape {tuple(shape)}: blocks of "
                f"{self.block_size} run over the ends of its rows. Choose a block_size that divides {shape[1]}"
            )
        return {"absmax": params["absmax"].view(shape[0], -1)}

    def _double_quantize(self, absmax: Tensor) -> Params:
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        nested = _flat_blocks(absmax - offset, DOUBLE_QUANT_BLOCK)
        scale = nested.abs().amax(-1)
        codes = nearest_code(
            nested * (1 / scale.clamp(min=SMALLEST_ABSMAX)).unsqueeze(-1), dynamic_map().to(absmax.device)
        )
        codes = codes.reshape(-1)[: len(absmax)].clone()  # without the padding of the last block of blocks
        return {"absmax_code": codes, "absmax_scale": scale, "absmax_offset": offset}

    def absmax(self, params: Params) -> Tensor:
        """(n_blocks,) float32: the absmax that decoding uses, itself decoded where it is stored in 8 bits."""
        if "absmax" in params:
            return params["absmax"]
        codes, scale = params["absmax_code"], params["absmax_scale"]
        nested = _flat_blocks(dynamic_map().to(codes.device)[codes.int()], DOUBLE_QUANT_BLOCK) * scale.unsqueeze(-1)
        return nested.reshape(-1)[: len(codes)] + params["absmax_offset"]

    def encode(self, w: Tensor, params: Params) -> Tensor:
        check_weights(w)
        absmax = self.absmax(params).clamp(min=SMALLEST_ABSMAX).unsqueeze(-1)
        blocks = self.blocks(w).float()
        normalized = blocks * (1 / absmax)
        if (
            self.block_size and w.numel() % self.block_size
        ):  # bitsandbytes divides the short last block and multiplies all others
            normalized[-1] = blocks[-1] / absmax[-1]
        return self.unblocks(nearest_code(normalized, self.levels.to(w.device)), w.shape)

    def rescale(self, values: Tensor, params: Params) -> Tensor:
        return values.mul_(self.absmax(params).unsqueeze(-1))

    def dequantize_as(self, q: QTensor, dtype: torch.dtype) -> Tensor:
        """A tile of blocks at a time: looked up and scaled in float32, then rounded into its place in the result."""
        absmax, n = self.absmax(q.params), q.shape.numel()
        weights = torch.empty(n, dtype=dtype, device=q.packed.device)
        tile = CPU_TILE if q.packed.device.type == "cpu" else TILE
        blocks = max(1, tile // (2 * self.block_size)) * 2  # an even number: a tile begins with a whole byte
        for first_block in range(0, len(absmax), blocks):
            first = first_block * self.block_size
            last = min(first + blocks * self.block_size, n)
            packed = q.packed[first // 2 : -(-last // 2)]
            params = {"absmax": absmax[first_block : first_block + blocks]}
            values = self.blocks(unpack_values(packed, self.values, last - first))
            weights[first:last] = self.rescale(values, params).view(-1)[: last - first]
            del values  # the next tile takes its place in the cache
        return weights.view(q.shape)

    def __repr__(self) -> str:
        return f"{self.name}(block {self.block_size}{', double_quant' * self.double_quant})"


class NF4(BlockCodebook):
    """4-bit NormalFloat: levels at the quantiles of a normal distribution, 0 exact. bitsandbytes' codes, bit for bit.

    >>> q = NF4(block_size=64).quantize(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    >>> q.codes.tolist(), q.dequantize().tolist()[2:]  # 0.5/2 lies nearest to level 10, −1/2 to level 2
    ([10, 2, 7, 15], [0.0, 2.0])
    """

    name = "NF4"
    values = torch.tensor(NF4_LEVELS)


class FP4(BlockCodebook):
    """bitsandbytes' 4-bit float: {0, .0625, 2, 3, 4, 6, 8, 12}/12 and the negatives. Code 8 (−0) is never produced."""

    name = "FP4"
    values = torch.tensor(FP4_LEVELS)


def _flat_blocks(w: Tensor, block_size: int) -> Tensor:
    flat = w.reshape(-1)
    if flat.numel() % block_size:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size))
    return flat.view(-1, block_size)
