"""Adapters on frozen layers, and what becomes of them when they are merged."""

from qlab.adapters.add import AdapterReport, adapters_of, add_adapters
from qlab.adapters.bases import qtensor_of
from qlab.adapters.bitfit import BiasLinear, BitFitReport, bitfit, fold_biases
from qlab.adapters.dequantize import dequantize_model
from qlab.adapters.loftq import LoftQError, loftq, loftq_init
from qlab.adapters.lora import LoRALinear
from qlab.adapters.merge import merge, unmerge
from qlab.adapters.merge_report import LayerMerge, MergeReport
from qlab.adapters.merge_weight import (
    measure,
    merge_dequantize,
    merge_naive_add,
    merge_naive_codes,
    merge_requantize,
    merge_zero_points,
    stochastic_codes,
    survival,
    to_q4_1,
)
from qlab.adapters.peft_folder import load_adapter, read_adapter, save_adapter
from qlab.adapters.qalora import QALoRALinear
from qlab.adapters.qat_lora import QATLoRALinear, convert_qat_lora
from qlab.models import trainable_parameters

__all__ = [
    "AdapterReport", "BiasLinear", "BitFitReport", "LayerMerge", "LoRALinear", "LoftQError", "MergeReport",
    "QALoRALinear", "QATLoRALinear", "adapters_of", "add_adapters", "bitfit", "convert_qat_lora",
    "dequantize_model", "fold_biases", "load_adapter", "loftq", "loftq_init", "measure", "merge",
    "merge_dequantize", "merge_naive_add", "merge_naive_codes", "merge_requantize", "merge_zero_points",
    "qtensor_of", "read_adapter", "save_adapter", "stochastic_codes", "survival", "to_q4_1", "trainable_parameters",
    "unmerge",
]  # fmt: skip
