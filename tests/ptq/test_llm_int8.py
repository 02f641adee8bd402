"""LLM.int8(): by hand, against a product of integers, and the formats it refuses."""

import pytest
import torch

from qlab.formats import NF4, IntAffine
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq.llm_int8 import LLMInt8


def layer_of(w, threshold=6.0):
    method = LLMInt8(threshold)
    q, g_idx = method.quantize(w, IntAffine(8), None, "layer")
    assert g_idx is None
    return QuantLinear(q, None, method.activations)


def test_by_hand():
    w = torch.tensor([[127.0, 1.0, -3.0], [0.0, 254.0, 2.0]])  # scales 1 and 2: each weight is a code
    x = torch.tensor([[1.27, 0.006, 100.0], [0.0, -2.54, 0.3]])  # scales 0.01 and 0.02, column 2 as it is
    expected = torch.tensor([[1.27, 0.01, 100.0], [0.0, -2.54, 0.3]]) @ w.T
    torch.testing.assert_close(layer_of(w)(x), expected)
    coarse = torch.tensor([[2 * 100 / 127, 0.0, 100.0], [0.0, -2.54, 0.3]])  # without a threshold: scale 100 / 127
    torch.testing.assert_close(layer_of(w, None)(x), coarse @ w.T)


def test_equals_the_product_of_integers():
    """eq. (8), with int8 codes multiplied and summed as integers."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 64, generator=g), torch.randn(24, 64, generator=g) * 0.05
    x[:, [5, 40]] *= 10
    kept = (x.abs() >= 6).any(0)
    assert 0 < kept.sum() < 10
    inliers = torch.where(x.abs() < 6, x, 0)
    s_x, s_w = inliers.abs().amax(1, keepdim=True) / 127, w.abs().amax(1, keepdim=True) / 127
    x_int, w_int = (inliers / s_x).round().long(), (w / s_w).round().long()
    product = (x_int[:, ~kept] @ w_int[:, ~kept].T).double() * s_x.double() * s_w.double().T
    product += x[:, kept].double() @ (w_int[:, kept] * s_w.double()).T
    torch.testing.assert_close(layer_of(w)(x).double(), product, rtol=1e-5, atol=1e-5)


def test_outliers_cost_the_other_columns_nothing():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 128, generator=g).clamp(-5.9, 5.9), torch.randn(32, 128, generator=g)
    x[:, 7] = 60 + torch.randn(64, generator=g)
    exact = x @ w.T
    error = {t: float((layer_of(w, t)(x) - exact).norm() / exact.norm()) for t in (6.0, None, 1e9)}
    assert error[6.0] < 0.5 * error[None] and error[None] == error[1e9]
    small = x.clone()
    small[:, 7] = 0
    assert torch.equal(layer_of(w).act_quant(x)[:, :7], ActQuant()(small)[:, :7])


@pytest.mark.parametrize(
    "fmt",
    [
        IntAffine(4),
        IntAffine(7),
        IntAffine(8, symmetric=False),
        IntAffine(8, narrow=False),
        IntAffine(8, granularity="tensor"),
        IntAffine(8, granularity="group", group_size=64),
        NF4(),
    ],
    ids=repr,
)
def test_formats_that_are_refused(fmt):
    with pytest.raises(ValueError, match=r"LLM.int8\(\) .* so it takes IntAffine\(8\), not ") as error:
        LLMInt8().check(fmt)
    assert str(error.value).endswith(repr(fmt))


def test_the_method():
    LLMInt8().check(IntAffine(8))
    LLMInt8().check(IntAffine(8, param_dtype=torch.float16))
    method = LLMInt8(threshold=3.0)
    assert method.keep == () and method.scale([torch.ones(2, 2)], None, [IntAffine(8)]) is None
    assert method.activations.config() == ActQuant(threshold=3.0).config()
    assert LLMInt8().activations.threshold == 6.0 and LLMInt8(None).activations.threshold is None
    with pytest.raises(ValueError, match="threshold must be finite and above 0"):
        LLMInt8(0.0)
