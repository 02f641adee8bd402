"""Number formats and the tensors stored in them."""

from qlab.formats.affine import IntAffine
from qlab.formats.base import Format, QTensor
from qlab.formats.binary import Binary, sign_words, xnor_matmul
from qlab.formats.blocks import Q4_0, Q4_1, Q8_0
from qlab.formats.codebook import FP4, NF4, dynamic_map, normal_float_levels
from qlab.formats.floats import FloatCast
from qlab.formats.k_quants import Q4_K
from qlab.formats.microscaling import MXFP4, NVFP4
from qlab.formats.packing import pack, unpack
from qlab.formats.ternary import Ternary
from qlab.formats.vector import KMeans, ProductQuantizer

__all__ = [
    "FP4", "MXFP4", "NF4", "NVFP4", "Q4_0", "Q4_1", "Q4_K", "Q8_0", "Binary", "FloatCast", "Format", "IntAffine", "KMeans",
    "ProductQuantizer", "QTensor", "Ternary", "dynamic_map", "normal_float_levels", "pack", "sign_words", "unpack",
    "xnor_matmul",
]  # fmt: skip
