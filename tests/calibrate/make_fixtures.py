"""Writes pytorch_quantization.json, what NVIDIA's pytorch-quantization 2.1.3 returns for histograms of a few shapes:

    pip download --no-deps pytorch-quantization==2.1.3
    python make_fixtures.py pytorch_quantization-2.1.3-py3-none-any.whl

Its calibration is numpy alone, but the package needs CUDA to be imported: so that one module is run, and the others that
it names are left empty. Needs scipy.
"""

import json
import sys
import types
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

PERCENTILES = (50.003, 99.003, 99.903, 99.993)  # of no case a whole number of values, where its rounding decides


def calibration(wheel: str) -> types.ModuleType:
    for name in ("absl", "pytorch_quantization", "pytorch_quantization.calib.calibrator"):
        sys.modules[name] = MagicMock()
    sys.modules["pytorch_quantization.tensor_quant"] = MagicMock()
    sys.modules["pytorch_quantization.calib.calibrator"]._Calibrator = object
    module = types.ModuleType("histogram")
    exec(zipfile.ZipFile(wheel).read("pytorch_quantization/calib/histogram.py"), module.__dict__)
    return module


def samples() -> dict[str, np.ndarray]:
    """|x| of different shapes; the first is the fewest values, the last the heaviest outliers."""
    random = np.random.default_rng(0)
    return {
        "few": np.abs(random.normal(size=300)),
        "uniform": random.uniform(size=20_000),
        "normal": np.abs(random.normal(size=20_000)),
        "laplace": np.abs(random.laplace(size=20_000)),
        "rectified": np.maximum(random.normal(size=20_000), 0),
        "integers": random.integers(0, 40, 20_000).astype(float),
        "outliers": np.abs(np.concatenate([random.normal(size=20_000), 40 * random.normal(size=40)])),
    }


if __name__ == "__main__":
    library, cases = calibration(sys.argv[1]), []
    for name, values in samples().items():
        for bins in (512, 700):
            counts, edges = np.histogram(values, bins, (0, values.max()))
            numbers = np.arange(bins + 1)  # as edges: the answer is then a number of bins
            case = {"name": name, "counts": counts.tolist(), "width": edges[1]}
            for key, bits, unsigned in (("128", 8, False), ("256", 8, True), ("8", 4, False)):
                start = 256 if key == "256" else 128
                amax = library._compute_amax_entropy(counts.copy(), numbers, bits, unsigned, 1, start)
                case[key] = int(amax)
            case["percentiles"] = [
                int(library._compute_amax_percentile(counts.copy(), numbers, p)) for p in PERCENTILES
            ]
            cases.append(case)
    lines = ",\n".join(json.dumps(case) for case in cases)
    Path(__file__).with_name("pytorch_quantization.json").write_text(f"[\n{lines}\n]\n")
