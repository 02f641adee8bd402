"""Which layers share an input and what can be folded, on models of both kinds and on nets made for each obstacle."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlab.models import find_linears
from qlab.ptq import fold, input_groups

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
TOKENS = {"input_ids": torch.arange(12).view(2, 6)}


def groups_of(model, batch, names=None):
    return {group.names: group.norm for group in input_groups(model, batch, names or find_linears(model))}


def short(groups):
    """Last part of each layer's name → last part of the norm's."""
    return {
        tuple(n.rpartition(".")[2] for n in names): norm and norm.rpartition(".")[2] for names, norm in groups.items()
    }


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).eval()


def test_llama():
    names = [name for name in find_linears(llama()) if name != "lm_head"]
    groups = groups_of(llama(), TOKENS, names)
    assert len(groups) == 8
    assert short(groups) == {
        ("q_proj", "k_proj", "v_proj"): "input_layernorm", ("o_proj",): None,
        ("gate_proj", "up_proj"): "post_attention_layernorm", ("down_proj",): None,
    }  # fmt: skip
    assert (
        groups["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
        == "model.layers.1.post_attention_layernorm"
    )


def test_gpt2():
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=50)).eval()
    names = [name for name in find_linears(model) if name != "lm_head"]
    assert short(groups_of(model, TOKENS, names)) == {("c_attn",): "ln_1", ("c_proj",): None, ("c_fc",): "ln_2"}


def test_bert_adds_the_output_of_its_norms_to_the_residual():
    model = BertModel(BertConfig(**SIZES)).eval()
    groups = groups_of(model, TOKENS)
    assert set(groups.values()) == {None}
    assert ("query", "key", "value") in short(groups)
    after_norm = [group.names[0] for group in input_groups(model, TOKENS, find_linears(model)) if group.after_norm]
    parts = ("attention.self.query", "intermediate.dense")
    assert after_norm == [f"encoder.layer.{layer}.{part}" for layer in range(2) for part in parts]


def test_gemma_multiplies_by_one_plus_weight():
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=12)).eval()
    assert set(groups_of(model, TOKENS, [n for n in find_linears(model) if n != "lm_head"]).values()) == {None}


@pytest.mark.parametrize("times", range(3))
def test_the_answer_does_not_depend_on_where_tensors_lie_in_memory(times):
    names = [name for name in find_linears(llama()) if name != "lm_head"]
    assert sum(norm is not None for norm in groups_of(llama(), TOKENS, names).values()) == 4


@pytest.mark.parametrize(
    "make", [llama, lambda: GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50)).eval()]
)
def test_folding_leaves_the_output_unchanged(make):
    model = make()
    before = model(**TOKENS).logits
    names = [name for name in find_linears(model) if name != "lm_head"]
    for group in input_groups(model, TOKENS, names):
        if group.norm is None:
            continue
        scale = torch.rand(24) * 4 + 0.1
        fold(model, group.norm, scale)
        for name in group.names:
            layer = model.get_submodule(name)
            layer.weight.data *= scale if isinstance(layer, nn.Linear) else scale[:, None]
    torch.testing.assert_close(model(**TOKENS).logits, before, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    def __init__(self, forward, norm=None):
        super().__init__()
        self.norm, self.a, self.b = norm or nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


CASES = {
    "both": (lambda net, x: net.a(y := net.norm(x)) + net.b(y), "norm"),
    "its shape is looked at": (lambda net, x: net.a(y := net.norm(x)).view(y.shape) + net.b(y).view(y.size()), "norm"),
    "the residual": (lambda net, x: net.a(y := net.norm(x)) + net.b(y) + y, None),
    "in place": (lambda net, x: net.a(y := net.norm(x)) + net.b(y) + y.mul_(2), None),
    "returned": (lambda net, x: (net.a(y := net.norm(x)) + net.b(y), y), None),
    "returned in a mapping": (lambda net, x: {"o": net.a(y := net.norm(x)) + net.b(y), "h": [y]}, None),
    "called twice": (lambda net, x: net.a(y := net.norm(x)) + net.b(y) + net.norm(x + 1).sum(), None),
}  # fmt: skip


@pytest.mark.parametrize("forward, norm", CASES.values(), ids=CASES)
def test_everything_that_reads_the_norm_counts(forward, norm):
    (group,) = input_groups(Net(forward), torch.randn(3, 6), ["a", "b"])
    assert group.names == ("a", "b") and group.norm == norm


def test_layers_left_out_count_as_readers():
    both, _ = CASES["both"]
    (group,) = input_groups(Net(both), torch.randn(3, 6), ["a"])
    assert group.norm is None


@pytest.mark.parametrize("norm", [nn.PReLU(6), nn.BatchNorm1d(6, affine=False), nn.GroupNorm(2, 6), nn.BatchNorm1d(6)])
def test_whether_a_scale_can_be_folded_is_tried(norm):
    both, _ = CASES["both"]
    (group,) = input_groups(Net(both, norm), torch.randn(3, 6), ["a", "b"])
    assert group.norm == (None if isinstance(norm, nn.PReLU) or not norm.affine else "norm")


def test_a_norm_whose_weight_is_tied_is_left_alone():
    net = Net(CASES["both"][0])
    net.other = nn.LayerNorm(6)
    net.other.weight = net.norm.weight
    (group,) = input_groups(net, torch.randn(3, 6), ["a", "b"])
    assert group.norm is None


def test_a_layer_that_runs_twice():
    net = Net(lambda net, x: net.a(net.a(net.norm(x))) + net.b(x))
    groups = {group.names: (group.norm, group.calls) for group in input_groups(net, torch.randn(3, 6), ["a", "b"])}
    assert groups == {("a",): (None, 2), ("b",): (None, 1)}


def test_layers_that_are_not_reached():
    with pytest.raises(ValueError, match="does not reach b: leave them out"):
        input_groups(Net(lambda net, x: net.a(x)), torch.randn(3, 6), ["a", "b"])


def test_nothing_is_left_on_the_model():
    net = Net(CASES["both"][0]).train()
    input_groups(net, torch.randn(3, 6), ["a", "b"])
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(RuntimeError):
        input_groups(net, torch.randn(3, 5), ["a", "b"])
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
