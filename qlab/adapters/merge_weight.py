"""The merges of one weight: pure functions on tensors, and what of Δ survives them.

An adapter was trained on Ŵ, the weight that the codes stand for, so Ŵ + Δ is what the model has learned. The readings:

    dequantize    Ŵ + Δ, in floating point                       exactly what was trained; 4 to 8 times the bytes
    requantize    quantize(Ŵ + Δ)                                PEFT's merge of quantized layers (0.21, tuners/lora/bnb.py)
    original      W + Δ, with the W that was quantized to Ŵ      off by W − Ŵ, which the adapter has learned to live with
    naive-add     codes + Δ, taken for weights                   a misreading: codes are no weights
    naive-codes   decode(round(codes + Δ / step))                a misreading unless codes are evenly spaced, and then no
                                                                 better than rounding to a grid that does not move
    zero-points   scale · (codes − (zero_point − δ))             QA-LoRA: Δ = scale · δ is one number for each group of a
                                                                 row, which the zero point can take up; codes stay

QA-LoRA: Xu et al. 2023, arXiv:2309.14717, section 3.3. Stochastic rounding: Gupta et al. 2015, arXiv:1502.02551, section 3.

Axis legend: out, in = rows and columns of a weight; groups = in / group_size.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.formats import Q4_1, Format, IntAffine, QTensor
from qlab.formats.base import Params


def add(w: Tensor, delta: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """w + delta, (out, in), summed in float32 or wider and rounded once to `dtype` (None: w's own)."""
    wide = torch.promote_types(torch.promote_types(w.dtype, delta.dtype), torch.float32)
    return (w.to(wide) + delta.to(wide)).to(dtype or w.dtype)


def merge_dequantize(q: QTensor, delta: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Ŵ + Δ: (out, in) in `dtype`, None: the dtype that was quantized. delta: (out, in), weight units."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return add(q.dequantize(wide), delta, dtype or q.dtype)


def merge_requantize(q: QTensor, delta: Tensor, generator: torch.Generator | None = None) -> QTensor:
    """Ŵ + Δ in the same format, its params fitted anew. delta: (out, in), weight units.

    As PEFT does it, bit for bit: Ŵ is rounded to q.dtype, and the sum is in the wider dtype of the two.
    generator : None: to the nearest code. Given: stochastic rounding drawn from it, see `stochastic_codes`.
    """
    target = q.dequantize() + delta
    if generator is None:
        return replace(q.format.quantize(target), dtype=q.dtype)
    params = q.format.fit(target)
    stored = q.format.stored(params)
    codes = stochastic_codes(q.format, target, params, generator)
    return QTensor(q.format, q.format.pack(codes), stored, q.shape, q.dtype)


def stochastic_codes(fmt: Format, w: Tensor, params: Params, generator: torch.Generator) -> Tensor:
    """Codes of w, shape of w: of the two levels around each weight, the upper with probability (w − low) / (high − low).

    So E[decode(codes)] = w, where nearest rounding has E = the same wrong level every time. Only beyond the outermost levels
    (params that a format rounds can leave some weights there) is the outermost one taken. params: from `fmt.fit`.

    Raises ValueError for a format whose codes do not stand for fixed levels: learned codebooks, casts.
    """
    rank_of, codes = _ladder(fmt, w.device)
    stored = fmt.stored(params)
    rank = rank_of[fmt.encode(w, params).int() - fmt.lowest_code]
    around = torch.stack([codes[(rank + step).clamp(0, len(codes) - 1)] for step in (-1, 0, 1)])
    levels = torch.stack([fmt.decode(c, stored) for c in around]).to(torch.promote_types(w.dtype, torch.float32))
    low, low_at = levels.masked_fill(levels > w, -math.inf).max(0)
    high, high_at = levels.masked_fill(levels < w, math.inf).min(0)
    draw = torch.rand(w.shape, generator=generator, device=generator.device).to(w.device)
    up = (draw < (w - low) / (high - low)) | low.isinf()
    return around.gather(0, torch.where(up, high_at, low_at).unsqueeze(0)).squeeze(0)


def _ladder(fmt: Format, device: torch.device) -> tuple[Tensor, Tensor]:
    """(stored code → place among the levels, level → code), levels ascending and each once: FP4 has two zeros."""
    check_fixed_levels(fmt, "stochastic rounding")
    first, last = code_range(fmt)
    values = fmt.values[first - fmt.lowest_code : last + 1 - fmt.lowest_code]
    levels, rank_of = values.unique(return_inverse=True)
    stored = torch.full((len(levels),), len(values)).scatter_reduce(0, rank_of, torch.arange(len(values)), "amin")
    return rank_of.to(device), (stored + first).to(fmt.code_dtype).to(device)


def code_range(fmt: Format) -> tuple[int, int]:
    """The lowest and the highest code that the format uses."""
    return getattr(fmt, "qmin", fmt.lowest_code), getattr(fmt, "qmax", fmt.lowest_code + len(fmt.values) - 1)


def check_fixed_levels(fmt: Format, what: str) -> None:
    """ValueError for a format whose codes are no numbers on a line."""
    if getattr(fmt, "values", None) is None:
        raise ValueError(f"{what} needs codes that stand for fixed levels, and those of {fmt} are learned or casts")


def merge_naive_add(q: QTensor, delta: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """codes + Δ, used as if it were the weight: (out, in) in `dtype`. A misreading, kept to be measured.

    >>> fmt = IntAffine(4, symmetric=False, granularity="tensor", float_zero_point=True)  # 16 levels from −1 to 1:
    >>> q = fmt.quantize(torch.tensor([-1.0, -0.22289008, 1.0]))
    >>> merge_naive_add(q, torch.full((3,), 0.8382505))[1], merge_dequantize(q, torch.full((3,), 0.8382505))[1]
    (tensor(6.8383), tensor(0.6383))
    """
    return add(q.codes.float(), delta, dtype or q.dtype)


def merge_naive_codes(q: QTensor, delta: Tensor) -> QTensor:
    """decode(round(codes + Δ / step)), step = (high − low) / (number of codes − 1) of each block: params stay as they are.

    For IntAffine that is Ŵ + Δ rounded to a grid that does not move; for codebooks, whose codes are not evenly spaced, it is
    some other weight. A misreading, kept to be measured. Raises ValueError for a format without fixed levels.
    """
    check_fixed_levels(q.format, "adding to codes")
    first, last = code_range(q.format)
    low, high = q.format.limits(q.params, q.shape)
    step = (high - low) / (last - first)
    moved = q.codes.float() + torch.where(step > 0, delta / step, 0)
    codes = moved.round_().clamp_(first, last).to(q.format.code_dtype)
    return replace(q, packed=q.format.pack(codes))


def merge_zero_points(q: QTensor, zero_point_delta: Tensor, dtype: torch.dtype | None = None) -> QTensor:
    """The same codes and scales, with zero points z − δ: Ŵ + scale · δ, exact up to the precision of z.

    q : affine, with a float zero point.
    zero_point_delta : δ, (out, groups), code units: Δ / scale of each group.
    dtype : in which zero points are kept. None: as in q. torch.uint8: rounded to integers, which loses what falls between.

    Raises ValueError for a format without float zero points and for a δ of another shape.
    """
    if not (q.format.affine and q.format.float_zero_point):
        raise ValueError(f"Δ merges into zero points that can fall between codes, and {q.format} has none")
    zero_point = q.params["zero_point"]
    if zero_point_delta.shape != zero_point.shape:
        raise ValueError(
            f"one δ for each zero point is needed: {tuple(zero_point.shape)}, got {tuple(zero_point_delta.shape)}"
        )
    wide = torch.promote_types(zero_point_delta.dtype, torch.float32)
    merged, fmt = zero_point.to(wide) - zero_point_delta.to(wide), q.format
    if dtype == torch.uint8:
        fmt = copy.copy(fmt)
        fmt.float_zero_point = False
        merged = merged.round().clamp(*code_range(fmt))
    merged = merged.to(dtype or zero_point.dtype)
    if not merged.isfinite().all():
        raise ValueError(f"a merged zero_point is NaN or Inf in {merged.dtype}: keep them in torch.float32")
    return replace(q, format=fmt, params={**q.params, "zero_point": merged})


def to_q4_1(q: QTensor) -> QTensor:
    """q in GGUF Q4_1 blocks: the same codes, d = scale, m = −scale · zero_point, equal but for the rounding of both to float16.

    q : IntAffine of up to 4 bits with zero points, groups of a multiple of 32 (which become that many blocks each).
    Raises ValueError for anything else, and where float16 cannot hold a constant.
    """
    fmt, block = q.format, Q4_1.block_size
    fits = isinstance(fmt, IntAffine) and not fmt.symmetric and fmt.bits <= 4 and fmt.granularity == "group"
    if not fits or fmt.group_size % block:
        raise ValueError(
            f"Q4_1 holds codes 0 … 15 with one d and one m for {block} weights of a row: IntAffine(bits ≤ 4, symmetric=False, "
            f"granularity='group', group_size={block}) or a multiple fits, {fmt} does not"
        )
    scale = q.params["scale"].float()
    params = {"scale": scale, "min": -scale * q.params["zero_point"].float()}
    blocks = {name: param.repeat_interleave(fmt.group_size // block, -1) for name, param in params.items()}
    return QTensor(Q4_1(), Q4_1().pack(q.codes), Q4_1().half(blocks), q.shape, q.dtype)


@dataclass(frozen=True)
class Survival:
    """What became of Δ. All are ratios; ‖·‖ is the Frobenius norm, and NaN stands where Δ = 0.

    size : ‖Δ‖ / ‖Ŵ‖.
    codes_changed : share of the codes that the merge changed; NaN where it left none.
    kept : ⟨W' − Ŵ, Δ⟩ / ⟨Δ, Δ⟩: 1 if Δ arrived, 0 if nothing of it did.
    error : ‖W' − (Ŵ + Δ)‖ / ‖Δ‖: 1 is what forgetting Δ would cost.
    """

    size: float
    codes_changed: float
    kept: float
    error: float


def measure(
    w_hat: Tensor, delta: Tensor, merged: Tensor, before: Tensor | None = None, after: Tensor | None = None
) -> Survival:
    """Survival of `delta` in `merged`: all (out, in), weight units. before, after: codes, where both are quantized."""
    w_hat, delta, merged = w_hat.double(), delta.double(), merged.double()
    size, moved = delta.norm(), merged - w_hat
    changed = math.nan if before is None or after is None else float((before != after).double().mean())
    kept = (moved * delta).sum() / size.square()
    return Survival(float(size / w_hat.norm()), changed, float(kept), float((moved - delta).norm() / size))


@dataclass(frozen=True)
class SurvivalPoint(Survival):
    """One point of the survival curve: `Survival` in a merge by rounding, and what stands beside it.

    original : error of the merge into the weight that was quantized, ‖W − Ŵ‖ / ‖Δ‖: the inverse of Δ's size in units of
        the rounding error of the format.
    """

    original: float


def survival(w: Tensor, delta: Tensor, fmt: Format, generator: torch.Generator | None = None) -> SurvivalPoint:
    """Quantize w to `fmt`, merge delta into it by `merge_requantize`, and measure what is left of delta.

    w, delta: (out, in), weight units. generator: for stochastic rounding.
    """
    q = fmt.quantize(w)
    merged, w_hat = merge_requantize(q, delta, generator), q.dequantize()
    point = measure(w_hat, delta, merged.dequantize(), q.codes, merged.codes)
    original = measure(w_hat, delta, add(w, delta, torch.float64)).error
    return SurvivalPoint(**vars(point), original=original)
