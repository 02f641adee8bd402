"""convert: every format, method and kind of activations stored, with the outputs of training and the bytes predicted."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
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
)
from qlab.formats.blocks import GGUFBlock
from qlab.nn import ActQuant, QuantLinear
from qlab.qat import (
    PACT,
    FakeActivations,
    LSQActivations,
    QATLinear,
    XNORActivations,
    constrain_weights,
    convert,
    parameter_groups,
    prepare_qat,
)

GROUP = {"granularity": "group", "group_size": 32}
INTEGERS = [
    IntAffine(8), IntAffine(4, granularity="tensor"), IntAffine(2, False, **GROUP), IntAffine(3, narrow=False),
    IntAffine(4, False, float_zero_point=True, param_dtype=torch.float16, **GROUP), IntAffine(4, granularity="head", heads=2),
    IntAffine(3, param_dtype=torch.bfloat16), Ternary("twn"), Ternary("bitnet", "channel"),
]  # fmt: skip
OTHERS = [
    NF4(64), FP4(48), Binary(), Binary("group", 32), KMeans(2, "channel"), ProductQuantizer(4, bits=2), Q4_0(), Q4_1(), Q8_0(),
]  # fmt: skip
NO_LEARNED_GRID = [NF4(64, double_quant=True), FloatCast("fp16"), FloatCast("bf16"), MXFP4(), NVFP4()]
PAIRS = [("ste", fmt) for fmt in INTEGERS + OTHERS + [*NO_LEARNED_GRID, Q4_K()]]
PAIRS += [("frozen", fmt) for fmt in INTEGERS + OTHERS + [*NO_LEARNED_GRID, Q4_K()]]
PAIRS += [("learned", fmt) for fmt in [*INTEGERS, *OTHERS, Q4_K()]] + [("lsq", fmt) for fmt in INTEGERS]
PAIRS += [("binaryconnect", Binary("tensor")), ("binaryconnect-stochastic", Binary("tensor")), ("xnor", Binary())]
ACTIVATIONS = {
    "none": None,
    "token": FakeActivations(8, granularity="token"),
    "token, asymmetric": FakeActivations(4, False, "token"),
    "tensor, dynamic": FakeActivations(5),
    "tensor, static": FakeActivations(8, warmup=2),
    "tensor, static, asymmetric": FakeActivations(4, False, warmup=1),
    "act_quant": ActQuant(6, granularity="token", threshold=2.5),
    "act_quant, static": ActQuant(6, granularity="tensor", static=True).freeze(-2, 2),
    "lsq": LSQActivations(4),
    "lsq, unsigned": LSQActivations(4, signed=False),
    "lsq+": LSQActivations(4, signed=False, learn_zero_point=True),
    "pact": PACT(4, alpha=1.5),
    "signs": XNORActivations(),
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(fmt, method, activations=None, dtype=torch.float32, steps=3):
    """A layer of 256 inputs between others, after some steps of everything that trains."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 256), nn.GELU(), nn.Linear(256, 10), nn.Linear(10, 2)).to(dtype)
    prepare_qat(model, fmt, method, activations=activations, select="2")
    optimizer = torch.optim.Adam(parameter_groups(model, lr=0.003, grid_lr=2e-5))
    x = random(16, 6).to(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).float().square().mean().backward()
        optimizer.step()
        constrain_weights(model)
    return model.eval(), torch.cat([x, 5 * random(16, 6, seed=1).to(dtype)])


@pytest.mark.parametrize("method, fmt", PAIRS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_method_and_format(method, fmt, dtype):
    model, x = trained(fmt, method, dtype=dtype)
    expected, w = model(x), model[2].weight_quant(model[2].weight).detach()
    predicted = fmt.quantize(model[2].weight).nbytes
    bias = model[2].bias
    report = convert(model)
    assert report.model is model and isinstance(model[2], QuantLinear) and model[2].bias is bias
    assert torch.equal(model(x), expected)
    assert torch.equal(model[2].dequantized_weight(torch.float32), w) and model[2].dtype == dtype
    assert report.layers["2"].nbytes == predicted == report.nbytes
    assert report.left == {"0": "not prepared", "3": "not prepared"} and 0 < report.layers["2"].weight_error < 1.5
    assert not any(parameter.requires_grad for name, parameter in model[2].named_parameters() if name != "bias")


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from(PAIRS),
    st.sampled_from(["zero row", "zero", "ties", "tiny", "huge", "constant"]),
)
def test_hostile_weights(seed, pair, kind):
    """Zero rows, ties, weights of 1e-20 and 1e3, one number only: whatever trains is stored as it computes."""
    method, fmt = pair
    layer = nn.Linear(256, 4)
    w = random(4, 256, seed=seed)
    w = {"zero row": w * torch.tensor([[1.0], [0], [1], [0]]), "zero": w * 0, "ties": (w * 2).round() / 2, "tiny": w * 1e-20,
         "huge": w * 1e3, "constant": w * 0 - 0.7}[kind]  # fmt: skip
    if kind == "tiny" and (isinstance(fmt, GGUFBlock) or getattr(fmt, "param_dtype", None) == torch.float16):
        return  # float16 constants: formats refuse them or store 0
    layer.weight = nn.Parameter(w.t().contiguous().t())
    model = prepare_qat(layer, fmt, method).model
    x = random(3, 256, seed=seed + 1)
    y = model.eval()(x)
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert torch.equal(convert(model).model(x), y)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_activations(tmp_path, kind, dtype):
    fmt = IntAffine(4, **GROUP)
    model, x = trained(fmt, "lsq", ACTIVATIONS[kind], dtype)
    expected = model(x)
    convert(model)
    assert torch.equal(model(x), expected)
    config, state = json.loads(json.dumps(model[2].config())), model[2].state_dict()
    save_file(state, tmp_path / "layer.safetensors")
    again = QuantLinear.from_config(config, load_file(tmp_path / "layer.safetensors"))
    inputs = random(5, 256, seed=3).to(dtype)
    assert torch.equal(again(inputs), model[2](inputs))


def test_bytes_on_disk_are_the_predicted_ones(tmp_path):
    fmt = IntAffine(2, False, **GROUP)
    model, _ = trained(fmt, "lsq", PACT(4))
    report = convert(model)
    save_file(model[2].state_dict(), tmp_path / "layer.safetensors")
    raw = (tmp_path / "layer.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    codes, params, ranges = 10 * 256 * 2 // 8, 10 * 8 * (4 + 1), 4 + 1
    assert len(raw) - header == codes + params + ranges + 10 * 4
    assert report.nbytes == codes + params + ranges == len(raw) - header - model[2].bias.nbytes


def test_shared_layers_and_a_model_that_is_one_layer():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    prepare_qat(model, NF4(8), "learned")
    x = random(3, 8)
    expected = model.eval()(x)
    report = convert(model)
    assert model[0] is model[2] and isinstance(model[0], QuantLinear) and list(report.layers) == ["0"]
    assert torch.equal(model(x), expected)
    single = prepare_qat(nn.Linear(8, 4), NF4(8)).model
    expected = single(x)
    assert torch.equal(convert(single).model(x), expected)


def test_a_frozen_or_trainable_bias_stays_as_it_is():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    model[0].bias.requires_grad_(False)
    prepare_qat(model, IntAffine(4))
    convert(model)
    assert not model[0].bias.requires_grad and model[1].bias.requires_grad


@pytest.mark.parametrize("activations, message", [
    (FakeActivations(granularity="channel"), "activations per channel cannot be stored"),
    (FakeActivations(granularity="group", group_size=2), "activations per group cannot be stored"),
    (FakeActivations(warmup=9), "0 of 9 batches were watched"),
    (LSQActivations(8), "this step has not started"),
])  # fmt: skip
def test_refused_by_name_before_anything_is_changed(activations, message):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    prepare_qat(model, IntAffine(4), "lsq", select="0")
    prepare_qat(model, IntAffine(4), "lsq", activations=activations, select="2")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        convert(model)
    assert caught.value.__notes__ == ["while converting the layer '2'. Nothing was changed"]
    assert isinstance(model[0], QATLinear) and isinstance(model[2], QATLinear)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


def test_nothing_to_convert():
    with pytest.raises(ValueError, match="call prepare_qat first"):
        convert(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Sequential(nn.Linear(4, 4))
    prepare_qat(model, IntAffine(4))
    convert(model)
    with pytest.raises(ValueError, match="no QATLinear"):
        convert(model)
