"""Leave quantization behind: every quantized layer becomes a float layer, and the model is saved as any float model is."""

import copy
import sys
from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlab.adapters.add import adapters_of
from qlab.adapters.bases import base_weight, float_layer, holds_codes, qtensor_of
from qlab.models import find_linears, guard_bitsandbytes, replace
from qlab.nn import LINEAR_TYPES, QuantLinear, weight_of
from qlab.nn.weights import bitsandbytes_kind

MARKS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantized layer of `model`, in place, by a float layer of its decoded weight. Returns the model.

    For layers that had no adapter, which `merge` reports as left. dtype: None: that which each was quantized from. The
    quantization config of a transformers model goes too. Raises ValueError while there are adapters.
    """
    if adapters := adapters_of(model):
        raise ValueError(f"{len(adapters)} adapters stand on the layers ({', '.join(adapters)}): merge them first")
    if "bitsandbytes" in sys.modules:
        guard_bitsandbytes(model)
    if layers := quantized_layers(model):
        conv1d, otherwise = conv1d_names(model, layers), model_dtype(model)

        def make(name: str, layer: nn.Module) -> nn.Module:
            return float_layer(base_weight(layer).to(dtype or dtype_of(layer, otherwise)), layer, name in conv1d)

        types = (*LINEAR_TYPES, QuantLinear)
        model = replace(model, lambda name, _: name in layers, make, tied="untie", types=types).model
    forget_quantizer(model)
    return model


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """name → layer that stores codes. Bases of adapters are not found."""
    layers = find_linears(model, (*LINEAR_TYPES, QuantLinear))
    inside = tuple(f"{name}." for name in adapters_of(model))
    return {name: layer for name, layer in layers.items() if holds_codes(layer) and not name.startswith(inside)}


def dtype_of(layer: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The dtype that a layer was quantized from, or `otherwise` for int8, where bitsandbytes does not write it down."""
    if not holds_codes(layer):
        return weight_of(layer).dtype
    return otherwise if bitsandbytes_kind(layer) == "Linear8bitLt" else qtensor_of(layer).dtype


def model_dtype(model: nn.Module) -> torch.dtype:
    """That of the first floating-point parameter that belongs to no adapter and no quantized layer; float32 without one."""
    layers = (*adapters_of(model).values(), *quantized_layers(model).values())
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    found = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in inside)
    return next(found, torch.float32)


def conv1d_names(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Which of `layers` (name → layer) have to be a Conv1D in the model's checkpoint, whose weight is (in, out).

    A float layer shows it. What was quantized does not: there the model's class is asked, by building it without weights.
    """
    names = {name for name, layer in layers.items() if isinstance(layer, Conv1D)}
    if not any(map(holds_codes, layers.values())):
        return names
    from transformers import PreTrainedModel  # here: importing it brings half of transformers along

    built: tuple[str, ...] = ()
    for prefix, part in model.named_modules():
        if not isinstance(part, PreTrainedModel) or f"{prefix}.".startswith(built):
            continue
        prefix = f"{prefix}." if prefix else ""
        with torch.device("meta"):
            skeleton = type(part)(copy.deepcopy(part.config))
        names |= {prefix + name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
        built = (*built, prefix)
    return names & layers.keys()


def forget_quantizer(model: nn.Module) -> list[tuple[nn.Module, dict, object]]:
    """Take away the marks that a bitsandbytes load left on transformers models: with them a saved float model would be
    quantized again at its next load. Returns (model, marks, config) of each, for `restore_quantizer`."""
    taken = []
    for part in model.modules():
        quantizer = vars(part).get("hf_quantizer")
        if quantizer is None or quantizer.quantization_config.quant_method != "bitsandbytes":
            continue
        marks = {name: vars(part)[name] for name in MARKS if name in vars(part)}
        taken.append((part, marks, part.config.quantization_config))
        for name in marks:
            delattr(part, name)
        del part.config.quantization_config
    return taken


def restore_quantizer(taken: list[tuple[nn.Module, dict, object]]) -> None:
    """Put back what `forget_quantizer` took away."""
    for part, marks, config in taken:
        vars(part).update(marks)
        part.config.quantization_config = config
