"""prepare_qat: what it replaces and shares, what trains and what never moves, saving and resuming, refusals."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from qlab.formats import NF4, Binary, FloatCast, IntAffine, ProductQuantizer
from qlab.models import find_linears, shape_of, weight_of
from qlab.nn import ActQuant, Base, QuantLinear
from qlab.ptq import quantize_model
from qlab.qat import (
    LSQ,
    METHODS,
    PACT,
    FakeActivations,
    FakeQuant,
    LSQActivations,
    QATLinear,
    constrain_weights,
    grid_parameters,
    layers_of,
    parameter_groups,
    prepare_qat,
    trainable_parameters,
)

INT3 = IntAffine(3)
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
X = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3, bias=False))


def bytes_of(tensor):
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def step(model, optimizer, x=X):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


# --- replacing


def test_every_linear_layer_computes_with_its_rounded_weight():
    model, expected = net(), net()
    parameters = {name: p for name, p in model.named_parameters()}
    for layer in find_linears(expected).values():
        layer.weight.data = INT3.quantize(layer.weight).dequantize()
    report = prepare_qat(model, INT3)
    assert report.model is model and list(report.layers) == ["0", "3"] == list(layers_of(model)) and report.left == {}
    assert torch.equal(model(X), expected(X))
    assert model[0].weight is parameters["0.weight"] and model[0].bias is parameters["0.bias"], "an optimizer goes on"
    assert isinstance(model[0], Base) and shape_of(model[0]) == (8, 10) and weight_of(model[0]).requires_grad
    assert torch.equal(weight_of(model[3]), expected[3].weight) and model[3].bias is None
    assert "2 layers; " in str(report) and report.trainable == sum(p.numel() for p in parameters.values())


def test_never_twice():
    model = net()
    prepare_qat(model, INT3, select="0")
    first, text = model[0], repr(model)
    with pytest.raises(ValueError, match="no linear layer is named 0"):
        prepare_qat(model, INT3, select="0")
    assert repr(model) == text
    prepare_qat(model, INT3)
    assert model[0] is first and isinstance(model[3], QATLinear)
    with pytest.raises(ValueError, match="no layer is left|no linear layers"):
        prepare_qat(model, INT3)


def test_a_shared_layer_stays_shared_and_tied_weights_are_left():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 6))
    report = prepare_qat(model, INT3, "lsq")
    assert model[0] is model[2] and list(report.layers) == ["0", "3"]
    assert len(trainable_parameters(model)) == 6
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    report = prepare_qat(tied, INT3, select=lambda name, layer: True)
    assert "tied" in report.left["lm_head"] and len(report.layers) == 4


def test_conv1d_and_half_precision_get_a_float32_copy():
    conv = Conv1D(5, 8)
    with torch.no_grad():
        conv.bias.normal_()
    x, fmt = torch.randn(3, 8), FloatCast("bf16")
    expected = nn.functional.linear(x, fmt.quantize(conv.weight.T).dequantize(), conv.bias)
    model = prepare_qat(conv, fmt).model
    assert isinstance(model, QATLinear) and model.shape == (5, 8) and model.weight.is_contiguous()
    torch.testing.assert_close(model(x), expected)
    half = net().bfloat16()
    prepare_qat(half, INT3)
    assert half[0].weight.dtype == torch.float32 and half[0].bias.dtype == torch.bfloat16 == half[0].dtype
    assert half(X.bfloat16()).dtype == torch.bfloat16 and half[0].dequantized_weight().dtype == torch.bfloat16
    double = net().double()
    prepare_qat(double, INT3)
    assert double[0].weight.dtype == torch.float64 and double(X.double()).dtype == torch.float64


def test_transformers_models():
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
    report = prepare_qat(bert, INT3, "lsq", activations=FakeActivations(granularity="token"),
                         select=lambda name, layer: "encoder" in name)  # fmt: skip
    assert len(report.layers) == 12 and report.left == {
        "bert.pooler.dense": "not selected",
        "classifier": "not selected",
    }
    bert(torch.arange(12).view(2, 6), labels=torch.tensor([0, 2])).loss.backward()
    assert all(layer.weight_quant.scale.grad is not None for layer in report.layers.values())
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))
    report = prepare_qat(llama, NF4(8))
    assert len(report.layers) == 14 and report.left == {"lm_head": "the output head"}


def test_formats_by_layer_and_makers():
    model = net()
    report = prepare_qat(model, {"0": NF4(10), "3": None}, lambda fmt, w: FakeQuant(fmt, w, "frozen"))
    assert isinstance(model[3], nn.Linear) and report.layers["0"].weight_quant.grid == "frozen"
    for name in METHODS:
        fmt = Binary("tensor") if "connect" in name else Binary() if name == "xnor" else INT3
        prepare_qat(model := net(), fmt, name)
        model(X).sum().backward()
        assert model[0].weight.grad.abs().sum() > 0
    prepare_qat(model := net(), IntAffine(3, symmetric=False), "lsq")
    assert isinstance(model[0].weight_quant, LSQ) and model[0].weight_quant.learn_zero_point


def test_the_mode_of_the_model_is_kept():
    model = net().eval()
    prepare_qat(model, Binary("tensor"), "binaryconnect-stochastic", activations=PACT(4))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(X), model(X))


def test_activations_are_copied_for_each_layer():
    template = LSQActivations(8)
    model = net()
    prepare_qat(model, INT3, activations=template)
    model(X)
    assert template.scale.isnan() and model[0].activations.scale != model[3].activations.scale


# --- what trains


@pytest.mark.parametrize("method, activations, train, moves", [
    ("ste", None, "all", {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}),
    ("ste", None, "layers", {"0.weight", "0.bias", "3.weight"}),
    ("lsq", None, "layers", {"0.weight", "0.bias", "3.weight", "0.weight_quant.scale", "3.weight_quant.scale"}),
    ("lsq", None, "grids", {"0.weight_quant.scale", "3.weight_quant.scale"}),
    ("learned", None, "grids", {"0.weight_quant.scale", "3.weight_quant.scale"}),
    ("frozen", PACT(4, alpha=1.0), "grids", {"0.activations.alpha", "3.activations.alpha"}),
    ("frozen", LSQActivations(4), "grids", {"0.activations.scale", "3.activations.scale"}),
])  # fmt: skip
@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.01)],
                         ids=["adamw", "sgd"])  # fmt: skip
def test_what_is_frozen_never_moves(method, activations, train, moves, make):
    """By bytes, over steps of an optimizer, weight decay included; and everything that should train does."""
    model = net()
    report = prepare_qat(model, INT3, method, activations=copy.deepcopy(activations), train=train)
    model(X)  # starts learned activation steps
    before = {key: bytes_of(tensor) for key, tensor in model.state_dict().items()}
    optimizer = make(trainable_parameters(model))
    for _ in range(4):
        step(model, optimizer)
    after = {key: bytes_of(tensor) for key, tensor in model.state_dict().items()}
    assert {key for key in before if before[key] != after[key]} == moves
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moves
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert report.trainable == sum(p.numel() for p in trainable_parameters(model))
    assert report.frozen == sum(p.numel() for p in model.parameters()) - report.trainable


def test_what_was_frozen_before_stays_so():
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    prepare_qat(model, INT3, "lsq")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"0.bias", "3.weight", "0.weight_quant.scale", "3.weight_quant.scale"}
    model = net().bfloat16()
    model[0].weight.requires_grad_(False)
    prepare_qat(model, INT3)
    assert not model[0].weight.requires_grad and model[3].weight.requires_grad


def test_trainable_parameters_are_listed_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared)
    prepare_qat(model, INT3, "lsq", activations=PACT(8))
    found = trainable_parameters(model)
    assert len(found) == 4 == len({id(p) for p in found})
    torch.optim.AdamW(found)


def test_grids_are_a_group_of_their_own():
    model = net()
    prepare_qat(model, INT3, "lsq", activations=PACT(8))
    prepare_qat(other := net(), INT3, "ste")
    weights, grids = parameter_groups(model, lr=0.1, grid_lr=0.001, weight_decay=0.5)
    assert {id(p) for p in grids["params"]} == {id(p) for p in grid_parameters(model)}
    assert [p.numel() for p in grids["params"]] == [8, 1, 3, 1] and len(weights["params"]) == 5
    assert (weights["lr"], weights["weight_decay"], grids["lr"], grids["weight_decay"]) == (0.1, 0.5, 0.001, 0.0)
    assert grid_parameters(other) == []
    model[0].weight_quant.scale.requires_grad_(False)
    assert len(grid_parameters(model)) == 3
    for frozen in model[3].parameters():
        frozen.requires_grad_(False)
    before = model[3].weight.clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, 0.001, 0.5))
    step(model, optimizer)
    assert torch.equal(model[3].weight, before)


def test_frozen_weights_are_not_constrained_either():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(100)
    prepare_qat(model, Binary("tensor"), "binaryconnect")
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    constrain_weights(model)
    assert torch.equal(model[0].weight, before) and model[3].weight.abs().max() <= model[3].weight_quant.scale


def test_prepared_in_two_calls():
    model = net()
    prepare_qat(model, INT3, "lsq", select="0")
    report = prepare_qat(model, IntAffine(8), "ste", select="3", train="grids")
    assert [p.numel() for p in trainable_parameters(model)] == [8] and report.trainable == 8
    assert model[0].weight_quant.format.bits == 3 and model[3].weight_quant.format.bits == 8


# --- saving and resuming


def test_the_state_dict_has_the_documented_keys():
    keys = {
        ("ste", None): set(),
        ("lsq", PACT(8)): {"weight_quant.scale", "activations.alpha"},
        ("frozen", LSQActivations(8)): {"weight_quant.scale", "activations.scale"},
        ("ste", FakeActivations(8, False, warmup=1)): {"activations.scale", "activations.zero_point"},
    }
    for (method, activations), expected in keys.items():
        model = nn.Sequential(nn.Linear(10, 4))
        prepare_qat(model, INT3, method, activations=activations)
        model(X), model(X)
        assert set(model[0].state_dict()) == {"weight", "bias"} | expected


@pytest.mark.parametrize("method, activations", [
    ("ste", None), ("ste", FakeActivations(8, False, warmup=2)), ("lsq", PACT(8, 2.0)), ("learned", FakeActivations(8)),
    ("lsq", LSQActivations(8)), ("frozen", FakeActivations(8, granularity="channel", warmup=1)),
], ids=str)  # fmt: skip
def test_saved_halfway_and_resumed(tmp_path, method, activations):
    """Six steps at once, or three, a file, a new model, and three more: the same bytes."""

    def prepared():
        model = net()
        prepare_qat(model, INT3, method, activations=copy.deepcopy(activations))
        return model, torch.optim.Adam(trainable_parameters(model), lr=0.01)

    straight, optimizer = prepared()
    for _ in range(3):
        step(straight, optimizer)
    save_file(straight.state_dict(), tmp_path / "model.safetensors")
    state = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        step(straight, optimizer)
    resumed, optimizer = prepared()
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    optimizer.load_state_dict(state)
    for _ in range(3):
        step(resumed, optimizer)
    assert straight.state_dict().keys() == resumed.state_dict().keys()
    for key, tensor in straight.state_dict().items():
        assert bytes_of(tensor) == bytes_of(resumed.state_dict()[key]), key
    copied = copy.deepcopy(straight)
    assert torch.equal(copied.eval()(X), straight.eval()(X))


# --- refusals

REFUSED = {
    "no such method": (dict(method="lsqq"), "no method is named 'lsqq': use one of ste"),
    "group": (dict(fmt=IntAffine(4, granularity="group", group_size=5)), r"group_size=5 does not divide .*\(3, 8\)"),
    "no step": (dict(fmt=NF4(2), method="lsq"), "LSQ learns the step of an integer grid"),
    "not binary": (dict(method="binaryconnect"), 'it takes Binary\\("tensor"\\), not IntAffine'),
    "not per channel": (dict(fmt=Binary("tensor"), method="xnor"), "it takes Binary"),
    "nothing learned": (dict(train="grids"), "leaves nothing to train"),
    "train": (dict(train="scales"), "one of all, layers, grids, got 'scales'"),
    "double quantization": (dict(fmt=NF4(2, double_quant=True), method="learned"), "cannot be learned"),
    "unknown layer": (dict(fmt={"2.x": INT3}), "no linear layer is named '2.x'; the model has 0, 3"),
    "nothing selected": (dict(select=lambda name, layer: False), "no layer is left"),
    "no format": (dict(fmt="int3"), "the format of '0' is a str"),
    "activations": (dict(activations=nn.ReLU()), r"an act_quant\(\) to be stored by, got ReLU"),
}


@pytest.mark.parametrize("settings, message", REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_changed(settings, message):
    model = net()
    before, needed = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, TypeError), match=message):
        prepare_qat(model, **({"fmt": INT3} | settings))
    assert isinstance(model[0], nn.Linear) and isinstance(model[3], nn.Linear)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert needed == [p.requires_grad for p in model.parameters()]


def test_layers_that_cannot_train_are_refused():
    import bitsandbytes

    model = nn.Sequential(nn.Linear(4, 4), bitsandbytes.nn.Linear4bit(4, 4).to("cpu"))
    with pytest.raises(TypeError, match="is codes: dequantize the layer") as caught:
        prepare_qat(model, INT3)
    assert "for the layer '1'" in caught.value.__notes__[0] and type(model[0]) is nn.Linear
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantize_model(model, INT3, select="0", progress=False)
    prepare_qat(model, INT3)
    assert isinstance(model[0], QuantLinear) and isinstance(model[1], QATLinear)


def test_bad_weights_and_inputs():
    model = net()
    model[3].weight.data[0, 0] = float("nan")
    prepare_qat(model, INT3)
    with pytest.raises(ValueError, match="1 NaN"):
        model(X)
    prepare_qat(empty := nn.Sequential(nn.Linear(4, 2)), ProductQuantizer(2, bits=1), activations=ActQuant(8))
    assert empty(torch.zeros(0, 4)).shape == (0, 2) and empty(torch.zeros(4)).shape == (2,)
