"""GGUF blocks: Q4_0, Q4_1 and Q8_0, with the bytes that llama.cpp's files hold. Q4_K is in k_quants.py.

Defined by code, not by a paper: ggml, https://github.com/ggml-org/llama.cpp, ggml-common.h (layouts) and ggml-quants.c
(`quantize_row_*_ref`). Blocks of 32 are cut from rows; the constants d and m are stored in float16.

    Q4_0   w' = d · q         q = −8 … 7       d = the weight largest in size / −8
    Q4_1   w' = d · q + m     q = 0 … 15       d = (max − min) / 15, m = min
    Q8_0   w' = d · q         q = −127 … 127   d = amax / 127

Rounding: Q4_0 and Q4_1 half up (trunc(x + 0.5) of a number ≥ 0), Q8_0 half away from zero.

Axis legend: row = in, the last axis of a weight; n_blocks = in / block_size.
"""

import copy

import torch
from torch import Tensor

from qlab.formats.base import Format, Params, QTensor, check_weights


def over(numerator: float | Tensor, x: Tensor) -> Tensor:
    """numerator / x, and 0 where that is not finite: x is 0, or too small to have a reciprocal in float32."""
    quotient = torch.as_tensor(numerator, dtype=x.dtype, device=x.device) / x  # a Python number / x would round twice
    return torch.where(quotient.isfinite(), quotient, 0)


class RowBlocks(Format):
    """Blocks of `block_size` neighbouring weights of one row. A row that does not divide is refused."""

    block_size: int | None

    def blocks(self, w: Tensor) -> Tensor:
        """(…, n_blocks, block_size)."""
        if self.block_size is None:  # per row
            return w
        if w.dim() == 0 or w.shape[-1] % self.block_size:
            raise ValueError(
                f"{self} cuts rows into blocks of {self.block_size}, which do not divide a weight of shape "
                f"{tuple(w.shape)}: the last axis must be a multiple of {self.block_size}. Store it in another format."
            )
        return w.reshape(*w.shape[:-1], w.shape[-1] // self.block_size, self.block_size)

    def unblocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.reshape(shape)

    def float_blocks(self, w: Tensor) -> Tensor:
        """`blocks` in float32, which all arithmetic here is done in. Raises like `fit`."""
        check_weights(w)
        blocks = self.blocks(w).float()
        if w.dtype == torch.float64:
            check_weights(blocks)
        return blocks

    refits = True

    def per_row(self) -> "RowBlocks":
        rows = copy.copy(self)
        rows.block_size = None
        return rows

    def row_params(self, params: Params, shape: torch.Size) -> Params:
        return params

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class GGUFBlock(RowBlocks):
    """A block format of GGUF files.

    constants : what precedes the codes of a block in a file: param → (dtype, how many per block), in byte order.
    nibble_span : of two codes that share a byte, the one in the high nibble is this many weights further on.
    """

    constants: dict[str, tuple[torch.dtype, int]] = {"scale": (torch.float16, 1)}
    nibble_span = 16
    block_size = 32

    @property
    def _sizes(self) -> list[int]:
        """Bytes of each constant, then of the codes of one block."""
        return [dtype.itemsize * count for dtype, count in self.constants.values()] + [self.block_size * self.bits // 8]

    def to_bytes(self, q: QTensor) -> Tensor:
        """The rows of q as a GGUF file holds them: (…, n_blocks · bytes of a block) uint8.

        Raises TypeError if a param is not of the dtype that the file stores.
        """
        rows = (*q.shape[:-1], q.shape[-1] // self.block_size)
        parts = []
        for name, (dtype, count) in self.constants.items():
            param = q.params[name]
            if param.dtype != dtype:
                raise TypeError(f"a {type(self).__name__} block stores {name} as {dtype}, got {param.dtype}")
            parts.append(param.reshape(*rows, count).contiguous().view(torch.uint8))
        codes = q.codes.reshape(*rows, self.block_size)
        if self.bits == 8:
            return torch.cat([*parts, codes.view(torch.uint8)], -1).flatten(-2)
        nibbles = (codes - self.lowest_code).to(torch.uint8).unflatten(-1, (-1, 2, self.nibble_span))
        low, high = nibbles.unbind(-2)
        return torch.cat([*parts, (low | high << 4).flatten(-2)], -1).flatten(-2)

    def from_bytes(self, data: Tensor, dtype: torch.dtype = torch.float32) -> QTensor:
        """The inverse of `to_bytes`. dtype: what dequantize() returns.

        Raises TypeError if data is not uint8, ValueError if its last axis does not hold whole blocks.
        """
        if data.dtype != torch.uint8:
            raise TypeError(f"from_bytes takes uint8, got {data.dtype}")
        size = sum(self._sizes)
        if data.dim() == 0 or data.shape[-1] % size:
            raise ValueError(f"{self} blocks are {size} bytes, which do not divide data of shape {tuple(data.shape)}")
        n_blocks = data.shape[-1] // size
        *parts, stored = data.reshape(*data.shape[:-1], n_blocks, size).split(self._sizes, -1)
        params = {}
        for part, (name, (param_dtype, _)) in zip(parts, self.constants.items(), strict=True):
            aligned = part.clone(memory_format=torch.contiguous_format)
            params[name] = aligned.view(param_dtype).squeeze(-1)
        if self.bits == 8:
            codes = stored.view(torch.int8)
        else:
            stored = stored.unflatten(-1, (-1, self.nibble_span))
            codes = torch.stack([stored & 15, stored >> 4], -2).to(self.code_dtype) + self.lowest_code
        shape = torch.Size((*data.shape[:-1], n_blocks * self.block_size))
        return QTensor(self, self.pack(codes), params, shape, dtype)

    def half(self, params: Params) -> Params:
        """Params as stored. Raises ValueError where float16 cannot hold one; one that is too small becomes 0."""
        stored = {name: param.to(torch.float16) for name, param in params.items()}
        for name, param in stored.items():
            if not param.isfinite().all():
                raise ValueError(
                    f"a block's {name} of {float(params[name].abs().max())} is beyond 65504, the largest float16, in which "
                    f"{type(self).__name__} stores it; scale the weights down, or choose a format with float32 constants"
                )
        return stored


class HalfBlock(GGUFBlock):
    """Q4_0, Q4_1, Q8_0: `fit` gives the constants in float32, the codes are chosen with those, and only then are they cut to
    float16, as ggml does."""

    def stored(self, params: Params) -> Params:
        return self.half(params)

    def rescale(self, values: Tensor, params: Params) -> Tensor:
        return values.mul_(params["scale"].float().unsqueeze(-1))


class Q4_0(HalfBlock):
    """4-bit blocks of 32: d spans −8 … 7, with the sign that puts the largest weight on −8. 4.5 bits a weight.

    Params: scale = d, (…, n_blocks) float16, of either sign. Codes int8; a file stores code + 8.

    >>> q = Q4_0().quantize(torch.tensor([4.0, -3.0, 0.6, 1.0] * 8))  # d = 4 / −8
    >>> q.codes.tolist()[:4], q.dequantize().tolist()[:4]
    ([-8, 6, -1, -2], [4.0, -3.0, 0.5, 1.0])
    """

    bits, lowest_code, code_dtype, affine = 4, -8, torch.int8, True
    values = torch.arange(-8.0, 8.0)

    def fit(self, w: Tensor) -> Params:
        blocks = self.float_blocks(w)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        return {"scale": largest.squeeze(-1) / -8}

    def encode(self, w: Tensor, params: Params) -> Tensor:
        x = self.float_blocks(w) * over(1, params["scale"].float()).unsqueeze(-1)
        return self.unblocks((x + 8.5).trunc().clamp(0, 15).to(torch.int8) - 8, w.shape)


class Q4_1(HalfBlock):
    """4-bit blocks of 32 from min to max: w' = d · q + m. 5 bits a weight.

    Params: scale = d, min = m, both (…, n_blocks) float16. 0.0 is not exact in general.
    """

    bits = 4
    values = torch.arange(0.0, 16.0)
    constants = {"scale": (torch.float16, 1), "min": (torch.float16, 1)}

    def fit(self, w: Tensor) -> Params:
        low, high = torch.aminmax(self.float_blocks(w), dim=-1)
        return {"scale": (high - low) / 15, "min": low}

    def encode(self, w: Tensor, params: Params) -> Tensor:
        x = self.float_blocks(w) - params["min"].float().unsqueeze(-1)
        x = x * over(1, params["scale"].float()).unsqueeze(-1)
        return self.unblocks((x + 0.5).trunc().clamp(0, 15).to(torch.uint8), w.shape)

    def rescale(self, values: Tensor, params: Params) -> Tensor:
        return super().rescale(values, params).add_(params["min"].float().unsqueeze(-1))


class Q8_0(HalfBlock):
    """8-bit blocks of 32: d = amax / 127. 8.5 bits a weight. Params: scale = d, (…, n_blocks) float16. Codes int8."""

    bits, lowest_code, code_dtype, affine = 8, -128, torch.int8, True
    values = torch.arange(-128.0, 128.0)

    def fit(self, w: Tensor) -> Params:
        return {"scale": self.float_blocks(w).abs().amax(-1) / 127}

    def encode(self, w: Tensor, params: Params) -> Tensor:
        x = self.float_blocks(w) * over(1, params["scale"].float()).unsqueeze(-1)
        whole = x.abs().floor()
        nearest = whole + (x.abs() - whole >= 0.5)  # floor(|x| + 0.5) would round 0.49999997 up
        return self.unblocks((nearest.clamp(max=127) * x.sign()).to(torch.int8), w.shape)
