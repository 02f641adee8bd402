"""Load models, find and replace their layers, and keep bitsandbytes from repacking them."""

from qlab.models.guard import GuardState, guard_bitsandbytes
from qlab.models.load import load
from qlab.models.quantized import open_quantized, save_quantized
from qlab.models.sources import CHOICES, Source, locate
from qlab.models.surgery import Replacement, find_linears, find_tied, replace, trainable_parameters, untie
from qlab.nn.weights import LINEAR_TYPES, set_weight, shape_of, weight_of

__all__ = [
    "CHOICES",
    "LINEAR_TYPES",
    "GuardState",
    "Replacement",
    "Source",
    "find_linears",
    "find_tied",
    "guard_bitsandbytes",
    "load",
    "locate",
    "open_quantized",
    "replace",
    "save_quantized",
    "set_weight",
    "shape_of",
    "trainable_parameters",
    "untie",
    "weight_of",
]
