"""Format: what numbers can be stored. QTensor: a weight stored in one, frozen and packed.

    weights ──fit──▶ params      how the grid lies (scale, zero_point, absmax): a few numbers per block of weights
    weights ──encode(params)──▶ codes      the grid point of each weight, a small integer
    codes   ──decode(params)──▶ weights'
    quantize = fit + encode, packed, with the params as `stored`

A *block* is the set of weights that share one set of params. `blocks(w)` lays every block along the last axis, and each
param has the shape of `blocks(w)` without that axis, but for tables (a codebook has further axes) and for what is itself
stored in blocks (double quantization, Q4_K): there the format says the shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.formats.packing import pack, unpack, unpack_values

Params = dict[str, Tensor]


class Format:
    """One way to store numbers. A subclass gives `bits`, `values`, `blocks`, `unblocks`, `fit`, `encode` and `rescale`, or,
    where codes do not stand for fixed numbers (learned tables, casts), `decode` and `dequantize` in place of `values`.

    Attributes
    ----------
    bits : bits per stored code, params not counted. What a weight costs in the end is `QTensor.bits_per_weight`.
    values : (2**bits,) float32, the number each stored code stands for before its block's params are applied.
    lowest_code : the code stored as 0 (below zero for signed integer formats).
    affine : True if w' = scale · (code − zero_point).
    float_zero_point : True if zero_point may fall between codes.
    refits : True if a group of columns has params of its own, so that a method that changes the weights column by column
        can fit each group when it comes to it.
    """

    bits: int
    values: Tensor
    lowest_code: int = 0
    code_dtype: torch.dtype = torch.uint8
    affine: bool = False
    float_zero_point: bool = False
    refits: bool = False

    def blocks(self, w: Tensor) -> Tensor:
        """w laid out as (…, n): the n weights along the last axis share their params. Raises ValueError if w cannot be cut so."""
        raise NotImplementedError(f"{type(self).__name__} does not define blocks")

    def unblocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `blocks` for a weight of `shape`."""
        raise NotImplementedError(f"{type(self).__name__} does not define unblocks")

    def fit(self, w: Tensor) -> Params:
        """Params for w, from its own values. Raises ValueError on NaN or Inf, TypeError on a tensor that is not floating point."""
        raise NotImplementedError(f"{type(self).__name__} does not define fit")

    def stored(self, params: Params) -> Params:
        """The params of `fit` as they are kept: rounded where the format rounds them, without those that only `encode` needs.

        `decode` takes either.
        """
        return params

    def encode(self, w: Tensor, params: Params) -> Tensor:
        """Codes of w, integer, shape of w. Raises like `fit`."""
        raise NotImplementedError(f"{type(self).__name__} does not define encode")

    def rescale(self, values: Tensor, params: Params) -> Tensor:
        """Apply the params to `values` (float32, laid out as `blocks`), in place where autograd allows it."""
        raise NotImplementedError(f"{type(self).__name__} does not define rescale")

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Weights of `codes`: float32, shape of codes. Differentiable in the params."""
        stored = codes.reshape(-1).int() - self.lowest_code
        values = self.values.to(codes.device).index_select(0, stored).view(codes.shape)
        return self.unblocks(self.rescale(self.blocks(values), params), codes.shape)

    def limits(self, params: Params, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value that each weight's block can store: two float32 tensors of `shape`."""
        codes = torch.stack([self.values.argmin(), self.values.argmax()]) + self.lowest_code
        codes = codes.to(next(iter(params.values())).device)
        ends = [self.decode(code.expand(shape), params) for code in codes]
        return torch.minimum(*ends), torch.maximum(*ends)  # a scale may be negative: Q4_0's d

    def quantize(self, w: Tensor) -> "QTensor":
        """fit + encode, packed. w: any floating-point tensor; w itself is not changed."""
        w = w.detach()
        params = self.fit(w)
        return QTensor(self, self.pack(self.encode(w, params)), self.stored(params), w.shape, w.dtype)

    def per_row(self) -> "Format":
        """The same grid with one block per row, for a matrix of any number of columns, one column alone included.

        With `row_params` it is what methods that choose codes column by column (GPTQ) work with. Raises ValueError where
        columns cannot be encoded apart from each other.
        """
        raise ValueError(f"{self} cannot be encoded column by column: the codes of a row depend on each other")

    def row_params(self, params: Params, shape: torch.Size) -> Params:
        """Params as (out, n, …): those of column group i of n for every row of a weight of `shape` (out, in).

        params: from `fit`. Views of them where `refits`: writing to them sets the params of a group.
        """
        raise ValueError(f"{self} cannot be encoded column by column: the codes of a row depend on each other")

    def pack(self, codes: Tensor) -> Tensor:
        """Codes as stored: (bytes,) uint8."""
        return pack((codes - self.lowest_code).to(torch.uint8), self.bits)

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `pack`."""
        return unpack(packed, self.bits, shape.numel()).view(shape).to(self.code_dtype) + self.lowest_code

    def dequantize(self, q: "QTensor") -> Tensor:
        """`decode` straight from packed codes: float32, (…) = q.shape."""
        values = unpack_values(q.packed, self.values, q.shape.numel()).view(q.shape)
        return self.unblocks(self.rescale(self.blocks(values), q.params), q.shape)

    def dequantize_as(self, q: "QTensor", dtype: torch.dtype) -> Tensor:
        """`dequantize`, rounded once to dtype. Where a format works tile by tile, the whole is never held in float32."""
        return self.dequantize(q).to(dtype)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized weight: packed codes, the params that decode them, and what it was before.

    packed : (bytes,) uint8. params : name → Tensor. shape, dtype : of the weight that was quantized.

    >>> from qlab.formats import IntAffine
    >>> q = IntAffine(bits=4, symmetric=True, granularity="channel").quantize(torch.tensor([[0.7, -0.3], [0.2, 0.1]]))
    >>> q.codes.tolist(), q.nbytes
    ([[7, -3], [7, 4]], 10)
    """

    format: Format
    packed: Tensor
    params: Params
    shape: torch.Size
    dtype: torch.dtype

    @property
    def codes(self) -> Tensor:
        """Integer codes, unpacked, in the weight's shape."""
        return self.format.unpack(self.packed, self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights the codes stand for, in the weight's shape and (unless `dtype` is given) its own dtype.

        The product is taken in float32 and rounded once to the dtype.
        """
        return self.format.dequantize_as(self, dtype or self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and of every param."""
        return self.packed.nbytes + sum(p.nbytes for p in self.params.values())

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / number of weights: every constant counted. NaN for an empty tensor."""
        return 8 * self.nbytes / self.shape.numel() if self.shape.numel() else float("nan")

    def to(self, device: torch.device | str) -> "QTensor":
        """The same tensor on another device."""
        params = {name: p.to(device) for name, p in self.params.items()}
        return QTensor(self.format, self.packed.to(device), params, self.shape, self.dtype)

    def __repr__(self) -> str:
        return f"QTensor({tuple(self.shape)}, {self.format}, {self.nbytes} bytes = {self.bits_per_weight:.3f} bits a weight)"


def check_weights(w: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> None:
    """Refuse what no format can store. Raises TypeError if w is not floating point, ValueError if it holds NaN or Inf.

    low, high: the extremes of w, block by block, where the caller has them already: NaN and Inf show in them.
    """
    if not w.is_floating_point():
        raise TypeError(f"quantize takes floating-point weights, got {w.dtype}; convert them first, e.g. w.float()")
    if w.numel() == 0:
        return
    if low is None or high is None:
        low, high = torch.aminmax(w)
    if low.isfinite().all() and high.isfinite().all():
        return
    first = tuple(torch.nonzero(~w.isfinite())[0].tolist())
    raise ValueError(
        f"the weights hold {int(w.isnan().sum())} NaN and {int(w.isinf().sum())} Inf in {w.numel()} values of shape "
        f"{tuple(w.shape)}; the first is {float(w[first])} at index {list(first)}. Repair or mask them before quantizing."
    )
