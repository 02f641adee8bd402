"""Integer affine quantization: w ≈ scale · (q − zero_point).

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, section 2.1; granularities as in Nagel et al. 2021, arXiv:2106.08295, section 2.

    q  = clamp(round(w / scale) + zero_point, qmin, qmax)          eq. (1)
    w' = scale · (q − zero_point)                                   eq. (2)

Rounding is half to even, and w / scale is computed as w · (1/scale): both as in torch's fake_quantize, bit for bit.

Axis legend: out, in = rows and columns of a weight; group_size = weights of one row that share a scale;
heads = attention heads, cut from the rows (q, k, v) or from the columns (o).
"""

import torch
from torch import Tensor

from qlab.formats.base import Params, check_weights
from qlab.formats.granularity import Granular

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # 1/scale must not overflow


class IntAffine(Granular):
    """Integers of 1 to 8 bits with one scale (and zero point) per tensor, output channel, group of a row, or attention head.

    Parameters
    ----------
    bits : 1 to 8.
    symmetric : True: signed codes, zero_point = 0. False: codes 0 … 2**bits − 1, and the range is widened to hold 0, so
        that 0.0 is stored exactly.
    granularity : "tensor" | "channel" (axis 0) | "group" (group_size weights of a row) | "head".
    group_size : weights per group; must divide the row.
    heads, head_axis : for "head": how many, and whether they are cut from the rows (0: q, k, v) or the columns (1: o).
    narrow : symmetric only. True: codes ±(2**(b−1) − 1), scale = amax / (2**(b−1) − 1). False: all 2**b codes, scale =
        amax / ((2**b − 1) / 2), torchao's choice: a finer step, but the largest positive weight is clipped by half a step.
    float_zero_point : zero_point is a float and the range is not widened: [min, max] fills all codes (QA-LoRA, HQQ).
    param_dtype : dtype in which scale and zero_point are kept, and used from then on.

    Params: scale (param_dtype) and, unless symmetric, zero_point (uint8, in code units; param_dtype where it is a float),
    each shaped like `blocks(w)` without its last axis:
        tensor ()  ·  channel (out,)  ·  group (out, in / group_size)  ·  head (heads,)

    Raises ValueError for settings that contradict each other, naming them.

    >>> fmt = IntAffine(bits=4, symmetric=False, granularity="group", group_size=2)
    >>> q = fmt.quantize(torch.tensor([[0.0, 1.5, -1.0, 2.0]]))
    >>> q.codes.tolist(), q.params["scale"].shape
    ([[0, 15, 0, 15]], torch.Size([1, 2]))
    """

    affine = True

    def __init__(
        self,
        bits: int = 8,
        symmetric: bool = True,
        granularity: str = "channel",
        group_size: int | None = None,
        heads: int | None = None,
        head_axis: int = 0,
        narrow: bool = True,
        float_zero_point: bool = False,
        param_dtype: torch.dtype = torch.float32,
    ):
        if bits not in range(1, 9):
            raise ValueError(f"IntAffine takes 1 to 8 bits, got bits={bits}")
        if symmetric and narrow and bits == 1:
            raise ValueError("symmetric narrow codes at 1 bit would be only 0: use symmetric=False, or narrow=False")
        if symmetric and float_zero_point:
            raise ValueError("a symmetric format has no zero point: float_zero_point needs symmetric=False")
        super().__init__(granularity, group_size, heads, head_axis, param_dtype)
        self.bits, self.symmetric, self.narrow, self.float_zero_point = bits, symmetric, narrow, float_zero_point
        if symmetric:
            self.qmax = 2 ** (bits - 1) - 1
            self.qmin = -self.qmax if narrow else -(2 ** (bits - 1))
            self.code_dtype = torch.int8
        else:
            self.qmin, self.qmax = 0, 2**bits - 1
        self.lowest_code = self.qmin
        self.values = torch.arange(self.qmin, self.qmin + 2**bits, dtype=torch.float32)

    def fit(self, w: Tensor) -> Params:
        """Min-max of each block."""
        blocks = self.blocks(w)
        if w.numel() == 0:
            low = high = blocks.new_zeros(blocks.shape[:-1])
        else:
            low, high = torch.aminmax(blocks, dim=-1)
        check_weights(w, low, high)
        return self.from_range(low.float(), high.float())

    def from_range(self, low: Tensor, high: Tensor) -> Params:
        """Params that spread the codes over [low, high] (same shape, weight units): a clipping range chosen elsewhere.

        A block whose range is a single value c gets scale = |c| and a code that decodes to exactly c; all zeros: scale = 1.
        """
        if self.symmetric:
            amax = torch.maximum(low.abs(), high.abs())
            scale = amax / (self.qmax if self.narrow else (self.qmax - self.qmin) / 2)
            constant = (low == high) if self.qmax else torch.zeros_like(low, dtype=torch.bool)
        else:
            constant, amax = low == high, high.abs()
            if not self.float_zero_point:
                low, high = low.clamp(max=0), high.clamp(min=0)
            scale = high / self.qmax - low / self.qmax  # each term apart: high − low may overflow
        scale = torch.where(constant, amax, scale)
        scale = torch.where(scale == 0, 1, scale.clamp(min=SMALLEST_SCALE)).to(self.param_dtype)
        self._check_scale(scale)
        if self.symmetric:
            return {"scale": scale}
        zero_point = -low / scale.float()
        if self.float_zero_point:
            zero_point = torch.where(constant, (low < 0).float(), zero_point).to(self.param_dtype)
            if not zero_point.isfinite().all():
                raise ValueError(
                    f"a zero_point is Inf in {self.param_dtype}: a block is much narrower than it is far from 0; use "
                    f"param_dtype=torch.float32, or a zero_point that is an integer"
                )
        else:
            zero_point = zero_point.round().clamp(self.qmin, self.qmax).to(torch.uint8)
        return {"scale": scale, "zero_point": zero_point}

    def _check_scale(self, scale: Tensor) -> None:
        if not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(
                f"a scale is 0 or Inf in {self.param_dtype}: the weights' range does not fit; use param_dtype=torch.float32"
            )

    def encode(self, w: Tensor, params: Params) -> Tensor:
        """eq. (1). Codes outside [qmin, qmax] are clipped: that is what a clipping range means."""
        check_weights(w)
        q = self.blocks(w).float() * (1 / params["scale"].float().unsqueeze(-1))
        if self.symmetric:
            q = q.round_()
        elif self.float_zero_point:
            q = q.add_(params["zero_point"].float().unsqueeze(-1)).round_()
        else:
            q = q.round_().add_(params["zero_point"].unsqueeze(-1))
        return self.unblocks(q.clamp_(self.qmin, self.qmax).to(self.code_dtype), w.shape)

    def limits(self, params: Params, shape: torch.Size) -> tuple[Tensor, Tensor]:
        # Not the extremes of `values`: where codes are narrow, the last of those is never used.
        ends = torch.tensor([self.qmin, self.qmax], device=params["scale"].device)
        low, high = (self.decode(code.expand(shape), params) for code in ends)
        return low, high

    def rescale(self, values: Tensor, params: Params) -> Tensor:
        """eq. (2)."""
        if not self.symmetric:
            values = values.sub_(params["zero_point"].float().unsqueeze(-1))
        return values.mul_(params["scale"].float().unsqueeze(-1))

    def __repr__(self) -> str:
        parts = [f"bits={self.bits}", "symmetric" if self.symmetric else "asymmetric", self.layout_name()]
        parts += ["all codes"] * (self.symmetric and not self.narrow) + ["float zero_point"] * self.float_zero_point
        return f"IntAffine({', '.join(parts)})"
