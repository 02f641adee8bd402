"""Adapters on frozen layers, and what becomes of them when they are merged."""

from qlab.adapters.add import AdapterReport, adapters_of, add_adapters
from qlab.adapters.bases import qtensor_of
from qlab.adapters.dequantize import dequantize_model
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
from qlab.models import trainable_parameters

__all__ = [
    "AdapterReport", "LayerMerge", "LoRALinear", "MergeReport", "QALoRALinear", "adapters_of", "add_adapters",
    "dequantize_model", "load_adapter", "measure", "merge", "merge_dequantize",
    "merge_naive_add", "merge_naive_codes", "merge_requantize", "merge_zero_points", "qtensor_of", "read_adapter",
    "save_adapter", "stochastic_codes", "survival", "to_q4_1", "trainable_parameters", "unmerge",
]  # fmt: skip
