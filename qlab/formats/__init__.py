"""Number formats and the tensors stored in them."""

from qlab.formats.affine import IntAffine
from qlab.formats.base import Format, QTensor
from qlab.formats.codebook import FP4, NF4, dynamic_map, normal_float_levels
from qlab.formats.floats import FloatCast
from qlab.formats.packing import pack, unpack

__all__ = [
    "FP4", "NF4", "FloatCast", "Format", "IntAffine", "QTensor", "dynamic_map", "normal_float_levels", "pack", "unpack",
]  # fmt: skip
