"""Layers over quantized weights, and activation quantization."""

from qlab.nn.act_quant import ActQuant
from qlab.nn.base import Base, check_activations
from qlab.nn.config import format_config, format_from_config
from qlab.nn.quant_linear import QuantLinear

__all__ = ["ActQuant", "Base", "QuantLinear", "check_activations", "format_config", "format_from_config"]
