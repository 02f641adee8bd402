"""Layers over quantized weights, and activation quantization."""

from qlab.nn.act_quant import ActQuant
from qlab.nn.base import Base, check_activations
from qlab.nn.config import format_config, format_from_config
from qlab.nn.quant_linear import QuantLinear
from qlab.nn.weights import LINEAR_TYPES, set_weight, shape_of, weight_of

__all__ = [
    "LINEAR_TYPES", "ActQuant", "Base", "QuantLinear", "check_activations", "format_config", "format_from_config",
    "set_weight", "shape_of", "weight_of",
]  # fmt: skip
