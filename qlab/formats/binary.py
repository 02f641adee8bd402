"""Binary weights: a sign and a scale; and the matrix product of signs on packed bits, XNOR and popcount.

Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", arXiv:1603.05279,
section 3.1. The best approximation of a filter w by scale · b, with b of +1 and −1:

    b     = sign(w), sign(0) = +1            eq. (4)
    scale = mean |w| = ‖w‖₁ / n              eq. (6)

Only that is the format. What XNOR-Net does around it belongs to the layer that trains: its code subtracts each filter's
mean over the input channels and clamps the real weights to [−1, 1] before every binarization. The mean is never added
back: centring changes the weight that is to be stored, it is not part of how it is stored. BinaryConnect
(arXiv:1511.00363) has this format too, with a scale fixed by the layer's shape: pass it as params={"scale": …}.

The product of two ±1 vectors of length k needs no multiplication (section 3.2). With +1 as bit 1 and −1 as bit 0:

    ⟨a, b⟩ = popcount(XNOR(a, b)) − popcount(XOR(a, b)) = k − 2 · popcount(XOR(a, b))

The second form needs no mask where k does not fill the last word: the filler is 0 in both, and its XOR is 0.

Axis legend: m, n = rows of the two operands, k = length of a row in weights, words = ceil(k / 64).
"""

import numpy as np
import torch
from torch import Tensor

from qlab.formats.base import Params, QTensor, check_weights
from qlab.formats.granularity import Granular
from qlab.formats.packing import pack

WORD = 64
PAIRS, NIBBLES, BYTES, ONES = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101
TILE = 2**15  # products held at once: their words (8 bytes each) stay in a core's cache


class Binary(Granular):
    """One bit a weight: codes 0 and 1 stand for −scale and +scale. scale = mean |w| of the block, XNOR-Net eq. (6).

    Parameters
    ----------
    granularity : "channel" (axis 0: the paper's scale per filter) | "tensor" | "group" (group_size weights of a row).
    group_size : weights per group; must divide the row.
    param_dtype : dtype in which the scale is kept, and used from then on.

    Params: scale (param_dtype), weight units: tensor () · channel (out,) · group (out, in / group_size). A block of zeros
    has scale 0. Encoding looks at signs only, so codes do not depend on the scale.

    Raises ValueError for settings that contradict each other, and for a scale that does not fit param_dtype.

    >>> q = Binary().quantize(torch.tensor([[0.5, -1.5, 0.0, 2.0]]))
    >>> q.codes.tolist(), q.dequantize().tolist()
    ([[1, 0, 1, 1]], [[1.0, -1.0, 1.0, 1.0]])
    """

    bits = 1
    values = torch.tensor([-1.0, 1.0])

    def __init__(
        self, granularity: str = "channel", group_size: int | None = None, param_dtype: torch.dtype = torch.float32
    ):
        super().__init__(granularity, group_size, param_dtype=param_dtype)

    def fit(self, w: Tensor) -> Params:
        mean = mean_abs(w, self.blocks(w))
        scale = mean.to(self.param_dtype)
        if not scale.isfinite().all() or ((scale == 0) & (mean > 0)).any():
            raise ValueError(
                f"a scale (mean |w|) between {float(mean.min())} and {float(mean.max())} is 0 or Inf in "
                f"{self.param_dtype}; use param_dtype=torch.float32"
            )
        return {"scale": scale}

    def encode(self, w: Tensor, params: Params) -> Tensor:
        """eq. (4). 1 where w ≥ 0."""
        check_weights(w)
        return (w >= 0).to(torch.uint8)

    def rescale(self, values: Tensor, params: Params) -> Tensor:
        return values.mul_(params["scale"].float().unsqueeze(-1))

    def __repr__(self) -> str:
        return f"Binary({self.layout_name()})"


def mean_abs(w: Tensor, blocks: Tensor) -> Tensor:
    """Mean |w| of each block: float32, shape of blocks without its last axis; 0 for an empty weight. Raises like `fit`.

    Summed in float64: float32 could overflow, and the mean of n equal numbers would not always be that number.
    """
    if w.numel() == 0 or not w.is_floating_point():
        check_weights(w)
        return torch.zeros(blocks.shape[:-1], device=w.device)
    mean = torch.linalg.vector_norm(blocks, 1, dim=-1, dtype=torch.float64) / blocks.shape[-1]
    check_weights(w, mean, mean)
    return mean.float()


def sign_words(x: Tensor | QTensor) -> Tensor:
    """The signs of each row as bits, 64 to a word: (…, k) → (…, ceil(k / 64)) int64. Bit 1 where x ≥ 0.

    x: floating-point numbers, or a QTensor of format Binary. Where 64 divides k, the packed bytes of such a QTensor are
    its words already and are not copied. The order of the bits within a word is `pack`'s; the product does not depend
    on it. Raises TypeError for other dtypes and formats, ValueError on NaN or Inf and on a scalar.
    """
    if isinstance(x, QTensor) and not isinstance(x.format, Binary):
        raise TypeError(f"sign_words takes a QTensor of format Binary, got {x.format}")
    if not x.shape:
        raise ValueError("sign_words packs the rows of a tensor, got a scalar")
    k = x.shape[-1]
    shape = (*x.shape[:-1], -(-k // WORD))
    if isinstance(x, QTensor):
        if k % WORD == 0 and x.packed.storage_offset() % 8 == 0:
            return x.packed.view(torch.int64).view(shape)
        bits = x.codes
    else:
        check_weights(x)
        bits = (x >= 0).to(torch.uint8)
    return pack(torch.nn.functional.pad(bits, (0, -k % WORD)), 1).view(torch.int64).view(shape)


def popcount(words: Tensor) -> Tensor:
    """How many bits of each word are 1: int64 → uint8, same shape."""
    if words.device.type == "cpu":
        return torch.from_numpy(np.bitwise_count(words.numpy().view(np.uint64)))
    return popcount_by_halves(words)


def popcount_by_halves(words: Tensor) -> Tensor:
    """`popcount` in torch operations, for devices that numpy does not reach: sums of 2, 4, then 8 neighbouring bits.

    >> copies the sign bit; every mask clears it again, and the last sum is at most 64, so its top bit is 0.
    """
    words = words - ((words >> 1) & PAIRS)
    words = (words & NIBBLES) + ((words >> 2) & NIBBLES)
    words = (words + (words >> 4)) & BYTES
    return ((words * ONES) >> 56).to(torch.uint8)  # the product collects the sum of all 8 bytes in the top one


def xnor_matmul(a: Tensor, b: Tensor, k: int) -> Tensor:
    """a · bᵀ for matrices of +1 and −1 given as sign words: exactly the float product, from XOR and popcount alone.

    a: (m, words) int64, b: (n, words) int64, both from `sign_words` of rows of length k. Returns (m, n) int32.
    Raises ValueError where the words do not fit k or each other.

    >>> a, b = torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0], [-1.0, 1.0, -1.0]])
    >>> xnor_matmul(sign_words(a), sign_words(b), k=3).tolist(), (a @ b.T).tolist()
    ([[1, -3]], [[1.0, -3.0]])
    """
    words = -(-k // WORD)
    for name, operand in {"a": a, "b": b}.items():
        if operand.dtype != torch.int64 or operand.dim() != 2 or operand.shape[1] != words:
            raise ValueError(
                f"rows of k={k} signs take {words} int64 words each, got {name} of shape {tuple(operand.shape)} and "
                f"{operand.dtype}; use sign_words"
            )
    unequal = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    columns = b.t().contiguous()
    rows = max(1, TILE // max(1, len(b)))
    for start in range(0, len(a), rows):
        for word in range(words):
            unequal[start : start + rows] += popcount(a[start : start + rows, word, None] ^ columns[word])
    return unequal.mul_(-2).add_(k)
