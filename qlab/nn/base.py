"""The protocol of a base layer, and what frozen layers have in common.

A *base* is a linear layer y = W·x + b that an adapter stands on and a merge folds into, however its weight is stored.
Adapters and merges know the protocol and no class.

Axis legend: out, in = rows and columns of the weight.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Base(Protocol):
    """A linear layer whose weight can be read as numbers.

    shape : (out, in).
    bias : (out,) or None.

    nn.Linear, Conv1D and bitsandbytes' layers have no such method: `qlab.nn.weight_of(layer)` reads the weight of
    those, and of every layer that follows this protocol, as (out, in).
    """

    shape: tuple[int, int]
    bias: Tensor | None

    def dequantized_weight(self) -> Tensor:
        """(out, in), in weight units: W as it acts on the layer's own input x."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in). Returns (…, out)."""


class FrozenBuffers(nn.Module):
    """A module whose buffers move between devices but keep their dtype.

    `model.half()` or `model.to(torch.bfloat16)` would otherwise round scales too, and with them every weight they
    decode to.
    """

    def _apply(self, fn, recurse=True):
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            if self._buffers[name].dtype != dtype:
                self._buffers[name] = before[name].to(self._buffers[name].device)
        return self


def check_activations(x: Tensor) -> None:
    """Refuse what cannot be quantized or averaged: TypeError if x is not floating point, ValueError on NaN or Inf."""
    if not x.is_floating_point():
        raise TypeError(f"activations are floating point, got {x.dtype} of shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(
            f"{int(x.isnan().sum())} NaN and {int(x.isinf().sum())} Inf in activations of shape {tuple(x.shape)}: look "
            f"for the layer that makes them, or compute in float32 if they overflowed {x.dtype}"
        )
