"""QATLinear: a linear layer that trains in floating point and computes with what will be stored.

    y = activations(x) · weight_quant(W)ᵀ + bias

State dict, all tensors of one layer:

| key | shape, dtype | present |
|---|---|---|
| weight | (out, in), float32 or float64 | always: the real weights, which the optimizer moves |
| bias | (out,), the layer's dtype | if the layer has one |
| weight_quant.scale, … | see FakeQuant, LSQ, BinaryConnect, XNORWeights | where the grid has a state of its own |
| activations.scale, .zero_point, .alpha | see FakeActivations, LSQActivations, PACT, ActQuant | where the range has |

Axis legend: out, in = rows and columns of the weight.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlab.nn import LINEAR_TYPES, ActQuant, QuantLinear, weight_of
from qlab.qat.fake_quant import FakeQuant

HALVES = (torch.float16, torch.bfloat16)


class QATLinear(nn.Module):
    """A base layer (see `qlab.nn.Base`) whose weight is rounded in each forward pass.

    Parameters
    ----------
    linear : nn.Linear or Conv1D. The Parameters of an nn.Linear are kept, so that an optimizer that has them goes on; the
        weight is copied to float32 where it is half precision (steps smaller than its rounding would be lost) and where it
        is stored as (in, out).
    weight_quant : the FakeQuant of the weight.
    activations : quantizes the input: FakeActivations, LSQActivations, PACT, XNORActivations, ActQuant; None: nothing does.

    Raises TypeError for layers whose weight is not trainable numbers, and for activations that could not be stored.
    """

    def __init__(self, linear: nn.Module, weight_quant: FakeQuant, activations: nn.Module | None = None):
        super().__init__()
        weight = master_weight(linear)
        if activations is not None and not isinstance(activations, ActQuant) and not hasattr(activations, "act_quant"):
            raise TypeError(
                f"activations are quantized by a module with an act_quant() to be stored by, got {type(activations).__name__}"
            )
        self.dtype = weight_of(linear).dtype
        self.weight = weight
        self.register_parameter("bias", linear.bias)
        self.weight_quant, self.activations = weight_quant, activations

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return tuple(self.weight.shape)

    def dequantized_weight(self) -> Tensor:
        """(out, in), weight units: W as x meets it, with its gradient, in the dtype that the layer had."""
        return self.weight_quant(self.weight).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in), floating point. Returns (…, out) in x's dtype."""
        if self.activations is not None:
            x = self.activations(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.weight_quant(self.weight).to(x.dtype).contiguous()  # laid out, and so summed, as a stored one
        return functional.linear(x, weight, bias)

    def quant_linear(self) -> QuantLinear:
        """The layer as it is stored; its output in eval mode is this one's. Raises ValueError where that cannot be."""
        q = replace(self.weight_quant.quantize(self.weight), dtype=self.dtype)
        act = self.activations
        if act is not None and not isinstance(act, ActQuant):
            act = act.act_quant().to(self.weight.device)
        return QuantLinear(q, self.bias, act)

    def extra_repr(self) -> str:
        return f"{self.shape}" + ", bias" * (self.bias is not None)


def master_weight(linear: nn.Module) -> nn.Parameter:
    """The real weights of a layer, (out, in), in float32 or float64: its own Parameter where that is possible."""
    if not isinstance(linear, LINEAR_TYPES):
        raise TypeError(f"training needs the weight of an nn.Linear or Conv1D, got a {type(linear).__name__}")
    if not linear.weight.is_floating_point():
        raise TypeError(f"the weight of this {type(linear).__name__} is codes: dequantize the layer before training it")
    weight = weight_of(linear)
    if weight is linear.weight and weight.dtype not in HALVES:
        return weight
    dtype = torch.float32 if weight.dtype in HALVES else weight.dtype
    copy = weight.detach().to(dtype, copy=True).contiguous()
    return nn.Parameter(copy, requires_grad=linear.weight.requires_grad)
