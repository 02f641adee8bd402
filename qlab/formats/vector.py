"""Learned codebooks: levels placed by k-means where the weights are, for single weights (KMeans) and for short vectors.

    KMeans             a table of 2**bits levels per block; each weight is stored as the index of its nearest level.
                       For LLM weights: Kim et al. 2023, "SqueezeLLM", arXiv:2306.07629, section 4 (unweighted here).
    ProductQuantizer   Jégou, Douze and Schmid 2011, "Product Quantization for Nearest Neighbor Search", IEEE TPAMI 33(1),
                       section II: rows cut into sub-vectors, one table of 2**bits sub-vectors per sub-space.

Axis legend: B = blocks, n = weights of a block, k = 2**bits centres, S = sub-spaces (1 where the codebook is shared), N =
sub-vectors of a sub-space, d = sub_dim.
"""

import torch
from torch import Tensor

from qlab.formats.base import Format, Params, QTensor, check_weights
from qlab.formats.granularity import Granular
from qlab.formats.kmeans import SortedNumbers, kmeans_plus_plus, lloyd, midpoints_down, nearest, sort_numbers

SLICE = 1 << 20  # numbers worked on at once where blocks are independent: it bounds memory and stays near the caches
TRAINING_VECTORS = 1 << 16  # a codebook is fitted to at most so many sub-vectors


class LearnedCodebook(Format):
    """What KMeans and ProductQuantizer share: `bits` of 1 to 8 per code, k-means from a seed, tables kept in param_dtype."""

    def __init__(self, bits: int, seed: int, iterations: int, param_dtype: torch.dtype):
        if bits not in range(1, 9):
            raise ValueError(f"{type(self).__name__} takes 1 to 8 bits, got bits={bits}")
        if iterations < 1:
            raise ValueError(f"k-means needs at least 1 iteration, got iterations={iterations}")
        self.bits, self.seed, self.iterations, self.param_dtype = bits, seed, iterations, param_dtype

    def _store(self, table: Tensor) -> Tensor:
        stored = table.to(self.param_dtype)
        if not stored.isfinite().all():
            raise ValueError(f"a level of {float(table.abs().max())} is Inf in {self.param_dtype}; use torch.float32")
        return stored

    def dequantize(self, q: QTensor) -> Tensor:
        return self.decode(q.codes, q.params)


class KMeans(Granular, LearnedCodebook):
    """2**bits levels per block, placed by k-means; a code is the index of the nearest level, the lower one at a midpoint.

    Parameters
    ----------
    bits : 1 to 8.
    granularity, group_size : which weights share a table, as for IntAffine: "tensor" | "channel" | "group". A table takes
        32 · 2**bits bits at float32, which a short block does not earn back.
    seed : of k-means++. iterations : at most; it stops where nothing changes.
    param_dtype : dtype of the levels.

    Params: levels (*blocks(w).shape[:-1], 2**bits), ascending, weight units: unlike the params of other formats they have a
    last axis. A block of at most 2**bits different numbers is stored exactly (in float32); unused levels repeat another.

    >>> q = KMeans(bits=1).quantize(torch.tensor([1.0, 2.0, 3.0, 10.0, 11.0]))
    >>> q.params["levels"].tolist(), q.codes.tolist()
    ([2.0, 10.5], [0, 0, 0, 1, 1])
    """

    def __init__(
        self,
        bits: int = 4,
        granularity: str = "tensor",
        group_size: int | None = None,
        seed: int = 0,
        iterations: int = 300,
        param_dtype: torch.dtype = torch.float32,
    ):
        Granular.__init__(self, granularity, group_size)
        LearnedCodebook.__init__(self, bits, seed, iterations, param_dtype)

    def fit(self, w: Tensor) -> Params:
        check_weights(w)
        blocks, k = self.blocks(w.detach()), 2**self.bits
        if w.numel() == 0:
            return {"levels": torch.zeros(*blocks.shape[:-1], k, dtype=self.param_dtype, device=w.device)}
        rows = blocks.reshape(-1, blocks.shape[-1])
        levels = torch.cat([self._levels(part) for part in rows.split(max(1, SLICE // rows.shape[-1]))])
        return {"levels": self._store(levels).view(*blocks.shape[:-1], k)}

    def _levels(self, blocks: Tensor) -> Tensor:
        numbers = SortedNumbers(sort_numbers(blocks.float()))
        return numbers.lloyd(numbers.kmeans_plus_plus(2**self.bits, self.seed), self.iterations)

    def encode(self, w: Tensor, params: Params) -> Tensor:
        check_weights(w)
        levels = params["levels"].detach().float()
        ascending, order = levels.sort(-1)
        blocks = self.blocks(w).float().contiguous()
        codes = torch.searchsorted(midpoints_down(ascending.double()), blocks, out_int32=True)
        if not torch.equal(ascending, levels):  # levels that were learned further need not be in order
            codes = _look_up(order.to(torch.int32), codes)
        return self.unblocks(codes.to(torch.uint8), w.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self.unblocks(_look_up(params["levels"].float(), self.blocks(codes)), codes.shape)

    def limits(self, params: Params, shape: torch.Size) -> tuple[Tensor, Tensor]:
        extremes = torch.aminmax(params["levels"].float(), dim=-1, keepdim=True)
        laid_out = self.blocks(torch.empty(shape, device="meta")).shape
        lowest, highest = (self.unblocks(extreme.expand(laid_out), shape) for extreme in extremes)
        return lowest, highest

    def __repr__(self) -> str:
        return f"KMeans(bits={self.bits}, {self.layout_name()})"


class ProductQuantizer(LearnedCodebook):
    """One code of `bits` per sub-vector of `sub_dim` neighbours in a row: bits / sub_dim bits a weight, and the codebook.

    Parameters
    ----------
    sub_dim : length of a sub-vector; must divide the row. bits : 1 to 8, per code, not per weight.
    shared : False: each of the in / sub_dim sub-spaces has a codebook of its own (product quantization), 32 · 2**bits / out
        bits a weight at float32. True: one for all of them (vector quantization): 1 / S of that.
    seed : of k-means++. iterations : at most; it stops where nothing changes. param_dtype : dtype of the codebook.

    Params: codebook (S, 2**bits, sub_dim), weight units. Codes have one entry per SUB-VECTOR: (…, in / sub_dim) for weights
    (…, in). Any number of rows can be encoded with one codebook, so activations (batch, …, in) work as weights do: fit on a
    sample, encode the rest. A codebook is fitted to at most 65536 sub-vectors, drawn with the seed; where these are all,
    at most 2**bits different ones are stored exactly (in float32).

    Raises ValueError where sub_dim does not divide the row or the codebook was fitted to rows of another length.

    >>> w = torch.tensor([[1.0, 1.0, 5.0, 6.0], [1.0, 1.0, 7.0, 8.0], [3.0, 3.0, 5.0, 6.0]])
    >>> q = ProductQuantizer(sub_dim=2, bits=1).quantize(w)
    >>> q.codes.shape, torch.equal(q.dequantize(), w)
    (torch.Size([3, 2]), True)
    """

    def __init__(
        self,
        sub_dim: int = 4,
        bits: int = 8,
        shared: bool = False,
        seed: int = 0,
        iterations: int = 25,
        param_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(bits, seed, iterations, param_dtype)
        if sub_dim < 1:
            raise ValueError(f"sub_dim must be at least 1, got {sub_dim}")
        self.sub_dim, self.shared = sub_dim, shared

    def _subvectors(self, w: Tensor) -> Tensor:
        """(S, N, d)."""
        if w.dim() == 0 or w.shape[-1] % self.sub_dim:
            raise ValueError(
                f"sub_dim={self.sub_dim} does not divide the row of a weight of shape {tuple(w.shape)}; choose a divisor"
            )
        spaces = 1 if self.shared else w.shape[-1] // self.sub_dim
        vectors = w.numel() // (spaces * self.sub_dim) if spaces else 0
        return w.reshape(vectors, spaces, self.sub_dim).movedim(1, 0)

    def blocks(self, w: Tensor) -> Tensor:
        """(S, N · d): the weights that share a codebook."""
        return self._subvectors(w).flatten(1)

    def unblocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.unflatten(1, (-1, self.sub_dim)).movedim(0, 1).reshape(shape)

    def fit(self, w: Tensor) -> Params:
        check_weights(w)
        x, k = self._subvectors(w.detach()), 2**self.bits
        if w.numel() == 0:
            return {"codebook": torch.zeros(len(x), k, self.sub_dim, dtype=self.param_dtype, device=w.device)}
        some = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(self.seed))[:TRAINING_VECTORS]
        x = x[:, some.to(w.device)]
        centres = [lloyd(points, kmeans_plus_plus(points, k, self.seed), self.iterations) for points in x]
        return {"codebook": self._store(torch.stack(centres))}

    def encode(self, w: Tensor, params: Params) -> Tensor:
        check_weights(w)
        x, codebook = self._subvectors(w.detach()), params["codebook"].detach()
        if len(x) != len(codebook):
            raise ValueError(
                f"the codebook has {len(codebook)} sub-spaces of {self.sub_dim}, rows of a tensor of shape "
                f"{tuple(w.shape)} have {len(x)}: it was fitted to other rows"
            )
        codes = torch.empty(x.shape[:2], dtype=torch.uint8, device=w.device)
        for space, (points, centres) in enumerate(zip(x, codebook, strict=True)):
            codes[space] = nearest(points, centres)[1]
        return codes.t().reshape(*w.shape[:-1], w.shape[-1] // self.sub_dim)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Weights of `codes`: float32, (…, sub_dim · codes.shape[-1]). Differentiable in the codebook."""
        codebook = params["codebook"].float()
        spaces = 0 if self.shared else torch.arange(len(codebook), dtype=torch.int32, device=codes.device)
        entry = codes.int() + spaces * 2**self.bits
        values = codebook.flatten(0, 1).index_select(0, entry.reshape(-1))
        return values.view(*codes.shape[:-1], self.sub_dim * codes.shape[-1])

    def limits(self, params: Params, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The lowest and the highest entry of the codebook at each weight's place in its sub-vector."""
        extremes = torch.aminmax(params["codebook"].float(), dim=1, keepdim=True)
        laid_out = self._subvectors(torch.empty(shape, device="meta")).shape
        lowest, highest = (self.unblocks(extreme.expand(laid_out).flatten(1), shape) for extreme in extremes)
        return lowest, highest

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        return super().unpack(packed, torch.Size((*shape[:-1], shape[-1] // self.sub_dim)))

    def __repr__(self) -> str:
        dtype = f", {self.param_dtype}".replace("torch.", "") if self.param_dtype != torch.float32 else ""
        return f"ProductQuantizer(bits={self.bits} for {self.sub_dim} weights{', shared' * self.shared}{dtype})"


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[…, index]: table (…, k), index (…, n) with the same leading axes → (…, n)."""
    rows = torch.arange(table[..., 0].numel(), dtype=torch.int32, device=index.device).view(*table.shape[:-1], 1)
    entry = index.int() + rows * table.shape[-1]
    return table.reshape(-1).index_select(0, entry.reshape(-1)).view(index.shape)
