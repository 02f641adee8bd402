"""The straight-through estimator: round in the forward pass, and let the gradient through as if nothing had been rounded.

Bengio, Léonard and Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
Computation", arXiv:1308.3432; with clipping: Jacob et al. 2018, arXiv:1712.05877, section 3.

    forward     w' = decode(encode(w))
    backward    ∂w'/∂w = 1 where w lies in the range of the grid, 0 where it was clipped

The true derivative of rounding is 0 everywhere but at the steps, where there is none: with it no weight would ever move.
"""

import torch
from torch import Tensor

from qlab.formats import Format, IntAffine
from qlab.formats.base import Params


def fake_quantize(w: Tensor, fmt: Format, params: Params, clip: bool = True) -> Tensor:
    """w rounded to the grid of `fmt`: shape and dtype of w, bits of the QTensor that the same codes and params make.

    params: as from `fmt.fit`, exact; what decodes are `fmt.stored(params)`, as in `fmt.quantize`. Where a format stores
    params as they are, that is decode(encode(w, params), params).
    clip: False: the gradient is 1 for every weight. Right for params that were just fitted to w: they hold all of it.

    Gradient to w: 1 where `inside(w, fmt, params)`, else 0. To params that require one: that of `fmt.decode` at these codes,
    as if codes did not depend on params; for a scale, code − zero_point. (LSQ adds that they do: `qlab.qat.lsq`.)
    Raises like `fmt.encode`.

    >>> w = torch.tensor([0.26, -0.9, 5.0], requires_grad=True)
    >>> w_hat = fake_quantize(w, IntAffine(4, granularity="tensor"), {"scale": torch.tensor(0.5)})
    >>> w_hat.sum().backward()
    >>> w_hat.tolist(), w.grad.tolist()
    ([0.5, -1.0, 3.5], [1.0, 1.0, 0.0])
    """
    exact = {name: param.detach() for name, param in params.items()}
    codes = fmt.encode(w.detach(), exact)
    stored = dict(fmt.stored(exact))
    for name, param in params.items():
        if name in stored and param.requires_grad:  # rounding a param to what is stored lets its gradient through, too
            stored[name] = straight_through(param.float(), stored[name].float())
    w_hat = fmt.decode(codes, stored)
    return straight_through(w, w_hat.to(w.dtype), inside(w.detach(), fmt, exact) if clip else None)


def inside(w: Tensor, fmt: Format, params: Params) -> Tensor:
    """True where w is not clipped: bool, shape of w.

    IntAffine: where the rounded code lies in [qmin, qmax], so up to half a step beyond the last level, ties as torch's
    fake-quantize counts them. Other formats: between the lowest and the highest number that the block can store.
    """
    if isinstance(fmt, IntAffine) and "threshold" not in params:
        code = fmt.blocks(w).float() * (1 / params["scale"].float().unsqueeze(-1))
        if fmt.float_zero_point:
            code = (code + params["zero_point"].float().unsqueeze(-1)).round()
        else:
            code = code.round() + (0 if fmt.symmetric else params["zero_point"].float().unsqueeze(-1))
        return fmt.unblocks((code >= fmt.qmin) & (code <= fmt.qmax), w.shape)
    low, high = fmt.limits(fmt.stored(params), w.shape)
    return (w >= low) & (w <= high)


def straight_through(x: Tensor, x_hat: Tensor, factor: Tensor | None = None) -> Tensor:
    """x_hat, with the gradient of x · factor; None: of x. All of one shape and dtype, but that factor may be bool.

    The gradient also goes on to x_hat, whole: what x_hat was made of (params) learns from it.
    `x + (x_hat − x).detach()` would have the same gradient, but not the bits of x_hat.
    """
    return _StraightThrough.apply(x, x_hat, factor)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, x_hat: Tensor, factor: Tensor | None) -> Tensor:
        ctx.save_for_backward(factor)
        return x_hat.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (factor,) = ctx.saved_tensors
        return grad if factor is None else grad * factor, grad, None
