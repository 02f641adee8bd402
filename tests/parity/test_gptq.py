"""GPTQ against what llm-compressor's `quantize_weight` returned (fixtures/make_gptq.py): the same codes, ordered, grouped or not."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlab.formats import IntAffine
from qlab.ptq.gptq import gptq

FIXTURES = Path(__file__).with_name("fixtures")
spec = importlib.util.spec_from_file_location("make_gptq", FIXTURES / "make_gptq.py")
make_gptq = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_gptq)


@pytest.fixture(scope="module")
def theirs():
    return load_file(FIXTURES / "gptq.safetensors")


@pytest.mark.parametrize("name", make_gptq.CASES)
def test_the_same_codes(theirs, name):
    bits, symmetric, strategy, ordered, block_size = make_gptq.CASES[name]
    group_size = make_gptq.GROUP if strategy == "group" else None
    fmt = IntAffine(bits, symmetric, strategy, group_size, narrow=False)
    w = theirs["w"]
    q, g_idx = gptq(w, theirs["hessian"], fmt, act_order=ordered, static_groups=True, block_size=block_size)
    assert g_idx is None
    assert torch.equal(fmt.encode(theirs[name], q.params), q.codes)
    torch.testing.assert_close(q.dequantize(), theirs[name], rtol=1e-5, atol=1e-7)
    changed = (q.codes != fmt.quantize(w).codes).float().mean()
    assert changed > 0.1  # a case that rounding to nearest would pass shows nothing
