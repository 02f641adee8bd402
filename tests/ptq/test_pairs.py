"""Every method with every format: it works, or it is refused by name before anything is changed. No shape is divisible by 8."""

import copy

import pytest
import torch
from torch import nn

from qlab.formats import (
    FP4,
    MXFP4,
    NF4,
    NVFP4,
    Q4_0,
    Q4_1,
    Q4_K,
    Q8_0,
    Binary,
    FloatCast,
    IntAffine,
    KMeans,
    ProductQuantizer,
    Ternary,
)  # fmt: skip
from qlab.nn import QuantLinear
from qlab.ptq import METHODS, ZeroQ, quantize_model

GROUP = {"granularity": "group", "group_size": 5}
FORMATS = [
    IntAffine(8), IntAffine(4, granularity="tensor"), IntAffine(3, False, **GROUP),
    IntAffine(4, False, float_zero_point=True, **GROUP), IntAffine(4, granularity="head", heads=2),
    NF4(5), FP4(15), NF4(5, double_quant=True), FloatCast("bf16"),
    Binary(), Binary("group", 5), Ternary("twn"), Ternary("twn", "channel"), Ternary("bitnet", "group", 5),
    KMeans(2), KMeans(2, "channel"), ProductQuantizer(3, bits=2), ProductQuantizer(5, bits=3, shared=True),
]  # fmt: skip
BLOCK_FORMATS = [Q4_0(), Q4_1(), Q8_0(), Q4_K(), MXFP4(), NVFP4()]  # their blocks of 16, 32 and 256 do not divide 15
X = torch.randn(40, 15, generator=torch.Generator().manual_seed(0))
ALL = METHODS | {"zeroq": lambda: ZeroQ((40, 15), steps=3)}
COLUMNS = "cannot be encoded column by column"
REFUSALS = {  # method → (format, words of the refusal)
    "gptq": [(FloatCast("bf16"), COLUMNS), (ProductQuantizer(3, bits=2), COLUMNS)],
    "hqq": [(fmt, "has no zero point that can move") for fmt in FORMATS if not fmt.float_zero_point],
    "llm.int8": [(fmt, "it takes IntAffine") for fmt in FORMATS[1:]],
    "xnor": [(fmt, "it takes Binary") for fmt in FORMATS if repr(fmt) != repr(Binary())],
    "awq": [(fmt, "AWQ clips blocks of a row one by one") for fmt in FORMATS
            if not (fmt.refits or getattr(fmt, "granularity", None) == "channel")],
}  # fmt: skip
REFUSALS["gptq"].append((ProductQuantizer(5, bits=3, shared=True), COLUMNS))
REFUSALS["awq+gptq"] = REFUSALS["gptq"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(15, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 15, bias=False)).eval()


def select(name, layer):
    return layer.in_features == 15


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("name", ALL)
def test_every_pair(name, fmt):
    model = net()
    before = copy.deepcopy(model.state_dict())
    refusal = next((words for refused, words in REFUSALS.get(name, []) if repr(refused) == repr(fmt)), None)
    if refusal:
        with pytest.raises(ValueError, match=refusal) as caught:
            quantize_model(model, fmt, ALL[name](), [X], select=select, progress=False)
        assert repr(fmt) in str(caught.value)
        assert isinstance(model[0], nn.Linear) and all(map(torch.equal, before.values(), model.state_dict().values()))
        return
    report = quantize_model(model, fmt, ALL[name](), [X], select=select, progress=False)
    (layer,) = report.layers.values()
    assert isinstance(model[0], QuantLinear) and isinstance(model[3], nn.Linear)
    assert model(X).isfinite().all() and layer.weight_error < 1
    rounded = fmt.quantize(before["0.weight"])
    assert model[0].qtensor.packed.shape == rounded.packed.shape, "every method stores codes of the same width"
    assert model[0].qtensor.params.keys() == rounded.params.keys()
    again = QuantLinear.from_config(model[0].config(), model[0].state_dict())
    assert torch.equal(again(X), model[0](X))


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=repr)
@pytest.mark.parametrize("name", ["rtn", "gptq", "awq"])
def test_blocks_that_do_not_divide_the_row_are_refused(name, fmt):
    model = net()
    with pytest.raises(ValueError, match=r"do not divide a weight of shape \(10, 15\)") as caught:
        quantize_model(model, fmt, name, [X], select=select, progress=False)
    assert isinstance(model[0], nn.Linear) and "for the layer '0'" in caught.value.__notes__[0]


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=repr)
@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_block_formats_where_they_fit(name, fmt):
    model = nn.Sequential(nn.Linear(256, 3))
    x = torch.randn(300, 256)
    if name == "gptq" and isinstance(fmt, Q4_K):
        with pytest.raises(ValueError, match="sub-blocks are stored together"):
            quantize_model(model, fmt, name, [x], progress=False)
        return
    expected = fmt.quantize(model[0].weight)
    report = quantize_model(model, fmt, name, [x], progress=False)
    assert report.bits_per_weight == pytest.approx(expected.bits_per_weight)
    assert model[0].qtensor.params["scale"].dtype == expected.params["scale"].dtype
