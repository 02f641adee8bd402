"""XNOR-Net training: signs of weights and of inputs in the forward pass, real weights behind them.

Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", arXiv:1603.05279,
section 3, Algorithm 1, and what its code does around it:

    W   = clip(W − mean(W), −1, 1)                           code: centred for each output, over its inputs
    W̃   = α · sign(W),  α = mean |W| of each output          eqs. (4), (6)
    x̃   = β · sign(x),  β = mean |x| of each token           eq. (10)
    ∂C/∂W = ∂C/∂W̃ · (1/n + α · 1[|W| < 1])                   section 3.1, n = in
    ∂C/∂x = ∂C/∂x̃ · β · 1[|x| ≤ 1]                           the same estimator of sign, β held fixed

The paper's weight gradient is taken element by element: the chain rule through α would couple all weights of an output. Its
code multiplies it by n and a constant, which Adam does not see. The first and the last layer stay in full precision: leave
them out by `select`. Inference is qlab.ptq.xnor's: XNOR and popcount on packed signs.

Axis legend: out, in = rows and columns of a weight; tokens = every axis of x but the last.
"""

import torch
from torch import Tensor, nn

from qlab.formats import Binary, Format, QTensor
from qlab.formats.base import Params
from qlab.nn import ActQuant, check_activations
from qlab.qat.fake_quant import FakeQuant
from qlab.qat.straight_through import straight_through


def centred(w: Tensor) -> Tensor:
    """Each row minus its mean, clipped to [−1, 1]: (out, in)."""
    return (w - w.mean(1, keepdim=True)).clamp(-1, 1)


class XNORActivations(nn.Module):
    """β · sign(x): (…, in) → (…, in), in x's dtype. sign(0) = +1. Forward: ActQuant(bits=1), bit for bit. No state.

    The gradient stops where |x| > 1, so inputs are best normalized (the paper puts a batch norm before each layer).
    Raises TypeError for integers and ValueError for NaN or Inf in x.
    """

    def __init__(self):
        super().__init__()
        self.signs = ActQuant(bits=1)

    def forward(self, x: Tensor) -> Tensor:
        check_activations(x)
        real = x.detach()
        beta = self.signs.params(real)["scale"].view(*x.shape[:-1], 1)
        return straight_through(x, self.signs(real), (beta * (real.abs() <= 1)).to(x.dtype))

    def act_quant(self) -> ActQuant:
        """The same quantization, stored."""
        return ActQuant(bits=1)


class XNORWeights(FakeQuant):
    """Weights α · sign(W) of the centred real weights. Format: Binary(), per channel. State dict: nothing.

    Call `constrain_weights(model)` after every optimizer step, as the paper's code does: it centres and clips the real
    weights themselves. The forward pass does so on a copy, whether it was called or not.
    """

    inputs = XNORActivations

    def check(self, format: Format, shape: torch.Size) -> None:
        if not isinstance(format, Binary) or format.granularity != "channel":
            raise ValueError(f"XNOR-Net scales the signs of each output once, so it takes Binary(), not {format}")

    def params(self, w: Tensor) -> Params:
        return self.format.fit(centred(w.detach()))

    def forward(self, w: Tensor) -> Tensor:
        real = centred(w.detach())
        params = self.format.fit(real)
        w_hat = self.format.decode(self.format.encode(real, params), params)
        factor = 1 / real.shape[1] + params["scale"].float().unsqueeze(1) * (real.abs() < 1)
        return straight_through(w, w_hat.to(w.dtype), factor.to(w.dtype))

    @torch.no_grad()
    def quantize(self, w: Tensor) -> QTensor:
        return self.format.quantize(centred(w))

    @torch.no_grad()
    def constrain(self, w: Tensor) -> None:
        w.copy_(centred(w))
