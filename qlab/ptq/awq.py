"""AWQ: input channels with large activations get larger weights before rounding, and smaller activations to match.

Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
arXiv:2306.00978, section 3.2:

    Q(W·diag(s)) · (diag(s)⁻¹·x)               W·x in float; a channel with s > 1 has a smaller rounding error   eq. (3)
    L(s) = ‖ Q(W·diag(s))·diag(s)⁻¹·X − W·X ‖²                                                                   eq. (4)
    s    = mean|x|^α,   α* = argmin L over a grid in [0, 1)                                                      eq. (5)

and then, as in the authors' code (llm-awq), the clipping range of each block of weights that has the least output error.

Every weight is stored with the same number of bits: the channels that matter are scaled, not kept in more bits.

What differs from llm-awq: it runs the block of the model that contains the layers for each candidate, and compares what
the block puts out (the whole attention, for q, k and v); for clipping it looks at a sample of 512 tokens. Here the error
is that of the layers' own outputs, summed, over all calibration tokens: ½ · tr(D·H·Dᵀ) with D = W' − W and H =
(2 / tokens) · X·Xᵀ says it exactly, and H is all that has to be kept.

Axis legend: out, in = rows and columns of a weight; n = blocks of a row, g = weights of a block; steps = candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlab.calibrate import InputStats, output_error
from qlab.formats import Format, QTensor
from qlab.formats.base import Params
from qlab.ptq.method import RTN, Method

ADVICE = "Use AWQ(clip=False), or a format with params for each channel or group."
SMALLEST = 1e-4  # of the scale of a channel, as a share of the largest: llm-awq's clamp


class ScaleSearch(NamedTuple):
    """scale : (in,) float32, the best. ratios : (steps,) the exponents tried. errors : (steps,) float64, L(s) / tokens of each;
    the first is that of round to nearest."""

    scale: Tensor
    ratios: Tensor
    errors: Tensor

    @property
    def ratio(self) -> float:
        """The best exponent; the smallest of equal ones."""
        return float(self.ratios[self.errors.argmin()])


def candidate(mean_abs: Tensor, ratio: float) -> Tensor:
    """mean_abs^ratio, normalised so that √(largest · smallest) = 1: (in,), all ones at ratio 0.

    Channels are measured by the largest, so the unit of x does not matter; what is far smaller (a dead channel, whose
    mean is 0) is treated as SMALLEST of it.
    """
    scale = (mean_abs / mean_abs.max().clamp(min=torch.finfo(mean_abs.dtype).tiny)) ** ratio
    scale = scale.clamp(min=SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def search_scale(
    weights: Sequence[Tensor], mean_abs: Tensor, hessian: Tensor, fmt: Format | Sequence[Format], steps: int = 20
) -> ScaleSearch:
    """The exponent in 0, 1/steps, …, (steps − 1)/steps with the least output error, summed over the layers.

    weights: (out, in) each, of all the layers that have the same input. fmt: of all, or of each.
    mean_abs: (in,), hessian: (in, in), of that input.

    Exponent 0 (no scaling) is among the candidates, so the error is never above that of round to nearest. Raises ValueError
    for shapes that do not fit.
    """
    if not weights:
        raise ValueError("search_scale got no weights: give those of the layers that share the input")
    if steps < 1:
        raise ValueError(f"the search needs at least 1 step, got {steps}")
    for w in weights:
        _check_shapes(w, hessian)
    if mean_abs.shape != hessian.shape[:1]:
        raise ValueError(f"mean_abs is (in,), got {tuple(mean_abs.shape)} beside a Hessian of {tuple(hessian.shape)}")
    formats = [fmt] * len(weights) if isinstance(fmt, Format) else fmt
    ratios = torch.arange(steps, dtype=torch.float64) / steps
    scales, errors = [], torch.zeros(steps, dtype=torch.float64)
    for i, ratio in enumerate(ratios.tolist()):
        scales.append(candidate(mean_abs, ratio))
        for w, own in zip(weights, formats, strict=True):
            rounded = own.quantize(w * scales[i]).dequantize() / scales[i]
            errors[i] += output_error(rounded - w, hessian).double().sum().cpu()
    return ScaleSearch(scales[int(errors.argmin())], ratios, errors)


def search_clip(w: Tensor, hessian: Tensor, fmt: Format, steps: int = 10, shrink: float = 0.5) -> Params:
    """Params of w, each block clipped to the share of its amax that has the least output error.

    w: (out, in). hessian: (in, in), of the input that meets w (divided by the scale, where w was multiplied by one).
    steps, shrink: the shares 1, 1 − shrink/steps, …, 1 − shrink + shrink/steps: with the defaults 1, .95, …, .55.

    The error of a block is that of its own contribution to the output, ½ · d·H_gg·dᵀ with H_gg the block's part of H: the
    blocks of a row are decided one by one, as in llm-awq. Share 1 is a candidate and wins ties.

    Raises ValueError where the format's blocks are not pieces of rows, or have no params to choose, and for shapes
    that do not fit.
    """
    _check_shapes(w, hessian)
    if steps < 1 or not 0 < shrink <= 1:
        raise ValueError(f"clipping needs steps >= 1 and 0 < shrink <= 1, got steps={steps} and shrink={shrink}")
    blocks = _row_blocks(w, fmt)
    where, size = blocks.shape[:-1], blocks.shape[-1]
    hessians = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, w.shape[1], size)])  # (n, g, g)
    amax = blocks.abs().amax(-1, keepdim=True)
    best: Params = {}
    for i in range(steps):
        limit = amax * (1 - shrink * i / steps)
        params = fmt.fit(fmt.unblocks(blocks.clamp(-limit, limit), w.shape))
        difference = (fmt.decode(fmt.encode(w, params), params) - w).to(hessian.dtype)
        d = difference.unflatten(1, (-1, size)).movedim(1, 0)  # (n, out, g)
        error = ((d @ hessians) * d).sum(-1).T.reshape(where) / 2
        if not best:
            _check_params(params, where, fmt)
            best, least = params, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        for name, param in params.items():
            chosen = better.view(*where, *[1] * (param.dim() - len(where)))  # a table has an axis more
            best[name] = torch.where(chosen, param, best[name])
    return best


class AWQ(Method):
    """The scale from `search_scale`; then codes by `codes`.

    Parameters
    ----------
    codes : the method that chooses the codes of the scaled weights. RTN(): to the nearest, after `search_clip`. GPTQ(…):
        GPTQ on top of AWQ's scale, and no clipping, for GPTQ fits the range itself.
    clip : False leaves `search_clip` out. Without effect where `codes` is not RTN.
    no_clip : layers that are not clipped: those whose own name, the last part of the full one, begins with one of these.
        Queries and keys, as in llm-awq: their errors meet in a product, which a layer's own output does not show.
    steps : of `search_scale`.
    """

    def __init__(
        self,
        codes: Method | None = None,
        clip: bool = True,
        no_clip: tuple[str, ...] = ("q_", "k_", "query", "key", "qkv", "Wqkv", "c_attn"),
        steps: int = 20,
    ):
        self.codes, self.clip, self.no_clip, self.steps = codes or RTN(), clip, tuple(no_clip), steps
        self.keep = tuple(dict.fromkeys(("mean_abs", "hessian", *self.codes.keep)))

    @property
    def clips(self) -> bool:
        return self.clip and isinstance(self.codes, RTN)

    def check(self, fmt: Format, shape: torch.Size | None = None) -> None:
        self.codes.check(fmt, shape)
        if self.clips and not (fmt.refits or getattr(fmt, "granularity", None) == "channel"):
            raise ValueError(f"AWQ clips blocks of a row one by one; {fmt} has no params for each of them. {ADVICE}")

    def scale(self, weights: list[Tensor], stats: InputStats, formats: list[Format]) -> Tensor | None:
        """(in,) float32, or None where no candidate is better than no scaling."""
        search = search_scale(weights, stats.mean_abs, stats.hessian, formats, self.steps)
        return search.scale if search.ratio else None

    def quantize(self, w: Tensor, fmt: Format, stats: InputStats | None, name: str) -> tuple[QTensor, Tensor | None]:
        if not self.clips or name.rpartition(".")[2].startswith(self.no_clip):
            return self.codes.quantize(w, fmt, stats, name)
        params = search_clip(w, stats.hessian, fmt)
        return QTensor(fmt, fmt.pack(fmt.encode(w, params)), fmt.stored(params), w.shape, w.dtype), None


def _row_blocks(w: Tensor, fmt: Format) -> Tensor:
    """fmt.blocks(w), if each block is a piece of one row."""
    blocks = fmt.blocks(w)
    size = blocks.shape[-1]
    if blocks.numel() != w.numel() or w.shape[1] % size or not torch.equal(blocks.reshape(w.shape), w):
        raise ValueError(
            f"AWQ chooses a clipping range for each block of a row; {fmt} shares params over blocks of {size} weights that are "
            f"not pieces of a row of {w.shape[1]}. {ADVICE}"
        )
    return blocks


def _check_params(params: Params, where: torch.Size, fmt: Format) -> None:
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    if not shapes or any(shape[: len(where)] != where for shape in shapes.values()):
        raise ValueError(
            f"AWQ chooses params block by block; {fmt} has {shapes or 'none'} for blocks {tuple(where)}. {ADVICE}"
        )


def _check_shapes(w: Tensor, hessian: Tensor) -> None:
    if w.dim() != 2 or hessian.shape != (w.shape[1], w.shape[1]):
        raise ValueError(
            f"a weight is (out, in) and its input's Hessian (in, in), got {tuple(w.shape)} and {tuple(hessian.shape)}"
        )
