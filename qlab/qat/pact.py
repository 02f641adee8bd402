"""PACT: activations are clipped at a level that is learned, and then rounded.

Choi et al. 2018, "PACT: Parameterized Clipping Activation for Quantized Neural Networks", arXiv:1805.06085, section 3:

    y   = clip(x, 0, α)                                         eq. (1); it takes the place of a ReLU
    y_q = round(y · (2ᵇ − 1) / α) · α / (2ᵇ − 1)                 eq. (2)
    ∂y_q/∂α = 1 where x ≥ α, 0 elsewhere                        section 3, by the straight-through estimator
    ∂y_q/∂x = 1 where 0 ≤ x < α, 0 elsewhere

A low α clips much and rounds finely, a high one the other way round. The gradient of the task alone pushes only on what is
clipped; the paper adds λ · α² for each α to the loss, which is the caller's:

    loss + lam * sum(alpha.square() for alpha in clipping_levels(model))
"""

import torch
from torch import Tensor, nn

from qlab.formats import IntAffine
from qlab.nn import ActQuant, check_activations


def pact(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """y_q, in x's shape and dtype, with the gradients above: the bits of IntAffine with the range [0, α].

    alpha: () float32, in the unit of x. Raises RuntimeError unless it is finite and above 0.

    >>> alpha = torch.tensor(3.0, requires_grad=True)
    >>> y = pact(torch.tensor([-1.0, 0.9, 3.0, 7.0]), alpha, bits=2)
    >>> y.sum().backward()
    >>> y.tolist(), alpha.grad.item()
    ([0.0, 1.0, 3.0, 3.0], 2.0)
    """
    return _PACT.apply(x, alpha, IntAffine(bits, symmetric=False, granularity="tensor"))


class _PACT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor, fmt: IntAffine) -> Tensor:
        if not 0 < float(alpha) < torch.inf:
            raise RuntimeError(
                f"a clipping level has become {float(alpha)}, and must stay above 0: lower its learning rate or the factor of "
                "its square in the loss"
            )
        ctx.save_for_backward(x, alpha)
        params = fmt.from_range(torch.zeros_like(alpha).float(), alpha.float())
        return fmt.decode(fmt.encode(x, params), params).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, alpha = ctx.saved_tensors
        above = x >= alpha
        return grad * ((x >= 0) & ~above), (grad * above).sum(dtype=torch.float32), None


class PACT(nn.Module):
    """Activations (…, in) → (…, in), in x's dtype, clipped to [0, α] with a learned α and rounded to `bits`.

    Parameters
    ----------
    bits : 1 to 8.
    alpha : where α starts, in the unit of x: above most of the numbers that it meets. What falls below 0 is cut, so it
        belongs where a ReLU was.

    State dict: alpha, () float32 Parameter.

    `forward` raises TypeError for integers, ValueError for NaN or Inf in x, RuntimeError for α ≤ 0.
    """

    def __init__(self, bits: int = 8, alpha: float = 10.0):
        super().__init__()
        IntAffine(bits, symmetric=False)
        if not 0 < alpha < torch.inf:
            raise ValueError(f"alpha is a clipping level above 0, got {alpha}")
        self.bits = bits
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def forward(self, x: Tensor) -> Tensor:
        check_activations(x)
        return pact(x, self.alpha, self.bits)

    def act_quant(self) -> ActQuant:
        """The same quantization, stored: unsigned codes over [0, α]."""
        return ActQuant(self.bits, symmetric=False, granularity="tensor", static=True).freeze(0.0, self.alpha.detach())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, alpha={self.alpha.item():.4g}"


def clipping_levels(model: nn.Module) -> list[nn.Parameter]:
    """Every α of the model, each once, in its own order: what the L2 term is a sum over."""
    return [module.alpha for module in model.modules() if isinstance(module, PACT)]
