"""GPTQ: columns are rounded one after the other, and the columns still to come make up for the error of each.

Frantar, Ashkboos, Hoefler and Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv:2210.17323, section 3.3 and Algorithm 1. It minimizes the output error of a layer, row by row:

    ‖W·X − W'·X‖²                                    its Hessian in a row of W' is H = 2·X·Xᵀ             eq. (1)
    e = (w_j − quant(w_j)) / [H⁻¹]_jj                rounding column j …
    w ← w − e · (H⁻¹)_j,:                            … moves the columns that are not rounded yet         eq. (2)
    H⁻¹ without row and column j                     by Gaussian elimination                              eq. (3)

The rows of H⁻¹ that this elimination meets, each divided by the root of its diagonal, are the rows of the upper Cholesky
factor U of H⁻¹ (H⁻¹ = Uᵀ·U), so all of them are known beforehand ("Step 3: Cholesky Reformulation"):

    e = (w_j − quant(w_j)) / U_jj,    w ← w − e · U_j,:

Within a block of columns, only the block is updated at once; the columns after it wait for the whole block and then take
its errors in one matrix product ("Step 2: Lazy Batch-Updates").

In the authors' code but not in Algorithm 1: dead inputs, groups and the order of activations (see `gptq`). Unlike there, a
group that is smaller than a block also takes its params from the weights as updated so far, not as they were when the
block began.

Axis legend: out, in = rows and columns of a weight; place = position of a column in the order of rounding; n = column
groups of a row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qlab.calibrate import InputStats
from qlab.formats import Format, QTensor
from qlab.formats.base import Params, check_weights
from qlab.ptq.method import Method


@torch.no_grad()
def gptq(
    w: Tensor,
    hessian: Tensor,
    fmt: Format,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
) -> tuple[QTensor, Tensor | None]:
    """Codes of `w` that keep the layer's output, and g_idx, the group of each column, where groups are not contiguous.

    Parameters
    ----------
    w : (out, in), any floating dtype; it is not changed. float64 is worked on in float64, all else in float32.
    hessian : (in, in), a multiple of X·Xᵀ of the layer's inputs, `InputStats.hessian`. An input that was always 0 (diagonal
        0) is dead: its weights become 0 and its diagonal 1.
    damping : added to the diagonal, as a share of its mean.
    act_order : round the columns with the largest diagonal (before damping) first, instead of from left to right. The
        later a column, the fewer are left to make up for its error.
    static_groups : take all params from `w`, before any column is moved. Otherwise the params of a group are fitted when
        its first column is reached, to its weights as updated by then. Formats whose params are not a group's own (per
        channel, tensor or head: `fmt.refits` is False) always take them from `w`.
    block_size : columns of a lazy batch. It changes the speed, and the result only by rounding of the updates.

    act_order with params fitted on the way makes groups of columns that are neighbours in the order of rounding: g_idx (in,)
    int32 then says which, and the QTensor holds the columns sorted by it, as QuantLinear expects them. Otherwise g_idx is
    None.

    Codes are chosen as the format's own `quantize` does: with a diagonal hessian they are the same. What the format rounds
    in its params afterwards (d of Q4_0 to float16) is in the errors that are made up for, but for double quantization, which
    needs the params of all groups.

    Raises ValueError for a hessian of another shape, with NaN or Inf, not symmetric, or not positive definite even after
    damping; for settings out of range; and for a format that cannot be encoded column by column.
    """
    check_format(fmt)
    check_settings(damping, block_size)
    _check(w, hessian)
    if w.numel() == 0:
        return fmt.quantize(w), None
    work = w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True)
    hessian = hessian.detach().to(work, copy=True)
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(w.device)
    dead = diagonal == 0
    work[:, dead], diagonal[dead] = 0, 1
    grid = ColumnGrid(fmt, work, refits=fmt.refits and not static_groups)
    factor = inverse_cholesky(hessian[order][:, order] if act_order else hessian, damping)
    groups = torch.arange(len(order), device=w.device) // grid.width
    codes = _round_columns(work.T[order], factor, grid, groups if grid.refits else groups[order], block_size)

    placed = order.argsort()  # the place of each column
    g_idx = groups[placed].int() if act_order and grid.refits and grid.width < len(order) else None
    if g_idx is not None:
        placed = placed[g_idx.argsort(stable=True)]
    return QTensor(fmt, fmt.pack(codes[placed].T), fmt.stored(grid.params), w.shape, w.dtype), g_idx


def inverse_cholesky(hessian: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with Uᵀ·U = (hessian + damping · mean of its diagonal · I)⁻¹. (in, in), like `hessian`.

    H = R·Rᵀ with R upper triangular is a Cholesky decomposition read from the last row up, and U = R⁻¹: H⁻¹ itself is
    never written out, which would have to be positive definite in its rounded form to be decomposed in turn.

    Raises ValueError where the damped hessian is not positive definite.
    """
    added = damping * hessian.diagonal().mean()
    damped = hessian.flip(0, 1)
    damped.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped  # here and below: one (in, in) less is in memory
    if failed:
        raise ValueError(
            f"the hessian with damping={damping} ({float(added):.3g} added to its diagonal) is not positive definite in "
            f"{hessian.dtype}: raise damping, or observe more inputs"
        )
    upper = lower.flip(0, 1)
    del lower
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


class ColumnGrid:
    """The grid of a format for one column at a time.

    fmt, w : the weight (out, in) whose params these are. refits : whether `refit` will give each group its params.

    params : as `fmt.fit` gives them. width : columns that share params, in / n; in where there is but one group.
    """

    def __init__(self, fmt: Format, w: Tensor, refits: bool):
        self.refits, self.rows = refits, fmt.per_row()
        # What is fitted again later is fitted to zeros here: for a codebook that saves half of the time.
        self.params = fmt.fit(torch.zeros_like(w) if refits else w)
        self.by_row = fmt.row_params(self.params, w.shape)  # each (out, n[, …]), views of params if refits
        self.width = w.shape[1] // next(iter(self.by_row.values())).shape[1]

    def refit(self, group: int, w: Tensor) -> None:
        """Params of a group from its weights, (out, width)."""
        for name, param in self.rows.fit(w).items():
            self.by_row[name][:, group] = param

    def round(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes of a column, (out,), and the float32 weights that they stand for once the params are stored."""
        params: Params = {name: param[:, group] for name, param in self.by_row.items()}
        codes = self.rows.encode(column.unsqueeze(1), params)
        return codes.squeeze(1), self.rows.decode(codes, self.rows.stored(params)).squeeze(1)


def _round_columns(w: Tensor, factor: Tensor, grid: ColumnGrid, groups: Tensor, block_size: int) -> Tensor:
    """Algorithm 1. w: (in, out), a row for each place, so that a column lies together in memory; it is used up.

    factor: (in, in), U. groups: (in,) the group of params at each place. Returns codes, (in, out).
    """
    codes, groups, diagonal = [], groups.tolist(), factor.diagonal().tolist()
    for first, end in _lazy_batches(len(w), grid.width if grid.refits else len(w), block_size):
        errors = torch.empty_like(w[first:end])
        for place in range(first, end):
            if grid.refits and place % grid.width == 0:
                grid.refit(groups[place], w[place : place + grid.width].T)
            column_codes, rounded = grid.round(w[place], groups[place])
            codes.append(column_codes)
            error = errors[place - first] = (w[place] - rounded) / diagonal[place]
            w[place + 1 : end].addr_(factor[place, place + 1 : end], error, alpha=-1)
        w[end:].addmm_(factor[first:end, end:].T, errors, alpha=-1)
    return torch.stack(codes)


def _lazy_batches(columns: int, group: int, block_size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each batch of at most block_size columns. A batch is whole groups, or lies within one: when a group
    begins, all of its columns are either in the batch or up to date."""
    span = block_size // group * group or group
    for start in range(0, columns, span):
        end = min(start + span, columns)
        for first in range(start, end, block_size):
            yield first, min(first + block_size, end)


def check_format(fmt: Format) -> None:
    """Raises ValueError where the columns of a weight cannot be encoded one by one."""
    try:
        fmt.per_row()
    except ValueError as error:
        raise ValueError(f"GPTQ cannot choose the codes of {fmt}: {error}") from error


def check_settings(damping: float, block_size: int) -> None:
    """Raises ValueError for a setting out of range."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be 0 or more, got {damping}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")


def _check(w: Tensor, hessian: Tensor) -> None:
    if w.dim() != 2:
        raise ValueError(f"GPTQ takes a weight (out, in), got shape {tuple(w.shape)}")
    check_weights(w)
    columns = w.shape[1]
    if hessian.shape != (columns, columns) or not hessian.is_floating_point():
        raise ValueError(
            f"a weight of shape {tuple(w.shape)} takes a floating-point hessian of shape {(columns, columns)}, got "
            f"{tuple(hessian.shape)} of {hessian.dtype}"
        )
    if not columns:
        return
    if not hessian.isfinite().all():
        raise ValueError(f"the hessian holds {int((~hessian.isfinite()).sum())} values that are NaN or Inf")
    asymmetry, largest = float((hessian - hessian.T).abs().max()), float(hessian.abs().max())
    if asymmetry > 1e-3 * largest:
        raise ValueError(
            f"a hessian is symmetric: here entries up to {largest} differ from their mirror by {asymmetry}"
        )


class GPTQ(Method):
    """`gptq` for the layers of a model. The settings are explained there.

    >>> GPTQ(act_order=True)
    GPTQ(damping=0.01, act_order=True, static_groups=False, block_size=128)
    """

    keep = ("hessian",)

    def __init__(
        self, damping: float = 0.01, act_order: bool = False, static_groups: bool = False, block_size: int = 128
    ):
        check_settings(damping, block_size)
        self.damping, self.act_order, self.static_groups = damping, act_order, static_groups
        self.block_size = block_size

    def check(self, fmt: Format, shape: torch.Size | None = None) -> None:
        check_format(fmt)
        if shape is not None:  # the blocks of some formats run over the ends of rows
            fmt.row_params(fmt.fit(torch.zeros(shape)), shape)

    def quantize(self, w: Tensor, fmt: Format, stats: InputStats | None, name: str) -> tuple[QTensor, Tensor | None]:
        if stats is None:
            raise ValueError(f"GPTQ needs the hessian of the inputs of {name!r}: pass calibration data")
        settings = {"damping": self.damping, "act_order": self.act_order, "static_groups": self.static_groups}
        return gptq(w, stats.hessian, fmt, **settings, block_size=self.block_size)
