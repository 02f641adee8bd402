import copy
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlab.models import find_linears, find_tied, replace, untie


class Doubled(nn.Module):
    """A wrapper that keeps its layer, as an adapter does."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.extra = nn.Linear(1, 1)

    def forward(self, x):
        return 2 * self.base(x)


class Scaled(nn.Linear):
    """A replacement that is itself an nn.Linear by inheritance."""


def wrap(name, module):
    return Doubled(module)


def everything(name, module):
    return True


@pytest.mark.parametrize(
    ("architecture", "count", "kind"),
    [("qwen2", 15, nn.Linear), ("qwen2-tied", 15, nn.Linear), ("gpt2", 9, Conv1D), ("bert", 13, nn.Linear)],
)
def test_finds_every_linear_layer(tiny, architecture, count, kind):
    found = find_linears(tiny(architecture))
    assert len(found) == count
    assert sum(isinstance(module, kind) for module in found.values()) >= count - 1


def test_names_are_the_models_own_and_in_its_order(tiny):
    model = tiny("qwen2")
    expected = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = find_linears(model)
    assert list(found) == expected
    assert all(found[name] is model.get_submodule(name) for name in expected)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "bert"])
def test_identity_wrapping_leaves_the_output_alone_and_doubling_does_not(tiny, ids, architecture):
    model = tiny(architecture)
    before = model(ids)[0]

    class Same(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x)

    result = replace(copy.deepcopy(model), everything, lambda name, module: Same(module))
    assert torch.equal(result.model(ids)[0], before)
    last = list(find_linears(model))[-2]
    replace(model, last, wrap)
    assert not torch.allclose(model(ids)[0], before)


def test_a_model_that_is_a_linear_layer():
    layer = nn.Linear(3, 2)
    assert find_linears(layer) == {"": layer}
    result = replace(layer, "", wrap)
    assert isinstance(result.model, Doubled) and result.model.base is layer
    assert result.replaced == {"": result.model}


def test_names_without_a_dot_and_numeric_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.ModuleDict({"head": nn.Linear(3, 2)}))
    assert list(find_linears(model)) == ["0", "2.head"]
    replace(model, "0", wrap)
    assert isinstance(model[0], Doubled)


def test_a_shared_module_is_replaced_once_and_stays_shared():
    layer = nn.Linear(4, 4)
    block = nn.ModuleDict({"inner": layer})
    model = nn.ModuleDict({"a": block, "b": block, "c": layer, "d": nn.Linear(4, 4)})
    assert list(find_linears(model)) == ["a.inner", "d"]
    made = []
    result = replace(model, everything, lambda name, module: made.append(name) or Doubled(module))
    assert made == ["a.inner", "d"] and list(result.replaced) == made
    assert model["a"]["inner"] is model["b"]["inner"] is model["c"] is result.replaced["a.inner"]
    assert model["c"].base is layer
    assert find_tied(model) == []


def test_a_shared_module_can_be_named_by_any_of_its_names():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer})
    result = replace(model, "b", wrap)
    assert list(result.replaced) == ["a"] and isinstance(model["a"], Doubled) and model["a"] is model["b"]


def test_never_descends_into_a_replacement_and_never_wraps_twice(tiny):
    model = tiny("bert")
    count = len(replace(model, everything, wrap).replaced)
    assert find_linears(model) == {}
    with pytest.raises(ValueError, match=f"no layer is selected: 0 can be replaced .*{count} are replacements"):
        replace(model, everything, wrap)
    name = "encoder.layer.0.attention.self.query"
    with pytest.raises(ValueError, match="was already replaced"):
        replace(model, name, wrap)
    with pytest.raises(ValueError, match="inside a module that already replaced"):
        replace(model, f"{name}.base", wrap)
    assert find_linears(copy.deepcopy(model)) == {}


def test_a_replacement_that_inherits_from_linear_is_not_replaced_again():
    model = nn.Sequential(nn.Linear(3, 3))
    replace(model, "0", lambda name, module: Scaled(3, 3))
    assert find_linears(model) == {}


def test_a_plain_linear_put_back_is_an_ordinary_layer_again():
    model = nn.Sequential(nn.Linear(3, 3))
    replace(model, "0", lambda name, module: nn.Linear(3, 3))
    assert list(find_linears(model)) == ["0"]


def test_replacements_can_be_unwrapped_by_their_own_class(tiny, ids):
    model = tiny("qwen2")
    before = model(ids)[0]
    originals = find_linears(model)
    replace(model, everything, wrap)
    assert len(find_linears(model, types=(Doubled,))) == len(originals)
    replace(model, everything, lambda name, module: module.base, types=(Doubled,))
    assert find_linears(model) == originals and torch.equal(model(ids)[0], before)


def test_attention_out_proj_is_left_out_because_it_is_never_called():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert list(find_linears(layer)) == ["linear1", "linear2"]
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear"):
        replace(layer, "self_attn.out_proj", wrap)


def test_errors_name_what_is_close(tiny):
    model = tiny("qwen2")
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj"):
        replace(model, "model.layers.0.self_attn.q_prj", wrap)
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj"):
        replace(model, "q_proj", wrap)
    with pytest.raises(ValueError, match="'model.norm' is a Qwen2RMSNorm"):
        replace(model, "model.norm", wrap)
    with pytest.raises(ValueError, match="no layer is selected: 15 can be replaced"):
        replace(model, lambda name, module: False, wrap)
    with pytest.raises(ValueError, match="tied='keep'"):
        replace(model, everything, wrap, tied="keep")


def test_a_name_that_matches_nothing_leaves_the_model_alone(tiny):
    model = tiny("qwen2")
    with pytest.raises(ValueError, match="nope"):
        replace(model, ["lm_head", "nope"], wrap)
    assert isinstance(model.lm_head, nn.Linear)


def test_make_must_return_a_module_and_its_errors_say_where():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(TypeError, match="returned NoneType"):
        replace(model, "0", lambda name, module: None)

    def fails_on_1(name, module):
        if name == "1":
            raise RuntimeError("no")
        return Doubled(module)

    with pytest.raises(RuntimeError) as caught:
        replace(model, everything, fails_on_1)
    assert caught.value.__notes__ == ["while replacing '1'; already replaced: 0"]


def test_the_new_module_takes_the_mode_of_the_old_one():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    model[1].train()
    replace(model, everything, wrap)
    assert not model[0].training and not model[0].extra.training and model[1].training


def test_replaced_layers_are_freed_one_by_one():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    old = [weakref.ref(layer) for layer in model]
    alive = []

    def make(name, module):
        alive.append(sum(reference() is not None for reference in old))
        return nn.Linear(3, 3)

    replace(model, everything, make)
    assert alive == [3, 2, 1]


# tied weights


@pytest.mark.parametrize(
    ("architecture", "layer", "partner"),
    [
        ("qwen2-tied", "lm_head", "model.embed_tokens.weight"),
        ("gpt2", "lm_head", "transformer.wte.weight"),
        ("bert-mlm", "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_tied_layers_are_reported_and_skipped(tiny, architecture, layer, partner):
    model = tiny(architecture)
    assert any({f"{layer}.weight", partner} <= set(group) for group in find_tied(model))
    result = replace(model, everything, wrap)
    assert list(result.skipped_tied) == [layer] and partner in result.skipped_tied[layer]
    assert layer not in result.replaced and result.replaced
    assert model.get_submodule(layer).weight is model.get_parameter(partner)
    with pytest.raises(ValueError, match=partner):
        replace(tiny(architecture), [layer], wrap)


def test_naming_a_tied_layer_fails_before_anything_is_replaced(tiny):
    model = tiny("qwen2-tied")
    with pytest.raises(ValueError, match="shares its weight"):
        replace(model, ["model.layers.0.mlp.up_proj", "lm_head"], wrap)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def test_an_untied_model_has_no_ties(tiny):
    assert find_tied(tiny("qwen2")) == [] and find_tied(tiny("bert")) == []
    assert "lm_head" in replace(tiny("qwen2"), everything, wrap).replaced


@pytest.mark.parametrize("architecture", ["qwen2-tied", "gpt2"])
def test_untie_keeps_the_output_and_the_embedding(tiny, ids, architecture):
    model = tiny(architecture)
    before, embedding = model(ids).logits, model.get_input_embeddings().weight.clone()
    result = replace(model, "lm_head", wrap, tied="untie")
    assert result.skipped_tied == {} and find_tied(model) == []
    assert torch.equal(model(ids).logits, 2 * before)
    with torch.no_grad():
        model.lm_head.base.weight.zero_()
    assert torch.equal(model.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("architecture", ["qwen2-tied", "gpt2"])
def test_an_untied_head_survives_tie_weights_and_save_and_reload(tiny, ids, tmp_path, architecture):
    model = tiny(architecture)
    untie(model, "lm_head")
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    expected = model(ids).logits
    model.tie_weights()
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(ids).logits, expected)


def test_untie_of_a_masked_lm_head_with_its_bias(tiny, ids, tmp_path):
    model = tiny("bert-mlm")
    before = model(ids).logits
    untie(model, "cls.predictions.decoder")
    assert find_tied(model) == []
    with torch.no_grad():
        model.cls.predictions.decoder.bias.add_(1)
    assert torch.allclose(model(ids).logits, before + 1)
    model.tie_weights()
    assert torch.allclose(model(ids).logits, before + 1)


def test_untie_inside_a_peft_model(tiny, ids):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("qwen2-tied"), LoraConfig(target_modules=["q_proj"]))
    before = model(ids).logits
    untie(model, "base_model.model.lm_head")
    assert not model.config.tie_word_embeddings and find_tied(model) == []
    model.base_model.model.tie_weights()
    assert find_tied(model) == [] and torch.equal(model(ids).logits, before)


def test_untie_keeps_requires_grad(tiny):
    model = tiny("qwen2-tied")
    model.requires_grad_(False)
    untie(model, "lm_head")
    assert not model.lm_head.weight.requires_grad


def test_two_linear_layers_with_one_weight():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert find_tied(model) == [("0.weight", "1.weight")]
    assert list(replace(model, everything, wrap).skipped_tied) == ["0", "1"]
    result = replace(model, everything, wrap, tied="untie")
    assert list(result.replaced) == ["0", "1"] and find_tied(model) == []


def test_untie_refuses_when_the_config_flag_ties_other_layers_too(tiny):
    model = tiny("qwen2-tied")
    model.second_head = nn.Linear(32, 40, bias=False)
    model.second_head.weight = model.lm_head.weight
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, "second_head.weight": "model.embed_tokens.weight"}
    with pytest.raises(ValueError, match="second_head.weight"):
        untie(model, "lm_head")
    assert model.config.tie_word_embeddings
