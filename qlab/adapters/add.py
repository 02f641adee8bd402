"""add_adapters: put adapters on the layers of a model, in PEFT's terms, and freeze everything else.

Which layers: as in PEFT's LoraConfig. Names are those of `model.named_modules()`, a shared module under its first.

    target_modules = ["q_proj", "v_proj"]     full names, or ends of names from a dot on
    target_modules = ".*mlp.*_proj"           one regular expression for whole names (re.fullmatch)
    target_modules = "all-linear"             every linear layer but the output embedding of a transformers model
    rank_pattern = {"layers.0.q_proj": 4}     r for names that end so, from a dot on; keys are regular expressions, first match
"""

import difflib
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from qlab.adapters.lora import LoRALinear
from qlab.adapters.qalora import QALoRALinear
from qlab.adapters.qat_lora import QATLoRALinear
from qlab.models import find_linears, find_tied, replace, trainable_parameters, untie
from qlab.nn import LINEAR_TYPES, Base, shape_of

KINDS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "qalora": QALoRALinear, "qat": QATLoRALinear}
LAYER_TYPES = (*LINEAR_TYPES, Base)  # LoRALinear is a Base too: adapters are found, and refused, as what they are


@dataclass
class AdapterReport:
    """What `add_adapters` did. `model` is the model given, or the new layer if the model itself was a single one.

    added : name → the new layer. skipped : name → why a layer that "all-linear" means has none.
    trainable, frozen : numbers, in the whole model; a weight counts as out · in however it is stored.
    """

    model: nn.Module
    added: dict[str, LoRALinear] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    trainable: int = 0
    frozen: int = 0

    def __str__(self) -> str:
        lines = [f"{'layer':40} {'(out, in)':>14} {'r':>4} {'scaling':>8} {'trains':>9} {'frozen':>10}  base"]
        for name, layer in self.added.items():
            trains = sum(parameter.numel() for parameter in layer.adapter_parameters())
            frozen, kind = _frozen(layer.base), getattr(layer.base, "format", type(layer.base).__name__)
            lines.append(
                f"{name:40} {layer.shape!s:>14} {layer.r:4} {layer.scaling:8.4g} {trains:9} {frozen:10}  {kind}"
            )
        lines += [f"{name:40} no adapter: {why}" for name, why in self.skipped.items()]
        share = self.trainable / (self.trainable + self.frozen)
        lines.append(
            f"{len(self.added)} adapters: {self.trainable} numbers train ({share:.2%}), {self.frozen} are frozen"
        )
        return "\n".join(lines)


def add_adapters(
    model: nn.Module,
    kind: str = "lora",
    r: int = 8,
    lora_alpha: float = 16,
    target_modules: str | Iterable[str] = "all-linear",
    exclude_modules: str | Iterable[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    *,
    tied: str = "skip",
    **settings,
) -> AdapterReport:
    """Wrap the layers that `target_modules` means, in place, and freeze every parameter that is not an adapter's.

    Parameters
    ----------
    kind : "lora" | "qalora" | "qat".
    target_modules, exclude_modules : see above; what is excluded is never a target.
    rank_pattern, alpha_pattern : r and lora_alpha of single layers; the others get `r` and `lora_alpha`.
    tied : layers whose weight belongs to another module too (lm_head and the embedding): "skip" refuses to adapt one that
        `target_modules` names, because a merge would change both, and leaves it out of "all-linear"; "untie" gives it its own
        copy of the weight first.
    settings : for each layer: lora_dropout, use_rslora, dtype; pooling of QALoRALinear; fmt, school and method of QATLoRALinear,
        whose learned grids train too (`qlab.qat.parameter_groups(model, lr, grid_lr)` gives them a learning rate of their own).

    Adapters that the model has already are left as they are. As in PEFT without a task_type, "all-linear" means a
    classification head too: exclude and unfreeze it where it is to train in full. Unlike in PEFT, a shared layer gets its one adapter
    everywhere it is used, and names that match nothing are refused.

    Raises, before any layer is wrapped: ValueError for targets that do not exist, are no linear layers or have an adapter,
    for patterns that decide for no target, and for settings and formats that an adapter refuses; TypeError for a base that
    it cannot read.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    targets = _targets(model, target_modules, _listed("exclude_modules", exclude_modules))
    ranks = _by_pattern("rank_pattern", rank_pattern or {}, targets, r)
    alphas = _by_pattern("alpha_pattern", alpha_pattern or {}, targets, lora_alpha)
    required_grad = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        made = {name: _made(KINDS[kind], name, base, ranks, alphas, settings) for name, base in targets.items()}
        everything = isinstance(target_modules, str) and _is_all_linear(target_modules)
        select = (lambda name, _: name in made) if everything else list(made)
        for name in _untie(model, made) if tied == "untie" else ():
            made[name] = _made(KINDS[kind], name, targets[name], ranks, alphas, settings)  # over its own weight
        result = replace(model, select, lambda name, _: made[name], tied=tied, types=LAYER_TYPES)
        if not result.replaced:
            raise ValueError(
                f'every target is tied to another module ({", ".join(made)}): pass tied="untie" to adapt it'
            )
    except Exception:
        for parameter in required_grad:
            parameter.requires_grad_(True)
        raise
    skipped = {name: f"its weight is tied to {', '.join(others)}" for name, others in result.skipped_tied.items()}
    _freeze(result.model)
    trainable = sum(parameter.numel() for parameter in trainable_parameters(result.model))
    return AdapterReport(result.model, result.replaced, skipped, trainable, _frozen(result.model))


def adapters_of(model: nn.Module) -> dict[str, LoRALinear]:
    """name → adapter, in the model's own order, a shared one under its first name. A QALoRALinear is a LoRALinear."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _is_all_linear(target_modules: str) -> bool:
    return target_modules.lower() == "all-linear"


def _listed(argument: str, names: str | Iterable[str]) -> str | tuple[str, ...]:
    """A regular expression as it is, anything else as a tuple of names."""
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ValueError(
                f"{argument}={names!r} is no regular expression: {error}. Ends of names are given as a list"
            ) from error
        return names
    names = tuple(names)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"{argument} is a regular expression or a list of names, got {wrong[0]!r} in it")
    return names


def _matches(name: str, wanted: str | tuple[str, ...]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _targets(model: nn.Module, target_modules, excluded) -> dict[str, nn.Module]:
    """Name → layer to wrap, in the model's own order; raises for what is not one."""
    _refuse_peft(model)
    layers = find_linears(model, LAYER_TYPES)
    if isinstance(target_modules, str) and _is_all_linear(target_modules):
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found = {name: layer for name, layer in layers.items() if layer is not head and not _matches(name, excluded)}
    else:
        found = _named_targets(model, _listed("target_modules", target_modules), excluded, layers)
    if not found:
        raise ValueError(
            f"target_modules={target_modules!r} means no layer (exclude_modules={excluded!r}); the model has "
            f"{', '.join(layers) or 'no linear layers'}"
        )
    if wrapped := [name for name, layer in found.items() if isinstance(layer, LoRALinear)]:
        raise ValueError(
            f"{len(wrapped)} of {len(found)} target layers have an adapter already ({', '.join(wrapped[:3])}): train that "
            "one, merge it first, or leave them out by exclude_modules. Nothing was changed"
        )
    return found


def _named_targets(model, wanted, excluded, layers) -> dict[str, nn.Module]:
    inside = tuple(f"{name}." for name in layers)
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    for end in () if isinstance(wanted, str) else wanted:
        if not any(_matches(name, (end,)) for name in names):
            close = (
                difflib.get_close_matches(end, {name.rpartition(".")[2] for name in layers}, n=3) or list(layers)[:3]
            )
            raise ValueError(f"target_modules has {end!r}, which ends no module's name. Close: {', '.join(close)}")
    names = [name for name in names if _matches(name, wanted) and not _matches(name, excluded)]
    if others := [name for name in names if name not in layers]:
        raise ValueError(
            f"target_modules={wanted!r} means {others[0]!r}, of class {type(model.get_submodule(others[0])).__name__}; adapters "
            "stand on linear layers that are called as such: name those, or leave it out by exclude_modules"
        )
    return {name: layers[name] for name in names}


def _refuse_peft(model: nn.Module) -> None:
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # not imported: then no module can be of its classes
    for name, module in model.named_modules() if tuners else ():
        if isinstance(module, tuners.BaseTunerLayer):
            raise ValueError(f"{name!r} has an adapter of PEFT's already: merge_and_unload() it, or go on with PEFT")


def _by_pattern(argument: str, patterns: Mapping, names: Iterable[str], default) -> dict:
    """Name → value of the first pattern that matches it, as PEFT matches them."""
    values, used = {}, set()
    for name in names:
        first = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)
        used.add(first)
        values[name] = default if first is None else patterns[first]
    if unused := [pattern for pattern in patterns if pattern not in used]:
        raise ValueError(
            f"{argument} has {unused[0]!r}, which decides for no target layer. They are {', '.join(values)}, and the first "
            "pattern that matches a name decides"
        )
    return values


def _made(kind: type[LoRALinear], name: str, base: nn.Module, ranks, alphas, settings) -> LoRALinear:
    try:
        return kind(base, ranks[name], alphas[name], **settings)
    except Exception as error:
        error.add_note(f"for the layer {name!r}. Nothing was changed")
        raise


def _untie(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names` that were tied, and have their own weight now."""
    tied = {name.rpartition(".")[0] for group in find_tied(model) for name in group}
    untied = [name for name in names if name in tied]
    for name in untied:
        untie(model, name)
    return untied


def _freeze(model: nn.Module) -> None:
    adapters = {id(p) for layer in adapters_of(model).values() for p in layer.adapter_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)


def _frozen(model: nn.Module) -> int:
    """How many numbers do not train, tied and shared ones once."""
    sizes = {}
    for module in model.modules():
        sizes |= {id(p): p.numel() for p in module.parameters(recurse=False) if not p.requires_grad}
        if (
            isinstance(module, LAYER_TYPES) and "base" not in module._modules
        ):  # what wraps a base has no weight of its own
            weight = module._parameters.get("weight")
            if weight is None or not weight.requires_grad:
                sizes[id(module if weight is None else weight)] = math.prod(shape_of(module))  # packed codes are fewer
    return sum(sizes.values())
