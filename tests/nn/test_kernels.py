"""bitsandbytes' kernel gives the bits of our own decoding, and is asked only where it does."""

import subprocess
import sys

import pytest
import torch

from qlab.formats import FP4, NF4, IntAffine
from qlab.models import guard_bitsandbytes
from qlab.nn import kernels
from qlab.nn.kernels import dequantize

guard_bitsandbytes()


@pytest.fixture
def asked(monkeypatch):
    """The shapes that the kernel was asked for."""
    shapes, kernel = [], torch.ops.bitsandbytes.dequantize_4bit

    class Ops:
        @staticmethod
        def dequantize_4bit(*args):
            shapes.append(tuple(args[4]))
            return kernel(*args)

    monkeypatch.setattr(torch.ops, "bitsandbytes", Ops)
    return shapes


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("family, block_size, shape", [(NF4, 64, (6, 192)), (FP4, 32, (5, 32)), (NF4, 2048, (3, 4096))])
def test_the_kernel_gives_our_bits(asked, family, block_size, shape, double_quant, dtype):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    w[0, :block_size] = 0
    q = family(block_size, double_quant).quantize(w)
    assert torch.equal(dequantize(q, dtype), q.dequantize(dtype)) and asked == [shape]


@pytest.mark.parametrize(
    "fmt, shape, dtype",
    [
        (NF4(64), (6, 96), torch.float32),  # blocks run over the ends of rows
        (NF4(64), (2, 32), torch.float32),
        (NF4(16), (4, 64), torch.float32),  # no size of bitsandbytes'
        (NF4(64), (4, 64), torch.float64),
        (IntAffine(4), (4, 64), torch.float32),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_right_it_is_not_asked_for(asked, fmt, shape, dtype):
    q = fmt.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(dequantize(q, dtype), q.dequantize(dtype)) and not asked


def test_a_process_without_bitsandbytes_decodes_the_same():
    code = (
        "import sys, torch; from qlab.formats import NF4; from qlab.nn import QuantLinear\n"
        "torch.manual_seed(0); layer = QuantLinear.from_linear(torch.nn.Linear(64, 8), NF4(64)); x = torch.ones(1, 64)\n"
        "first = layer(x); assert 'bitsandbytes' not in sys.modules; import bitsandbytes\n"
        "print(torch.equal(first, layer(x)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["True"], run.stderr
