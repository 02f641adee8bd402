"""BitNet b1.58 against transformers' WeightQuant."""

import pytest
import torch

from qlab.formats.ternary import Ternary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitnet_equals_transformers(dtype):
    """The same codes everywhere. Values within an ulp: they divide by the reciprocal of the scale, and sum in float32."""
    from transformers.integrations.bitnet import WeightQuant

    for seed, shape in enumerate([(64, 96), (7, 33), (256, 513), (1, 1), (5,)]):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 6)
        w = w.to(dtype)
        with torch.compiler.set_stance("force_eager"):  # it is decorated with torch.compile, which needs a C++ compiler
            theirs = WeightQuant.apply(w)
        q = Ternary("bitnet").quantize(w)
        assert torch.equal(q.codes, theirs.sign().to(torch.int8))
        torch.testing.assert_close(q.dequantize(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=0)
