"""HQQ: half-quadratic quantization. Better zero points for a weight, without any data.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", https://mobiusml.github.io/hqq_blog/.
The scale stays that of min-max; the zero point z minimizes an error that outliers do not dominate, φ(W − W_r) with
φ(x) = |x|^p and p < 1, where W_r is the weight as decoded. An auxiliary W_e splits it in two steps, solved in turn:

    W_e ← shrink_lp(W − W_r, β, p)                      the part of the error that is left to outliers
    z   ← mean over the group of (W_q − (W − W_e) / s)  the zero point that has no error on the rest
    β   ← κ · β

Axis legend: groups = blocks of weights that share a zero point; n = weights of one.
"""

import torch
from torch import Tensor

from qlab.calibrate import InputStats
from qlab.formats import Format, QTensor
from qlab.ptq.method import Method

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # 1/scale must not overflow
SLICE = 1 << 20  # weights worked on at a time: few enough for little memory, enough for every thread


def shrink_lp(x: Tensor, beta: float, p: float) -> Tensor:
    """sign(x) · max(0, |x| − |x|^(p−1) / β), shape of x: the proximal step of |x|^p for 0 < p ≤ 1.

    0 wherever |x| ≤ β^(−1/(2−p)), which is 0.17 for the defaults of `hqq`.

    >>> shrink_lp(torch.tensor([-2.0, 0.1, 0.0]), beta=2.0, p=1.0).tolist()
    [-1.5, 0.0, 0.0]
    """
    size = x.abs()
    return (size - (1 / beta) * size.pow(p - 1)).clamp_(min=0).mul_(x.sign())


def hqq(
    w: Tensor, fmt: Format, *, p: float = 0.7, beta: float = 10.0, kappa: float = 1.0, iterations: int = 20
) -> QTensor:
    """w in codes of `fmt`, with zero points found by HQQ. w is not changed.

    fmt : affine with a float zero point: IntAffine(…, symmetric=False, float_zero_point=True).
    p, beta, kappa : see above. The blog lets β grow by κ = 1.01; the solver that hqq 0.2.8 runs leaves it as it is, and so
        does the default.
    iterations : at most this many updates of z. They end after the first at which the mean |W − W_r| of the whole weight
        did not fall.

    Codes, scale and zero are those of the `hqq` package (0.2.8, Quantizer.quantize, axis=1), with one difference: where
    that widens the range of a small group so that its scale fits in float16 (below (2**bits − 1) / 20000, and all
    codes but one are lost below 0.0001), here it keeps its range. A group of one value is stored exactly.

    Raises ValueError for another kind of format, for settings out of range and for NaN or Inf; TypeError for integers.

    >>> from qlab.formats import IntAffine
    >>> fmt = IntAffine(bits=2, symmetric=False, float_zero_point=True, granularity="channel")
    >>> w = torch.tensor([[-0.3, 0.0, 0.0, 0.1, 0.6]])
    >>> fmt.quantize(w).params["zero_point"], hqq(w, fmt, iterations=1).params["zero_point"]
    (tensor([1.]), tensor([0.9333]))
    """
    _check_format(fmt)
    if not (0 < p <= 1 and beta > 0 and kappa > 0 and iterations >= 1):
        raise ValueError(
            f"HQQ needs 0 < p ≤ 1, beta > 0, kappa > 0 and iterations ≥ 1, got p={p}, beta={beta}, kappa={kappa}, "
            f"iterations={iterations}"
        )
    w = w.detach()
    params = fmt.fit(w)
    if w.numel():
        params = _solve(fmt.blocks(w).float(), params, float(fmt.values.max()), p, beta, kappa, iterations)
    return QTensor(fmt, fmt.pack(fmt.encode(w, params)), params, w.shape, w.dtype)


def _solve(blocks: Tensor, fitted: dict, qmax: float, p: float, beta: float, kappa: float, iterations: int) -> dict:
    groups = blocks.reshape(-1, blocks.shape[-1])
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    inverse = qmax / (high - low)  # the package's order of operations, which its rounding depends on
    scale = 1 / inverse
    usual = scale.isfinite() & (scale >= SMALLEST_SCALE)  # the others, of one value or beyond float32, stay as fitted
    inverse = torch.where(usual, inverse, 1)
    zero_point = -low * inverse

    least, errors, rows = torch.inf, torch.empty_like(groups), max(1, SLICE // groups.shape[-1])
    for _ in range(iterations):
        parts = zip(*(tensor.split(rows) for tensor in (groups, inverse, zero_point, errors)), strict=True)
        zero_point = torch.cat([_step(*part, qmax, p, beta) for part in parts])
        error = errors.mean()
        if not error < least:
            break
        least, beta = error, beta * kappa

    def chosen(name: str, solved: Tensor) -> Tensor:
        kept = fitted[name]
        return torch.where(usual.view(kept.shape), solved.view(kept.shape).to(kept.dtype), kept)

    return {"scale": chosen("scale", scale), "zero_point": chosen("zero_point", zero_point)}


def _step(w: Tensor, inverse: Tensor, zero_point: Tensor, error: Tensor, qmax: float, p: float, beta: float) -> Tensor:
    """The next zero point of some groups, (groups, 1); |W − W_r| under the present one is written to `error`."""
    codes = (w * inverse).add_(zero_point).round_().clamp_(0, qmax)
    left = (codes - zero_point).div_(inverse).neg_().add_(w)  # W − W_r
    torch.abs(left, out=error)
    rest = w
    if not error.amax() < 0.99 * beta ** (-1 / (2 - p)):  # else W_e is 0, and its power the slowest step of all
        rest = w - shrink_lp(left, beta, p)
    return codes.sub_(rest * inverse).mean(-1, keepdim=True)


def _check_format(fmt: Format) -> None:
    if not (fmt.affine and fmt.float_zero_point):
        raise ValueError(
            f"HQQ moves the zero point between codes, and {fmt} has no zero point that can move so: use IntAffine(bits, "
            f"symmetric=False, float_zero_point=True, …)"
        )


class HQQ(Method):
    """`hqq` for every layer. Needs no data; a format with a float zero point."""

    def __init__(self, p: float = 0.7, beta: float = 10.0, kappa: float = 1.0, iterations: int = 20):
        self.p, self.beta, self.kappa, self.iterations = p, beta, kappa, iterations

    def check(self, fmt: Format, shape: torch.Size | None = None) -> None:
        _check_format(fmt)

    def quantize(self, w: Tensor, fmt: Format, stats: InputStats | None, name: str) -> tuple[QTensor, None]:
        return hqq(w, fmt, p=self.p, beta=self.beta, kappa=self.kappa, iterations=self.iterations), None
