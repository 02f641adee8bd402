"""capture: what the layers of real architectures receive, masks, hooks, modes and errors."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_base import BatchEncoding

from qlab.calibrate import STATISTICS, Call, InputStats, MinMax, capture, inputs_of, observe_inputs
from qlab.formats import IntAffine
from qlab.models import find_linears, replace
from qlab.nn import ActQuant, QuantLinear

SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, use_cache=False)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, num_attention_heads=2)).eval()


class TwoLayers(nn.Module):
    """x → first → relu → second; and a layer that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.second(input=self.first(x).relu())  # a keyword, as some architectures pass it


def data(rows=5, seed=0):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


def hooks_of(model):
    return [module for module in model.modules() if module._forward_pre_hooks]


def ids(*lengths, seed=0):
    """Padded token ids and their mask, padding on the right."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": torch.randint(0, 30, mask.shape, generator=g), "attention_mask": mask}


def test_statistics_of_every_layer_in_one_pass():
    model, batches = TwoLayers(), [data(5, 0), data(7, 1)]
    stats = capture(model, iter(batches), ["first", "second"], keep=STATISTICS, dtype=torch.float64)
    x = torch.cat(batches)
    for name, inputs in {"first": x, "second": model.first(x).relu()}.items():
        inputs = inputs.detach().double()
        assert stats[name].tokens == 12
        torch.testing.assert_close(stats[name].hessian, 2 / 12 * inputs.T @ inputs, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(stats[name].mean_abs.double(), inputs.abs().mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(stats[name].amax.double(), inputs.abs().amax(0), rtol=1e-6, atol=0)


def test_each_batch_is_run_once():
    model, calls = TwoLayers(), []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    capture(model, (data() for _ in range(3)), ["first", "second"], keep=STATISTICS)
    assert len(calls) == 3


def test_all_linear_layers_of_a_language_model(llama):
    batch = ids(6, 6)
    stats = capture(llama, [batch, BatchEncoding(batch)])
    assert list(stats) == list(find_linears(llama)) and "lm_head" in stats
    assert {s.tokens for s in stats.values()} == {24}
    assert stats["model.layers.1.mlp.down_proj"].amax.shape == (24,)
    same = [stats[f"model.layers.0.self_attn.{name}_proj"].mean_abs for name in "qkv"]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


def test_conv1d_layers_are_captured():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    stats = capture(model, [ids(5)["input_ids"]])
    assert stats["transformer.h.0.mlp.c_fc"].amax.shape == (16,)
    assert stats["transformer.h.0.mlp.c_proj"].amax.shape == (64,)


# --- padding


def test_padding_is_left_out(bert):
    """Whatever stands on the padding, the statistics are those of the sentences alone, and the pooler sees each once."""
    padded = ids(6, 3)
    alone = [{name: row[:, :n] for name, row in zip(padded, rows, strict=True)} for n, rows in
             ((6, [t[:1] for t in padded.values()]), (3, [t[1:] for t in padded.values()]))]  # fmt: skip
    got, expected = capture(bert, [padded], keep=STATISTICS), capture(bert, alone, keep=STATISTICS)
    assert got["encoder.layer.1.output.dense"].tokens == 9 and got["pooler.dense"].tokens == 2
    for name, stats in expected.items():
        for statistic in STATISTICS:
            torch.testing.assert_close(getattr(got[name], statistic), getattr(stats, statistic), rtol=1e-4, atol=1e-6)


def test_tokens_flattened_by_the_model_are_matched_to_the_mask():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, attention_mask):
            return self.layer(x.flatten(0, 1))

    x = torch.arange(12.0).view(2, 2, 3)
    stats = capture(Flat(), [{"x": x, "attention_mask": torch.tensor([[1, 1], [0, 1]])}])["layer"]
    assert stats.tokens == 3 and stats.amax.tolist() == [9, 10, 11]
    assert stats.mean_abs.tolist() == pytest.approx([(0 + 3 + 9) / 3, (1 + 4 + 10) / 3, (2 + 5 + 11) / 3])


def test_a_mask_that_matches_nothing_is_an_error():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, attention_mask):
            return self.layer(x.flatten(0, 1)[:3])

    batch = {"x": torch.ones(2, 2, 3), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    with pytest.raises(ValueError, match=r"shape \(3, 3\) cannot be matched .* \(2, 2\)") as caught:
        capture(Chosen(), [batch])
    assert caught.value.__notes__ == ["while observing the input of 'layer'"]
    batch["attention_mask"] = torch.ones(2, 2)
    assert capture(Chosen(), [batch])["layer"].tokens == 3, "without padding there is nothing to match"
    batch["attention_mask"] = torch.ones(2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"\(batch, tokens\) .* got shape \(2, 1, 2, 2\)"):
        capture(Chosen(), [batch])


# --- the model afterwards


def test_hooks_modes_and_gradients_are_as_before():
    model = TwoLayers().train()
    model.second.eval()
    kept = model.first.register_forward_pre_hook(lambda *_: None)
    for fails in (False, True):
        batches = [data(), data() * float("nan")] if fails else [data()]
        for run in (lambda b: capture(model, b, ["first", "second"]), lambda b: inputs_of(model, b, "second")):
            if fails and run is not None:
                with pytest.raises((ValueError, TypeError)):
                    run([*batches, "text"])
            else:
                run(batches)
            assert hooks_of(model) == [model.first] and len(model.first._forward_pre_hooks) == 1
            assert model.training and model.first.training and not model.second.training
            assert torch.is_grad_enabled()
    kept.remove()


def test_the_model_runs_in_eval_mode():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    x, before, gradients = data(), model[1].running_mean.clone(), []
    model[2].register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    stats = capture(model, [x])["2"]
    assert torch.equal(model[1].running_mean, before) and model.training and gradients == [False]
    torch.testing.assert_close(stats.amax, model[1].eval()(x).detach().abs().amax(0))


def test_a_frozen_bitsandbytes_layer_survives_the_pass():
    import bitsandbytes

    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4")).to("cpu")
    model[0].support_avx512bf16_for_cpu = True  # as where the layer was built before the guard was on
    before = bitsandbytes.functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state).clone()
    capture(model, [torch.randn(4, 64)])
    assert not model[0].support_avx512bf16_for_cpu
    after = bitsandbytes.functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state)
    assert torch.equal(after, before)


# --- which layers


def test_a_layer_never_reached_is_named():
    with pytest.raises(ValueError, match="no batch reached 1 of 3 layers: unused"):
        capture(TwoLayers(), [data()])
    with pytest.raises(ValueError, match="no batch reached 1 of 1 layers: first"):
        capture(TwoLayers(), [], ["first"])
    with pytest.raises(ValueError, match="no batch reached 1 of 1 layers: first"):
        capture(TwoLayers(), [data(0)], ["first"])


def test_layers_are_selected_by_name(llama):
    name = "model.layers.1.mlp.up_proj"
    assert list(capture(llama, [ids(4)], [name])) == [name] == list(capture(llama, [ids(4)], name))
    with pytest.raises(ValueError, match="no layer is named 'model.layers.1.mlp.up'. Close: 'model.layers.1.mlp"):
        capture(llama, [ids(4)], ["model.layers.1.mlp.up"])
    with pytest.raises(ValueError, match="ReLU has no linear layer"):
        capture(nn.ReLU(), [data()])
    assert capture(nn.Linear(3, 2), [data()])[""].tokens == 5, "a model that is itself the layer"


def test_layers_that_are_quantized_already_are_captured_by_name():
    model = TwoLayers()
    replace(model, ["first"], lambda name, layer: QuantLinear.from_linear(layer, IntAffine(4, granularity="channel")))
    stats = capture(model, [data()], ["first", "second"])
    torch.testing.assert_close(stats["first"].amax, data().abs().amax(0))
    torch.testing.assert_close(stats["second"].amax, model.first(data()).relu().amax(0))


def test_a_layer_used_twice_sees_both_inputs():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, layer)
    stats = capture(model, [data()], ["1"])
    assert stats["1"].tokens == 10


def test_errors_name_the_layer():
    with pytest.raises(ValueError, match="5 NaN") as caught:
        capture(TwoLayers(), [data() * torch.tensor([1, float("nan"), 1])], ["first"])
    assert caught.value.__notes__ == ["while observing the input of 'first'"]
    with pytest.raises(TypeError, match="int64") as caught:
        capture(nn.Sequential(nn.Embedding(4, 3)), [torch.tensor([[1]])], ["0"])
    assert caught.value.__notes__ == ["while observing the input of '0'"]
    with pytest.raises(TypeError, match="got str"):
        capture(TwoLayers(), ["text"], ["first"])

    class Constant(nn.Module):
        def forward(self):
            return 1

    with pytest.raises(TypeError, match="called without a tensor"):
        capture(nn.Sequential(Constant()), [()], [""])


# --- range observers and block by block


def test_range_observers_of_every_layer():
    model, batches = TwoLayers(), [data(5, 0), data(7, 1)]
    observers = observe_inputs(model, batches, MinMax, ["first", "second"])
    x = torch.cat(batches)
    assert [float(end) for end in observers["first"].range()] == [float(x.min()), float(x.max())]
    hidden = model.first(x).relu().detach()
    assert [float(end) for end in observers["second"].range()] == [float(hidden.min()), float(hidden.max())]


def test_static_activations_from_the_observed_ranges(llama):
    """8-bit weights and activations, every range frozen on calibration data: the output moves by a percent or so."""
    model, calibration, new = copy.deepcopy(llama), [ids(8, 8, 8)], ids(8, 8, seed=5)
    observers = observe_inputs(model, calibration, MinMax)

    def make(name, layer):
        act_quant = ActQuant(symmetric=False, granularity="tensor", static=True).freeze(*observers[name].range())
        return QuantLinear.from_linear(layer, IntAffine(8), act_quant)

    replace(model, lambda name, layer: True, make)
    with torch.no_grad():
        expected, got = llama(**new).logits, model(**new).logits
    error = (got - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05


def test_block_by_block_equals_the_whole_model(llama, bert):
    """The inputs of block 0, run through the blocks alone, give each layer the statistics of a pass of the model."""
    batches = [ids(6, 3), ids(5, 5, seed=1)]
    for model, blocks, prefix in (
        (llama, llama.model.layers, "model.layers"),
        (bert, bert.encoder.layer, "encoder.layer"),
    ):
        whole = capture(model, batches, [name for name in find_linears(model) if name.startswith(prefix)], STATISTICS)
        calls = inputs_of(model, batches, f"{prefix}.0")
        assert len(calls) == 2 and all(isinstance(call, Call) for call in calls)
        for number, block in enumerate(blocks):
            for name, stats in capture(block, calls, keep=STATISTICS).items():
                expected = whole[f"{prefix}.{number}.{name}"]
                assert isinstance(stats, InputStats) and stats.tokens == expected.tokens == 19
                torch.testing.assert_close(stats.hessian, expected.hessian)
                assert torch.equal(stats.amax, expected.amax)
            with torch.no_grad():
                calls = [Call((block(*c.args, **c.kwargs), *c.args[1:]), c.kwargs, c.mask) for c in calls]


def test_inputs_of_stops_there_and_says_if_it_was_not_reached():
    model = TwoLayers()
    model.second.register_forward_pre_hook(lambda *_: pytest.fail("the forward went on"))
    (call,) = inputs_of(model, [data()], "first")
    assert torch.equal(call.args[0], data()) and call.kwargs == {} and call.mask is None
    with pytest.raises(ValueError, match="batch 1 did not reach 'unused'"):
        model = nn.ModuleDict({"unused": nn.Linear(1, 1)})
        model.forward = lambda reach: model["unused"](torch.ones(1)) if reach else None
        inputs_of(model, [(True,), (False,)], "unused")
    assert not hooks_of(model)
