"""LSQ: the step of the grid is learned together with the weights, by the gradient of the task.

Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153, section 2:

    v  = x / s,   x̂ = s · round(clip(v, −Q_N, Q_P))                                            eqs. (1), (2)
    ∂x̂/∂s = round(v) − v  where −Q_N < v < Q_P;   −Q_N  where v ≤ −Q_N;   Q_P  where v ≥ Q_P     eq. (3)
    ∂x̂/∂x = 1             where −Q_N < v < Q_P;   0 elsewhere                                   eq. (5)
    s₀ = 2 · mean|x| / √Q_P,   and the gradient of s is multiplied by g = 1 / √(N · Q_P)         sections 2.1, 2.2

Between two levels the gradient of s grows with the distance to the level and changes its sign half way to the next one; that
of `decode` at fixed codes, the code itself, knows nothing of v.

With a zero point that is learned as well (Bhalgat et al. 2020, "LSQ+", arXiv:2004.09576, section 3.1), in this suite's code
units: x̂ = s · (q − z), q = clip(round(x / s + z), qmin, qmax). LSQ+ writes it as an offset β = −s · z, and so has

    ∂x̂/∂z = 0 where −Q_N < v < Q_P;  −s elsewhere                                    ∂x̂/∂β = 1 elsewhere
    Q_N = z − qmin and Q_P = qmax − z for eqs. (3) and (5): the distances of 0 from the ends, in steps

Axis legend: blocks, n = as `format.blocks(x)` lays x out, one step for each block; N = n for weights.
"""

import math

import torch
from torch import Tensor, nn

from qlab.formats import IntAffine
from qlab.formats.affine import SMALLEST_SCALE
from qlab.formats.base import Params
from qlab.nn import ActQuant, check_activations
from qlab.qat.fake_quant import FakeQuant, check_scale


def first_step(x: Tensor, fmt: IntAffine) -> Tensor:
    """s₀ of each block, float32, in the unit of x. A block of zeros gets 1, as in `IntAffine.fit`."""
    s = 2 * fmt.blocks(x.detach()).abs().float().mean(-1) / math.sqrt(fmt.qmax)
    return torch.where(s == 0, 1, s.clamp(min=SMALLEST_SCALE))


def learned_step(x: Tensor, fmt: IntAffine, scale: Tensor, zero_point: Tensor | None, features: int) -> Tensor:
    """x̂, in x's shape and dtype, with the gradients above. Forward: decode(encode(x)), bit for bit.

    scale, zero_point: float32, shaped like `fmt.blocks(x)` without its last axis. They are used as `fmt` stores them
    (param_dtype; a whole number unless float_zero_point), while gradients reach them in full precision. zero_point None:
    0. features: N, the numbers that share a step (for activations, of one token).

    Raises RuntimeError for a scale that is not above 0.
    """
    return _LearnedStep.apply(x, scale, zero_point, fmt, 1 / math.sqrt(features * fmt.qmax))


def stored_params(fmt: IntAffine, scale: Tensor, zero_point: Tensor | None) -> Params:
    """The params that learned numbers stand for, in the dtypes of `fmt.fit`."""
    scale = scale.detach().to(fmt.param_dtype)
    check_scale(scale)
    if fmt.symmetric:
        return {"scale": scale}
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point.detach()
    if fmt.float_zero_point:
        return {"scale": scale, "zero_point": zero_point.to(fmt.param_dtype)}
    return {"scale": scale, "zero_point": zero_point.round().clamp(fmt.qmin, fmt.qmax).to(torch.uint8)}


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: IntAffine, gradient_scale: float
    ) -> Tensor:
        params = stored_params(fmt, scale, zero_point)
        x_hat = fmt.decode(fmt.encode(x, params), params)
        ctx.save_for_backward(x, *params.values())
        ctx.fmt, ctx.gradient_scale, ctx.learns_zero_point = fmt, gradient_scale, zero_point is not None
        return x_hat.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        fmt, (x, *params) = ctx.fmt, ctx.saved_tensors
        scale, zero_point = (*(param.float().unsqueeze(-1) for param in params), None)[:2]
        v = fmt.blocks(x).float() * (1 / scale)
        z = 0 if zero_point is None else zero_point
        inside = (v > fmt.qmin - z) & (v < fmt.qmax - z)
        code = (
            (v + z).clamp(fmt.qmin, fmt.qmax).round()
            if fmt.float_zero_point
            else (v.round() + z).clamp(fmt.qmin, fmt.qmax)
        )
        g = fmt.blocks(grad).float()
        grad_scale = (g * torch.where(inside, code - z - v, code - z)).sum(-1) * ctx.gradient_scale
        grad_zero_point = None
        if ctx.learns_zero_point:
            grad_zero_point = (g * torch.where(inside, 0, -scale)).sum(-1) * ctx.gradient_scale
        return grad * fmt.unblocks(inside, x.shape), grad_scale, grad_zero_point, None, None


class LSQ(FakeQuant):
    """Weights on a grid whose steps are learned, one for each block of an IntAffine format.

    Parameters
    ----------
    format : IntAffine, or Ternary (the grid −s, 0, s; its rule is then the task's).
    w : (out, in), the weight to start from: s₀ of each block comes from it.
    learn_zero_point : LSQ+; needs an asymmetric format. Step and zero point then start at the format's own fit (min-max).
        An asymmetric format without it is the paper's unsigned case: zero_point = 0, and numbers below 0 are clipped.

    State dict: scale, and with learn_zero_point zero_point: Parameters, float32, shaped like the format's params.

    Raises ValueError for formats without a step to learn.
    """

    def __init__(self, format: IntAffine, w: Tensor, learn_zero_point: bool = False):
        self.learn_zero_point = learn_zero_point
        super().__init__(format, w, grid="learned")

    def check(self, format: IntAffine, shape: torch.Size) -> None:
        check_learnable(format, self.learn_zero_point)
        super().check(format, shape)

    def fit(self, w: Tensor) -> Params:
        if not self.learn_zero_point:
            return {"scale": first_step(w, self.format)}
        return {name: param.float() for name, param in self.format.fit(w).items()}

    def params(self, w: Tensor) -> Params:
        return stored_params(self.format, self.scale, self.zero_point if self.learn_zero_point else None)

    def forward(self, w: Tensor) -> Tensor:
        zero_point = self.zero_point if self.learn_zero_point else None
        return learned_step(w, self.format, self.scale, zero_point, self.format.blocks(w).shape[-1])


class LSQActivations(nn.Module):
    """Activations on a grid whose step is learned, one for all of x: (…, in) → (…, in), in x's dtype.

    Parameters
    ----------
    bits, signed : codes −2**(b−1) … 2**(b−1) − 1, or 0 … 2**b − 1 for inputs without negative numbers (after a ReLU).
    learn_zero_point : LSQ+, for inputs that lie aslant of 0 (after a GELU): unsigned codes and an integer zero_point.

    The step starts from the first batch that is seen in train mode; until then it is NaN. N = in.

    State dict: scale, and with learn_zero_point zero_point: () float32 Parameters.

    Raises ValueError for settings that contradict each other. `forward` raises RuntimeError in eval mode before a first batch
    in train mode, TypeError for integers and ValueError for NaN or Inf in x.
    """

    def __init__(self, bits: int = 8, signed: bool = True, learn_zero_point: bool = False):
        super().__init__()
        if signed and learn_zero_point:
            raise ValueError("a zero point belongs to unsigned codes: learn_zero_point needs signed=False")
        self.bits, self.signed, self.learn_zero_point = bits, signed, learn_zero_point
        self.format = IntAffine(bits, signed, "tensor", narrow=False)
        check_learnable(self.format, learn_zero_point)
        self.scale = nn.Parameter(torch.tensor(math.nan))
        self.register_parameter("zero_point", nn.Parameter(torch.tensor(math.nan)) if learn_zero_point else None)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Set the step, and the zero point, from x: s₀ of the paper, or min-max where a zero point is learned."""
        if not self.learn_zero_point:
            self.scale.copy_(first_step(x, self.format))
            return
        for name, param in self.format.fit(x).items():
            getattr(self, name).copy_(param)

    def forward(self, x: Tensor) -> Tensor:
        check_activations(x)
        if x.numel() == 0:
            return x
        if self.scale.isnan():
            if not self.training:
                raise RuntimeError("this step has not started: run a batch in train mode, or call start(x)")
            self.start(x)
        return learned_step(x, self.format, self.scale, self.zero_point, x.shape[-1])

    def act_quant(self) -> ActQuant:
        """The same quantization, stored. Raises ValueError where the step has not started."""
        if self.scale.isnan():
            raise ValueError("this step has not started: run a batch in train mode first")
        act = ActQuant(self.bits, self.signed, "tensor", static=True, narrow=False)
        for name, param in stored_params(self.format, self.scale, self.zero_point).items():
            getattr(act, name).copy_(param)
        return act

    def extra_repr(self) -> str:
        return f"{self.format}, learned step" + ", learned zero_point" * self.learn_zero_point


def check_learnable(fmt: IntAffine, learn_zero_point: bool) -> None:
    """Raises ValueError unless LSQ can learn the grid of fmt."""
    if not isinstance(fmt, IntAffine) or fmt.qmax < 1:
        raise ValueError(
            f"LSQ learns the step of an integer grid with a level above 0, and {fmt} has none: use IntAffine"
        )
    if learn_zero_point and fmt.symmetric:
        raise ValueError(
            f"a symmetric format has no zero point to learn: learn_zero_point with {fmt} needs symmetric=False"
        )
