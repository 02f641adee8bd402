"""ActQuant: activations rounded to the integers that a quantized matrix product would see.

Gholami et al. 2021, "A Survey of Quantization Methods for Efficient Neural Network Inference", arXiv:2103.13630, section
III-D (static and dynamic ranges); per-token scales: Yao et al. 2022, "ZeroQuant", arXiv:2206.01861, section 4.1; outlier
columns: Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 3.2.

    dynamic   scale and zero_point from the very x that is quantized, per token or per tensor
    static    one scale and zero_point for all x to come, from a range that was observed on calibration data
    threshold columns of this x that hold an outlier are left as they are

Axis legend: tokens = every axis of x but the last, flattened; in = its last axis.
"""

import math

import torch
from torch import Tensor

from qlab.formats import Binary, Format, IntAffine
from qlab.formats.base import Params
from qlab.nn.base import FrozenBuffers, check_activations

GRANULARITIES = {"token": "channel", "tensor": "tensor"}  # of activations → of IntAffine, on (tokens, in)


class ActQuant(FrozenBuffers):
    """x → x', both (…, in) in x's dtype: quantized and decoded by IntAffine, in float32, and rounded once to the dtype.

    Parameters
    ----------
    bits, symmetric, narrow : as in IntAffine. bits=1, symmetric and narrow: signs, ±mean |x| of each token or of x (XNOR-Net,
        arXiv:1603.05279, section 3.2), dynamic and without a threshold.
    granularity : "token" (one scale for each token) | "tensor" (one for all of x).
    static : the range is frozen by `freeze`; needs granularity="tensor", because tokens to come have no scale yet.
    threshold : None, or a size > 0, in activation units. Columns of x with any |x| ≥ threshold are then not quantized, and
        those outliers do not count in the range of their token (the column's smaller numbers do, as in bitsandbytes).
        Which columns is found anew in each call, so what else is in the batch has a say. Dynamic, per token only.

    The gradient is the straight-through estimator: 1 where x was rounded, 0 where a static range clipped it.

    state_dict: nothing where dynamic. Static: scale () float32, NaN until `freeze`; zero_point () uint8 unless symmetric.

    Raises ValueError for settings that contradict each other. `forward` raises RuntimeError for a static range that was
    never frozen, TypeError for integers and ValueError for NaN or Inf in x.

    >>> act = ActQuant(bits=2, symmetric=True, granularity="token")  # codes −1, 0, 1
    >>> act(torch.tensor([[4.0, 1.0, -3.0], [0.25, 0.0, 0.2]])).tolist()
    [[4.0, 0.0, -4.0], [0.25, 0.0, 0.25]]
    """

    def __init__(
        self,
        bits: int = 8,
        symmetric: bool = True,
        granularity: str = "token",
        static: bool = False,
        narrow: bool = True,
        threshold: float | None = None,
    ):
        super().__init__()
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity of activations is 'token' or 'tensor', got {granularity!r}")
        if static and granularity == "token":
            raise ValueError(
                "a static range cannot be per token, for tokens to come have no scale yet: use granularity='tensor', or "
                "static=False"
            )
        if threshold is not None and granularity != "token":
            raise ValueError(
                "a threshold leaves outliers out of the dynamic range of each token: it needs granularity='token' and "
                f"static=False, got threshold={threshold}, granularity={granularity!r}, static={static}"
            )
        if threshold is not None and not 0 < threshold < math.inf:
            raise ValueError(f"threshold must be finite and above 0, or None for no outliers, got {threshold}")
        self.granularity, self.static, self.threshold = granularity, static, threshold
        self.bits, self.symmetric, self.narrow = bits, symmetric, narrow
        if bits == 1 and symmetric and narrow:
            if static or threshold is not None:
                raise ValueError("signs have the mean |x| of each x as their scale: no static range, no threshold")
            self.format = Binary(GRANULARITIES[granularity])
        else:
            self.format = IntAffine(bits, symmetric, GRANULARITIES[granularity], narrow=narrow)
        if static:
            self.register_buffer("scale", torch.tensor(math.nan))
            if not symmetric:
                self.register_buffer("zero_point", torch.zeros((), dtype=torch.uint8))

    def freeze(self, low: float | Tensor, high: float | Tensor) -> "ActQuant":
        """Spread the codes over [low, high] from now on (scalars, activation units: `observer.range()`). Returns self."""
        if not self.static:
            raise ValueError("a dynamic ActQuant takes its range from each x: freeze belongs to static=True")
        low, high = (torch.as_tensor(end, dtype=torch.float32).cpu() for end in (low, high))
        if low.numel() != 1 or high.numel() != 1 or not (low.isfinite() & high.isfinite() & (low <= high)):
            raise ValueError(
                f"a static range is two finite numbers, low ≤ high, got {low.tolist()} and {high.tolist()}"
            )
        for name, value in self.format.from_range(low.reshape(()), high.reshape(())).items():
            getattr(self, name).copy_(value)
        return self

    @property
    def calibrated(self) -> bool:
        """False while a static range is missing."""
        return not self.static or not bool(self.scale.isnan())

    def params(self, x: Tensor) -> Params:
        """scale and zero_point for x (…, in): shape () per tensor, (tokens,) per token."""
        if not self.calibrated:
            raise RuntimeError(
                "this static ActQuant has no range yet: observe calibration data and call freeze(*observer.range())"
            )
        return dict(self.named_buffers()) if self.static else self.format.fit(self._inliers(_tokens(x)))

    def _inliers(self, tokens: Tensor) -> Tensor:
        return tokens if self.threshold is None else tokens.masked_fill(tokens.abs() >= self.threshold, 0)

    def forward(self, x: Tensor) -> Tensor:
        check_activations(x)
        tokens = _tokens(x)
        x_hat = _StraightThrough.apply(self._inliers(tokens), self.format, self.params(x.detach()), self.static)
        if self.threshold is not None:
            x_hat = torch.where((tokens.abs() >= self.threshold).any(0), tokens, x_hat)
        return x_hat.view(x.shape)

    def config(self) -> dict:
        """The arguments that make this module anew, JSON types only."""
        names = ("bits", "symmetric", "granularity", "static", "narrow", "threshold")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        how = "static" if self.static else "dynamic"
        sign = "symmetric" if self.symmetric else "asymmetric"
        parts = [f"bits={self.bits}", sign, f"{how} per {self.granularity}"]
        parts += [f"threshold={self.threshold}"] * (self.threshold is not None)
        return ", ".join(parts + ["no range yet"] * (not self.calibrated))


class _StraightThrough(torch.autograd.Function):
    """Quantize and decode (tokens, in); backward as if nothing had been rounded.

    Bengio et al. 2013, arXiv:1308.3432. A dynamic range holds every value, so only a static one has a clipped part.
    """

    @staticmethod
    def forward(ctx, x: Tensor, fmt: Format, params: Params, clips: bool) -> Tensor:
        x_hat = fmt.decode(fmt.encode(x, params), params)
        ctx.inside = None
        if clips and ctx.needs_input_grad[0]:
            low, high = fmt.decode(torch.tensor([fmt.qmin, fmt.qmax], device=x.device), params)
            half_step = params["scale"] / 2  # values that round to the outermost code are rounded, not clipped
            ctx.inside = (x >= low - half_step) & (x <= high + half_step)
        largest = torch.finfo(x.dtype).max  # the outermost level can lie half a step beyond the dtype
        return x_hat.clamp_(-largest, largest).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad if ctx.inside is None else grad * ctx.inside, None, None, None


def _tokens(x: Tensor) -> Tensor:
    if x.dim() == 0:
        raise ValueError("activations need at least one axis, got a scalar")
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
