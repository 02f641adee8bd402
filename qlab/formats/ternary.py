"""Ternary weights: −scale, 0 or +scale, five to a byte.

Two rules say where 0 ends and how large the scale is:

    "twn"     Li et al. 2016, "Ternary Weight Networks", arXiv:1605.04711, section 2
                  Δ = 0.7 · mean |w|                                   threshold
                  b = +1 where w > Δ, −1 where w < −Δ, else 0
                  scale α = ⟨b, w⟩ / ⟨b, b⟩ = mean |w| over |w| > Δ    the best scale for this b
    "bitnet"  Ma et al. 2024, "The Era of 1-bit LLMs" (BitNet b1.58), arXiv:2402.17764, section 2, eqs. (1) to (3)
                  scale γ = mean |w|, at least 1e-5 (as in the released code; the paper adds ε instead)
                  b = clamp(round(w / γ), −1, 1)                       so the threshold is 0.5 · mean |w|

TWN approximates min ‖w − α·b‖² in closed form. BitNet's scale is not a best fit: it is meant for weights that are trained
through the rounding, and leaves a larger error on weights that are not.

A trit holds log2(3) = 1.585 bits; 3⁵ = 243 of the 256 values of a byte hold five: 1.6 bits a weight.

Axis legend: n = number of weights.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qlab.formats.affine import SMALLEST_SCALE, IntAffine
from qlab.formats.base import Params, QTensor, check_weights
from qlab.formats.binary import mean_abs

RULES = ("twn", "bitnet")
SMALLEST_BITNET_SCALE = 1e-5
TRITS = 5  # per byte


class Ternary(IntAffine):
    """Codes −1, 0, 1 times a scale: the symmetric integer grid with qmax = 1, its scale chosen by `rule`.

    Parameters
    ----------
    rule : "twn" | "bitnet".
    granularity, group_size, heads, head_axis, param_dtype : as for IntAffine. Both papers use one scale per layer: "tensor".

    Params: scale (param_dtype, weight units), shaped like `blocks(w)` without its last axis. With "twn" `fit` also gives
    threshold (float32, weight units): `encode` needs it, `decode` does not, so it is not stored. Without a
    threshold `encode` takes the nearest code, which is the rule |w| > scale / 2.

    Raises ValueError for an unknown rule and for settings that contradict each other.

    >>> w = torch.tensor([1.0, -0.5, 0.25, 0.0, 2.0, -0.25])
    >>> Ternary("twn").quantize(w).dequantize().tolist()  # mean |w| = 2/3, Δ = 0.467, α = 3.5/3
    [1.1666666269302368, -1.1666666269302368, 0.0, 0.0, 1.1666666269302368, 0.0]
    >>> Ternary("bitnet").quantize(w).codes.tolist()
    [1, -1, 0, 0, 1, 0]
    """

    def __init__(
        self,
        rule: str = "twn",
        granularity: str = "tensor",
        group_size: int | None = None,
        heads: int | None = None,
        head_axis: int = 0,
        param_dtype: torch.dtype = torch.float32,
    ):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        super().__init__(2, True, granularity, group_size, heads, head_axis, param_dtype=param_dtype)
        self.rule = rule
        self.bits = 8 / TRITS
        self.values = torch.tensor([-1.0, 0.0, 1.0])

    def fit(self, w: Tensor) -> Params:
        blocks = self.blocks(w)
        mean = mean_abs(w, blocks)
        if self.rule == "bitnet":
            params = {"scale": mean.clamp(min=SMALLEST_BITNET_SCALE)}
        else:
            threshold = 0.7 * mean
            params = {"scale": _mean_beyond(blocks, threshold), "threshold": threshold}
        params["scale"] = params["scale"].to(self.param_dtype)
        self._check_scale(params["scale"])
        return params

    def encode(self, w: Tensor, params: Params) -> Tensor:
        if "threshold" not in params:
            return super().encode(w, params)
        check_weights(w)
        blocks, threshold = self.blocks(w), params["threshold"].unsqueeze(-1)
        codes = (blocks > threshold).to(torch.int8) - (blocks < -threshold).to(torch.int8)
        return self.unblocks(codes, w.shape)

    def stored(self, params: Params) -> Params:
        """The scale: the threshold has done its work."""
        return {"scale": params["scale"]}

    def pack(self, codes: Tensor) -> Tensor:
        """(ceil(n / 5),) uint8."""
        return pack_trits((codes + 1).to(torch.uint8))

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        return unpack_trits(packed, shape.numel()).view(shape).to(torch.int8) - 1

    def dequantize(self, q: QTensor) -> Tensor:
        values = unpack_trits(q.packed, q.shape.numel()).view(q.shape).float() - 1
        return self.unblocks(self.rescale(self.blocks(values), q.params), q.shape)

    def __repr__(self) -> str:
        return f"Ternary({self.rule!r}, {self.layout_name()})"


def _mean_beyond(blocks: Tensor, threshold: Tensor) -> Tensor:
    """Mean |w| over the weights of each block with |w| > threshold; 1 where there are none (a block of zeros)."""
    beyond = blocks.abs() > threshold.unsqueeze(-1)
    count = beyond.sum(-1)
    total = torch.linalg.vector_norm(blocks * beyond, 1, dim=-1, dtype=torch.float64)
    return torch.where(count > 0, total / count.clamp(min=1), 1).float().clamp(min=SMALLEST_SCALE)


def pack_trits(trits: Tensor) -> Tensor:
    """Pack numbers 0, 1, 2 five to a byte, the first one worth the most: 81·t₀ + 27·t₁ + 9·t₂ + 3·t₃ + t₄.

    trits: any shape, uint8. Returns (ceil(n / 5),) uint8; the last byte is filled with zeros. Raises ValueError for a
    number above 2, TypeError for another dtype.

    >>> pack_trits(torch.tensor([2, 2, 2, 2, 2, 1], dtype=torch.uint8)).tolist()
    [242, 81]
    """
    if trits.dtype != torch.uint8:
        raise TypeError(f"pack_trits takes uint8 numbers, got {trits.dtype}")
    n = trits.numel()
    if n and int(trits.max()) > 2:
        raise ValueError(f"a trit is 0, 1 or 2, got {int(trits.max())}")
    trits = torch.nn.functional.pad(trits.reshape(-1), (0, -n % TRITS)).view(-1, TRITS)
    packed = trits[:, 0].clone()
    for place in range(1, TRITS):
        packed.mul_(3).add_(trits[:, place])
    return packed


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """The n trits of `packed`: (n,) uint8. Raises ValueError if `packed` has another length, or a byte above 242.

    >>> unpack_trits(torch.tensor([242, 81], dtype=torch.uint8), n=6).tolist()
    [2, 2, 2, 2, 2, 1]
    """
    expected = -(-n // TRITS)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(f"{n} trits take {expected} bytes (uint8), got {tuple(packed.shape)} of {packed.dtype}")
    if n and int(packed.max()) >= 3**TRITS:
        raise ValueError(
            f"a byte of {int(packed.max())} does not hold five trits (largest: 242): not packed by pack_trits"
        )
    return _trit_table().to(packed.device).index_select(0, packed.int()).view(-1)[:n]


@lru_cache
def _trit_table() -> Tensor:
    """(243, 5): the trits of every byte."""
    every = torch.arange(3**TRITS).unsqueeze(-1)
    return (every // 3 ** torch.arange(TRITS - 1, -1, -1) % 3).to(torch.uint8)
