"""What a little unlabelled data tells about the inputs of layers: clipping ranges and statistics per channel."""

from qlab.calibrate.capture import Call, capture, inputs_of, observe_inputs
from qlab.calibrate.entropy import Entropy, kl_divergences
from qlab.calibrate.histogram import Extremes, Histogram
from qlab.calibrate.observers import MSE, MinMax, Observer, Percentile
from qlab.calibrate.statistics import STATISTICS, InputStats, output_error

__all__ = [
    "MSE", "STATISTICS", "Call", "Entropy", "Extremes", "Histogram", "InputStats", "MinMax", "Observer", "Percentile", "capture", "inputs_of",
    "kl_divergences", "observe_inputs", "output_error",
]  # fmt: skip
