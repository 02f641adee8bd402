"""Load models, find and replace their layers, and keep bitsandbytes from repacking them."""

from .guard import GuardState, guard_bitsandbytes
from .load import load
from .sources import CHOICES, Source, locate
from .surgery import Replacement, find_linears, find_tied, replace, untie
from .weights import LINEAR_TYPES, set_weight, shape_of, weight_of

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
    "replace",
    "set_weight",
    "shape_of",
    "untie",
    "weight_of",
]
