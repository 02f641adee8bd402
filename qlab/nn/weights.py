"""Read and write the weight of a linear layer as (out, in), whatever class stores it.

| layer | stored as | `weight_of` |
|---|---|---|
| nn.Linear | (out, in) | the Parameter itself |
| transformers' Conv1D (GPT-2) | (in, out) | a transposed view |
| bitsandbytes Linear4bit | packed 4-bit codes, block scales | a dequantized copy |
| bitsandbytes Linear8bitLt | int8 codes, one scale per row | a dequantized copy |
| QuantLinear and every other `Base` | its own way | what its `dequantized_weight()` returns |
"""

import sys

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlab.formats import FP4, NF4, QTensor
from qlab.nn.base import Base

LINEAR_TYPES = (nn.Linear, Conv1D)
_KNOWN = "nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit and Linear8bitLt"


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, whatever its storage. Raises TypeError for any other module."""
    if isinstance(module, Base):
        return module.shape
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    raise TypeError(f"{type(module).__name__} is no linear layer: qlab knows {_KNOWN}")


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, (out, in), in weight units.

    nn.Linear: its Parameter. Conv1D: a transposed view, so gradients and in-place writes reach the layer.
    bitsandbytes: a dequantized copy, in the dtype it was quantized from (4 bit) or float32 (8 bit); before
    the layer was quantized, the float weight. A module with a `dequantized_weight()` method: what that
    returns.

    Raises TypeError for any other module, RuntimeError for a 4-bit layer that bitsandbytes has repacked.
    """
    if hasattr(module, "dequantized_weight"):
        return module.dequantized_weight()
    kind = bitsandbytes_kind(module)
    if kind == "Linear4bit":
        return _weight_4bit(module)
    if kind == "Linear8bitLt":
        return _weight_8bit(module)
    if isinstance(module, Conv1D):
        return module.weight.T
    if isinstance(module, nn.Linear):
        return module.weight
    raise TypeError(f"{type(module).__name__} has no weight to read: qlab knows {_KNOWN}")


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Copy `weight`, (out, in) floating point, into an nn.Linear or Conv1D: in place, in the layer's own
    dtype.

    In place means that every module tied to the Parameter changes with it (see `find_tied` and `untie`).

    Raises ValueError with both shapes where they differ, TypeError for integer weights and for bitsandbytes
    layers.
    """
    if not isinstance(module, LINEAR_TYPES) or bitsandbytes_kind(module):
        raise TypeError(
            f"cannot write the weight of a {type(module).__name__}, only of nn.Linear and Conv1D. A quantized "
            "layer holds codes: replace it by an nn.Linear, or quantize the new weight"
        )
    if not weight.is_floating_point():
        raise TypeError(f"the weight given is {weight.dtype}: dequantize codes before writing them")
    expected, given = shape_of(module), tuple(weight.shape)
    if given != expected:
        hint = "; it is the transpose: pass (out, in) for every layer class" if given == expected[::-1] else ""
        raise ValueError(f"{type(module).__name__} takes a weight (out, in) = {expected}, got {given}{hint}")
    with torch.no_grad():
        weight_of(module).copy_(weight)


def is_plain_linear(module: nn.Module) -> bool:
    """True for the classes that store one weight and nothing else; False for wrappers and subclasses with
    more."""
    if bitsandbytes_kind(module):
        return type(module).__module__.startswith("bitsandbytes.")
    return type(module) in LINEAR_TYPES


def bitsandbytes_kind(module: nn.Module) -> str | None:
    """ "Linear4bit", "Linear8bitLt" or None."""
    library = sys.modules.get("bitsandbytes")  # not imported: then no module can be of its classes
    kinds = ("Linear4bit", "Linear8bitLt") if library is not None else ()
    return next((kind for kind in kinds if isinstance(module, getattr(library.nn, kind))), None)


def quant_state(module: nn.Module):
    """The state that decodes a Linear4bit; None before it is quantized."""
    return getattr(module.weight, "quant_state", None) or module.quant_state


def qtensor_4bit(module: nn.Module) -> QTensor:
    """The codes of a quantized Linear4bit, in NF4 or FP4: a view of what it stores."""
    state = quant_state(module)
    fmt = {"nf4": NF4, "fp4": FP4}[state.quant_type](state.blocksize, double_quant=state.nested)
    params = {"absmax": state.absmax}
    if state.nested:
        params = {
            "absmax_code": state.absmax,
            "absmax_scale": state.state2.absmax,
            "absmax_offset": state.offset,
        }
    return QTensor(fmt, module.weight.data.view(torch.uint8).reshape(-1), params, state.shape, state.dtype)


def row_absmax(module: nn.Module) -> torch.Tensor:
    """(out,), the largest weight of each row of a Linear8bitLt, which stands for code 127."""
    absmax = module.weight.SCB
    return module.state.SCB if absmax is None else absmax  # moved there by the first forward


def _weight_4bit(module):
    if is_repacked(module):
        raise RuntimeError(
            "bitsandbytes has repacked this Linear4bit in an eval forward, so its weight cannot be read: "
            "call qlab.models.guard_bitsandbytes() before the model is built, and load or quantize it again"
        )
    if quant_state(module) is None:
        return module.weight
    # Not bitsandbytes' dequantize_4bit: on AVX512 it is wrong where the block does not divide the row.
    return qtensor_4bit(module).dequantize()


def _weight_8bit(module):
    codes = module.weight.data
    if codes.dtype != torch.int8:
        return module.weight
    return codes.float() * (row_absmax(module).float() / 127).unsqueeze(1)


def is_repacked(layer: nn.Module) -> bool:
    """True when a bitsandbytes Linear4bit holds the repacked layout, which dequantizes to garbage (see
    `qlab.models.guard_bitsandbytes`)."""
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))
