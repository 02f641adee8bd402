"""Post-training quantization: how the codes of a model's layers are chosen without training."""

from qlab.ptq.allocate import allocate
from qlab.ptq.awq import AWQ, ScaleSearch, search_clip, search_scale
from qlab.ptq.gptq import GPTQ, gptq
from qlab.ptq.hqq import HQQ, hqq
from qlab.ptq.llm_int8 import LLMInt8
from qlab.ptq.method import RTN, Method
from qlab.ptq.quantize import METHODS, LayerReport, Report, quantize_model
from qlab.ptq.sensitivity import TraceEstimate, hessian_traces, loss_increase, model_loss, sensitivities, sizes
from qlab.ptq.smoothquant import SmoothQuant, smooth_scale
from qlab.ptq.transform import InputGroup, fold, input_groups
from qlab.ptq.xnor import XNOR, xnor_linear
from qlab.ptq.zeroq import Distilled, ZeroQ, distill

__all__ = [
    "AWQ", "GPTQ", "HQQ", "METHODS", "RTN", "XNOR", "Distilled", "InputGroup", "LLMInt8", "LayerReport", "Method",
    "Report", "ScaleSearch", "SmoothQuant", "TraceEstimate", "ZeroQ", "allocate", "distill", "fold", "gptq",
    "hessian_traces", "hqq", "input_groups", "loss_increase", "model_loss", "quantize_model", "search_clip",
    "search_scale", "sensitivities", "sizes", "smooth_scale", "xnor_linear",
]  # fmt: skip
