"""Which weights share their params: all of a tensor, an output channel, a group of a row, or an attention head.

Nagel et al. 2021, "A White Paper on Neural Network Quantization", arXiv:2106.08295, section 2.2; groups: Dai et al. 2021,
"VS-Quant", arXiv:2102.04503.

Axis legend: out, in = rows and columns of a weight; n = column groups of a row; group_size = weights of one row that share
params; heads = attention heads, cut from the rows (q, k, v) or from the columns (o).
"""

import copy

import torch
from torch import Tensor

from qlab.formats.base import Format, Params

GRANULARITIES = ("tensor", "channel", "group", "head")


class Granular(Format):
    """A format that lays its blocks by `granularity`; the formats built on it say what a block stores.

    Parameters
    ----------
    granularity : "tensor" | "channel" (axis 0) | "group" (group_size weights of a row) | "head".
    group_size : weights per group; must divide the row.
    heads, head_axis : for "head": how many, and whether they are cut from the rows (0: q, k, v) or the columns (1: o).
    param_dtype : dtype in which the params are kept, and used from then on.

    Params are shaped like `blocks(w)` without its last axis:
        tensor ()  ·  channel (out,)  ·  group (out, in / group_size)  ·  head (heads,)

    Raises ValueError for settings that contradict each other, naming them.
    """

    def __init__(
        self,
        granularity: str,
        group_size: int | None,
        heads: int | None = None,
        head_axis: int = 0,
        param_dtype: torch.dtype = torch.float32,
    ):
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        if (granularity == "group") != (group_size is not None):
            raise ValueError(
                f"group_size belongs to granularity='group': got {granularity!r} and group_size={group_size}"
            )
        if (granularity == "head") != (heads is not None):
            raise ValueError(f"heads belongs to granularity='head': got {granularity!r} and heads={heads}")
        for name, value in {"group_size": group_size, "heads": heads}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if head_axis not in (0, 1):
            raise ValueError(f"head_axis is 0 (rows of q, k, v) or 1 (columns of o), got {head_axis}")
        self.granularity, self.group_size = granularity, group_size
        self.heads, self.head_axis, self.param_dtype = heads, head_axis, param_dtype

    def blocks(self, w: Tensor) -> Tensor:
        if self.granularity == "tensor":
            return w.reshape(-1)
        if w.dim() == 0:
            raise ValueError(f"granularity={self.granularity!r} needs at least one axis, got a scalar; use 'tensor'")
        if self.granularity == "channel":
            return w.reshape(w.shape[0], -1) if w.numel() else w.reshape(w.shape[0], 0)
        if self.granularity == "group":
            if w.shape[-1] % self.group_size:
                raise ValueError(
                    f"group_size={self.group_size} does not divide the row: a weight of shape {tuple(w.shape)} has rows of "
                    f"{w.shape[-1]}. Choose a divisor of {w.shape[-1]}, or granularity='channel'."
                )
            return w.reshape(*w.shape[:-1], w.shape[-1] // self.group_size, self.group_size)
        if w.dim() != 2 or w.shape[self.head_axis] % self.heads:
            raise ValueError(
                f"heads={self.heads} along axis {self.head_axis} does not divide a weight of shape {tuple(w.shape)}: "
                f"a 2-D weight with that axis a multiple of the heads is needed"
            )
        head_dim = w.shape[self.head_axis] // self.heads
        if self.head_axis == 0:
            return w.reshape(self.heads, head_dim * w.shape[1])
        return w.reshape(w.shape[0], self.heads, head_dim).movedim(1, 0).reshape(self.heads, -1)

    def unblocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        if self.granularity == "head" and self.head_axis == 1:
            blocks = blocks.view(self.heads, shape[0], shape[1] // self.heads).movedim(0, 1)
        return blocks.reshape(shape)

    @property
    def refits(self) -> bool:
        return self.granularity == "group"

    def per_row(self) -> Format:
        rows = copy.copy(self)
        rows.granularity, rows.group_size, rows.heads = "channel", None, None
        return rows

    def row_params(self, params: Params, shape: torch.Size) -> Params:
        out = shape[0]

        def by_row(param: Tensor) -> Tensor:
            if self.granularity == "group":
                return param
            if self.granularity == "channel":
                return param.unsqueeze(1)
            if self.granularity == "tensor":
                return param.expand(out, 1, *param.shape)
            if self.head_axis == 0:
                return param.repeat_interleave(out // self.heads, 0).unsqueeze(1)
            return param.expand(out, *param.shape)

        return {name: by_row(param) for name, param in params.items()}

    def layout_name(self) -> str:
        """Granularity and dtype of the params, for a repr: "per channel", "group 128, float16"."""
        where = {"group": f"group {self.group_size}", "head": f"{self.heads} heads of axis {self.head_axis}"}
        parts = [where.get(self.granularity, f"per {self.granularity}")]
        parts += [str(self.param_dtype).removeprefix("torch.")] * (self.param_dtype != torch.float32)
        return ", ".join(parts)
