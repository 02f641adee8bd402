"""Quantization-aware training: weights and grids that are learned through the rounding."""

from qlab.models import trainable_parameters
from qlab.qat.activations import FakeActivations
from qlab.qat.binary_connect import BinaryConnect, binarize, glorot_level, hard_sigmoid
from qlab.qat.fake_quant import FakeQuant
from qlab.qat.lsq import LSQ, LSQActivations, first_step, learned_step
from qlab.qat.pact import PACT, clipping_levels, pact
from qlab.qat.prepare import (
    METHODS,
    QATReport,
    constrain_weights,
    convert,
    grid_parameters,
    layers_of,
    parameter_groups,
    prepare_qat,
)
from qlab.qat.qat_linear import QATLinear
from qlab.qat.straight_through import fake_quantize, inside, straight_through
from qlab.qat.xnor_net import XNORActivations, XNORWeights, centred

__all__ = [
    "LSQ", "METHODS", "PACT", "BinaryConnect", "FakeActivations", "FakeQuant", "LSQActivations", "QATLinear", "QATReport",
    "XNORActivations", "XNORWeights", "binarize", "centred", "clipping_levels", "constrain_weights", "convert", "fake_quantize",
    "first_step", "glorot_level", "grid_parameters", "hard_sigmoid", "inside", "layers_of", "learned_step", "pact",
    "parameter_groups", "prepare_qat", "straight_through", "trainable_parameters",
]  # fmt: skip
