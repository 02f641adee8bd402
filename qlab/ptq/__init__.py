"""Post-training quantization: how the codes of a model's layers are chosen without training."""

from qlab.ptq.method import RTN, Method
from qlab.ptq.quantize import METHODS, LayerReport, Report, quantize_model
from qlab.ptq.transform import InputGroup, fold, input_groups

__all__ = [
    "METHODS", "RTN", "InputGroup", "LayerReport", "Method", "Report", "fold", "input_groups", "quantize_model",
]  # fmt: skip
