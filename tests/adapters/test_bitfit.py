"""BitFit: what trains, in which dtype, over every kind of base; what stays bit for bit; and the way back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from qlab.adapters.add import add_adapters
from qlab.adapters.bitfit import BiasLinear, bitfit, fold_biases
from qlab.formats import NF4, IntAffine
from qlab.models import find_linears, guard_bitsandbytes, replace, trainable_parameters
from qlab.nn import Base, QuantLinear, shape_of, weight_of

guard_bitsandbytes()
import bitsandbytes as bnb  # noqa: E402 (after the guard)

OUT, IN = 6, 64  # bitsandbytes misreads 4-bit rows that its block of 64 does not divide
BASES = ["linear", "conv1d", "nf4", "linear4bit", "linear8bit"]
BERT = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LLAMA = BERT | {"num_key_value_heads": 2}


def make_base(kind, bias=True, dtype=torch.float32):
    torch.manual_seed(1)
    linear = nn.Linear(IN, OUT, bias=bias)
    if kind == "linear":
        return linear.to(dtype)
    if kind == "conv1d":
        layer = Conv1D(OUT, IN)
        nn.init.normal_(layer.bias)
        return layer.to(dtype)
    if kind == "nf4":
        return QuantLinear.from_linear(linear, NF4(16))
    if kind == "linear4bit":
        layer = bnb.nn.Linear4bit(IN, OUT, bias=bias, quant_type="nf4", compute_dtype=dtype)
    else:
        layer = bnb.nn.Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def inputs(dtype=torch.float32):
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def bert(kind=BertForSequenceClassification, dtype=torch.float32):
    torch.manual_seed(0)
    model = kind(BertConfig(**BERT)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def steps(model, x, lr=1e-3, number=3, forward=None):
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=lr)
    for _ in range(number):
        optimizer.zero_grad()
        y = forward(model, x) if forward else model(x)
        y.float().square().sum().backward()
        optimizer.step()


def tensors(model):
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
def test_a_biaslinear_computes_as_its_base_and_follows_the_protocol(kind):
    base = make_base(kind).eval()
    bias, expected, weight = base.bias.detach().clone(), base(inputs()), weight_of(base).detach().clone()
    layer = BiasLinear(base)
    assert isinstance(layer, Base) and shape_of(layer) == layer.shape == (OUT, IN)
    assert torch.equal(layer.bias, bias) and torch.equal(weight_of(layer), weight)
    torch.testing.assert_close(layer(inputs()), expected, rtol=1e-5, atol=1e-5)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("kind", BASES)
def test_gradients_are_those_of_autograd_on_the_float_layer(kind):
    layer = BiasLinear(make_base(kind))
    weight, bias = weight_of(layer).detach().clone(), layer.bias.detach().clone().requires_grad_()
    x, x_ref = inputs().requires_grad_(), inputs().requires_grad_()
    layer(x).pow(3).sum().backward()
    functional.linear(x_ref, weight, bias).pow(3).sum().backward()
    tolerance = 1e-4  # in training on the CPU bitsandbytes multiplies its int8 weights in floating point
    torch.testing.assert_close(
        layer.bias.grad, bias.grad, rtol=tolerance, atol=tolerance * float(bias.grad.abs().max())
    )
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=tolerance, atol=tolerance * float(x_ref.grad.abs().max()))


@pytest.mark.parametrize("kind", ["linear4bit", "linear8bit"])
def test_the_bias_stays_float32_where_bitsandbytes_casts_it_in_place(kind):
    bare = make_base(kind, dtype=torch.bfloat16)
    bare.bias.requires_grad_(True)
    layer = bitfit(nn.Sequential(make_base(kind, dtype=torch.bfloat16))).model
    start = layer[0].bias.detach().clone()
    for model in (bare, layer):
        steps(model, inputs(torch.bfloat16), lr=1e-5)
    assert bare.bias.dtype == torch.bfloat16  # what this is about: 16 bits, and no step larger than half of their unit
    assert torch.equal(bare.bias, start.bfloat16())
    assert layer[0].bias.dtype == torch.float32 and layer[0].bias.grad.dtype == torch.float32
    moved = layer[0].bias.detach() - start
    assert moved.abs().max() < 1e-4 and moved.abs().min() > 0


def test_the_sum_is_rounded_once_to_the_dtype_of_the_base():
    layer = BiasLinear(make_base("linear", bias=False, dtype=torch.bfloat16))
    layer.bias.data.fill_(1 / 3)
    x = inputs(torch.bfloat16)
    expected = (functional.linear(x, layer.base.weight).float() + torch.tensor(1 / 3)).bfloat16()
    assert torch.equal(layer(x), expected)


def test_it_refuses_what_it_cannot_stand_on():
    with pytest.raises(TypeError, match="BiasLinear already"):
        BiasLinear(BiasLinear(make_base("linear")))
    with pytest.raises(TypeError, match="LayerNorm"):
        BiasLinear(nn.LayerNorm(4))


@pytest.mark.parametrize("kind", BASES)
def test_fold_gives_the_base_back(kind):
    base = make_base(kind).eval()
    weight = weight_of(base).detach().clone()
    model = nn.Sequential(BiasLinear(base)).eval()
    model[0].bias.data += 0.25
    expected = model(inputs())
    assert fold_biases(model) is model and model[0] is base
    assert torch.equal(weight_of(base), weight) and base.bias.dtype == torch.float32
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-5)


def test_fold_rounds_to_the_dtype_of_float_weights_and_leaves_other_models_alone():
    model = nn.Sequential(make_base("conv1d", dtype=torch.bfloat16))
    assert bitfit(model).wrapped == ["0"]
    trained = (model[0].bias.data.add_(1e-3)).clone()
    fold_biases(model)
    assert type(model[0]) is Conv1D and torch.equal(model[0].bias, trained.bfloat16())
    model(inputs(torch.bfloat16))
    assert fold_biases(model) is model and type(model[0]) is Conv1D


# --- whole models ----------------------------------------------------------------------------------------------------


def test_on_a_float_model_biases_train_where_they_are_and_nothing_else_moves():
    model, x = bert(), torch.arange(12).view(2, 6)
    before = tensors(model)
    report = bitfit(model)
    assert report.wrapped == [] and report.skipped == {}
    assert set(report.trained) == {name for name in before if name.endswith("bias")}
    steps(model, x, forward=lambda m, ids: m(input_ids=ids).logits)
    after = tensors(model)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    still = {name for name in moved ^ set(report.trained) if "key" not in name}  # softmax does not see a key's bias
    assert not still and moved <= set(report.trained)


def test_the_paper_counts_the_norms_and_the_head():
    width, inner, layers = 64, 128, 2
    linear_biases = layers * (4 * width + inner + width) + width + 2  # pooler, classifier
    norm_biases = layers * 2 * width + width  # the embeddings'
    model = bert()
    total = sum(p.numel() for p in model.parameters())
    assert bitfit(model, norms=False).trainable == linear_biases
    report = bitfit(model)
    assert report.trainable == linear_biases + norm_biases
    assert report.trainable + report.frozen == total and report.share == report.trainable / total
    report = bitfit(model, head="classifier")
    assert report.trainable == linear_biases + norm_biases + 2 * width and "classifier.weight" in report.trained
    assert f"{report.trainable} numbers train ({report.share:.3%})" in str(report)
    assert sum(p.numel() for p in trainable_parameters(model)) == report.trainable


def test_bert_base_trains_a_thousandth():
    with torch.device("meta"):
        report = bitfit(BertForSequenceClassification(BertConfig()), head="classifier")
    assert 0.0009 < report.share < 0.001  # the paper: 0.09% of BERT-base


@pytest.mark.parametrize("quantizer", ["nf4", "linear4bit"])
def test_over_a_quantized_model_codes_do_not_move_and_no_layer_is_wrapped_twice(quantizer):
    def quantized(_, layer):
        if quantizer == "nf4":
            return QuantLinear.from_linear(layer, NF4(64))
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.bfloat16)
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")

    model, plain = bert(), bitfit(bert(), head="classifier")
    replace(model, lambda name, _: name != "classifier", quantized)
    report = bitfit(model, head="classifier")
    assert (report.trainable, report.frozen) == (plain.trainable, plain.frozen)  # codes count as the weights they are
    assert len(report.wrapped) == (0 if quantizer == "nf4" else 13)
    before, x = tensors(model), torch.arange(12).view(2, 6)
    steps(model, x, forward=lambda m, ids: m(input_ids=ids).logits)
    after = tensors(model)
    frozen = set(before) - set(report.trained)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in frozen)
    assert all(after[name].dtype == torch.float32 for name in report.trained)
    again = bitfit(model, head="classifier")
    assert again.wrapped == [] and again.trained.keys() == report.trained.keys()
    assert (again.trainable, again.frozen) == (report.trainable, report.frozen)
    logits = model(input_ids=x).logits
    fold_biases(model)
    assert not find_linears(model, (BiasLinear,))
    torch.testing.assert_close(model(input_ids=x).logits, logits, rtol=0, atol=0.05 if report.wrapped else 0)


def test_a_model_without_biases_gets_some_if_asked():
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval(), torch.arange(12).view(2, 6)
    expected = model(input_ids=ids).logits.detach()
    with pytest.raises(ValueError, match="new_biases=True"):
        bitfit(model)
    assert all(p.requires_grad for p in model.parameters())
    report = bitfit(model, new_biases=True)
    assert len(report.wrapped) == 14 and "lm_head" not in report.wrapped
    assert report.trainable == 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert bitfit(model, new_biases=True).wrapped == []


def test_a_single_layer_is_a_model_too():
    report = bitfit(make_base("linear4bit"))
    assert isinstance(report.model, BiasLinear) and bitfit(report.model).wrapped == []
    by_hand = nn.Sequential(BiasLinear(make_base("nf4")))
    assert bitfit(by_hand, new_biases=True).wrapped == []


def test_a_bias_that_was_cast_with_its_model_is_reported_and_not_wrapped_again():
    model = nn.Sequential(BiasLinear(make_base("linear")), make_base("linear")).to(torch.bfloat16)
    report = bitfit(model)
    assert report.wrapped == ["1"] and list(report.skipped) == ["0.bias"] and list(report.trained) == ["1.bias"]


def test_16_bit_models_train_what_can_train_in_float32():
    model = bert(dtype=torch.bfloat16)
    report = bitfit(model)
    assert len(report.wrapped) == 14 and all(p.dtype == torch.float32 for p in report.trained.values())
    assert set(report.skipped) == {name for name, _ in bert().named_parameters() if name.endswith("LayerNorm.bias")}
    assert "bfloat16" in str(report)
    steps(model, torch.arange(12).view(2, 6), forward=lambda m, ids: m(input_ids=ids).logits)


def test_a_tied_layer_is_left_and_reported():
    model = bert(BertForMaskedLM, dtype=torch.bfloat16)
    report = bitfit(model)
    assert "word_embeddings" in report.skipped["cls.predictions.decoder"]
    assert not model.cls.predictions.decoder.bias.requires_grad


def test_what_cannot_be_done_is_refused_before_anything_changes():
    model = bert()
    replace(model, ["classifier"], lambda _, layer: QuantLinear.from_linear(layer, IntAffine(8)))
    for head, message in (("classifier", "holds codes"), ("clasifier", "ends no module's name")):
        with pytest.raises(ValueError, match=message):
            bitfit(model, head=head)
    with pytest.raises(ValueError, match="changes both"):
        bitfit(bert(BertForMaskedLM), head="cls.predictions.decoder")
    adapted = copy.deepcopy(model)
    add_adapters(adapted, target_modules=["query"])
    with pytest.raises(ValueError, match="merge them first"):
        bitfit(adapted)
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("classifier"))


def test_adapters_on_wrapped_layers_count_each_number_once():
    model = nn.Sequential(nn.Linear(8, 4).bfloat16(), nn.Linear(4, 2))
    assert bitfit(model).wrapped == ["0"]
    assert add_adapters(model, r=2, target_modules=["1"]).frozen == 8 * 4 + 4 + 4 * 2 + 2
