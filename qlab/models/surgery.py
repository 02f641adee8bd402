"""Find the linear layers of a model and replace them.

Linear layers are `nn.Linear` and its subclasses (bitsandbytes' `Linear4bit` and `Linear8bitLt` among them)
and transformers' `Conv1D` (GPT-2), which stores its weight as (in, out). `out_proj` of
`nn.MultiheadAttention` is left out: the attention reads its weight directly and never calls it, so a
replacement there would not run.

Shared modules: a module that is reachable under several names is listed under its first name, replaced once,
and stays shared. Tied weights: a layer whose Parameter also belongs to another module (lm_head and the
embedding of many language models) is skipped when a predicate selects it and refused when it is named,
because its replacement would be lost at the next save and reload, or would change the embedding too.
`tied="untie"` first gives the layer its own copy.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qlab.nn.weights import LINEAR_TYPES, is_plain_linear

_MARK = "_qlab_replacement"  # an instance attribute, so that it survives deepcopy and pickling


@dataclass
class Replacement:
    """What `replace` did. `model` is the model given, or the new module if the model itself was the layer."""

    model: nn.Module
    replaced: dict[str, nn.Module] = field(default_factory=dict)  # name → the new module
    skipped_tied: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name → parameters it is tied to


def find_linears(model: nn.Module, types: tuple[type, ...] = LINEAR_TYPES) -> dict[str, nn.Module]:
    """name → layer, in the model's own order, for every layer of the given `types`.

    A model that is itself such a layer is found under the name "". Nothing inside a module that `replace` put
    there is found, and that module itself only if `types` names its own class (to unwrap or merge it).
    """
    return {name: module for name, (module, _) in _places(model, types).items()}


def find_tied(model: nn.Module) -> list[tuple[str, ...]]:
    """Groups of parameter names under which one Parameter belongs to several modules.

    A module that is itself shared is no tie: its parameters have one owner.
    """
    return [tuple(names) for names in _owners(model).values() if len(names) > 1]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The Parameters that require a gradient, each once: what an optimizer of this model takes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def replace(
    model: nn.Module,
    select: str | Iterable[str] | Callable[[str, nn.Module], bool],
    make: Callable[[str, nn.Module], nn.Module],
    *,
    tied: str = "skip",
    types: tuple[type, ...] = LINEAR_TYPES,
) -> Replacement:
    """Replace the selected layers of `model` in place by `make(name, module)`.

    select: a full layer name, several of them, or a predicate `(name, module) → bool`.
    make: returns the new module; it may hold the old one (an adapter) or not (a quantized layer).
    tied: "skip" leaves tied layers alone and reports them in `.skipped_tied` (naming a tied layer is an
        error); "untie" calls `untie` on them first.
    The new module takes the train or eval mode of the old one. Layers are replaced one by one, so that the
    old one can be freed: if `make` raises, a note on the error lists what was already replaced.

    Raises ValueError for a name that matches no layer (with close matches) and when nothing at all is
    selected, TypeError when `make` returns no module.
    """
    if tied not in ("skip", "untie"):
        raise ValueError(f'tied={tied!r}: use "skip" or "untie"')
    layers = _places(model, types)  # before the first replacement, so that none is found inside a new wrapper
    names = _selected(model, layers, select)
    owners = _owners(model)
    partners = {name: _tied_to(owners, name, layers[name][0]) for name in names}
    result = Replacement(model)
    if tied == "skip":
        result.skipped_tied = {name: others for name, others in partners.items() if others}
        if result.skipped_tied and not callable(select):
            name, others = next(iter(result.skipped_tied.items()))
            raise ValueError(
                f"{name!r} shares its weight with {', '.join(others)}. Its replacement would be lost at the next "
                'save, or change both: leave it out, or pass tied="untie" to give it its own copy first'
            )
    for name in names:
        old, places = layers.pop(name)
        if name in result.skipped_tied:
            continue
        if partners[name]:
            untie(model, name)
        new = _made(make, name, old, result)
        for parent, child in places:
            if parent is None:
                result.model = new
            else:
                setattr(parent, child, new)
        result.replaced[name] = new
    return result


def untie(model: nn.Module, name: str) -> None:
    """Give the layer `name` its own copy of every Parameter that another module holds too.

    In a transformers model this also sets `config.tie_word_embeddings = False`, so that saving, reloading and
    `tie_weights()` keep the copy. Raises ValueError if that flag ties parameters of other layers as well.
    """
    layer = model.get_submodule(name)
    own = {id(parameter) for parameter in layer.parameters(recurse=False)}
    for part in model.modules():
        declared = vars(part).get("all_tied_weights_keys")  # transformers models: {target name: source name}
        if not declared or not part.config.tie_word_embeddings:
            continue
        if own.isdisjoint(id(part.get_parameter(source)) for source in declared.values()):
            continue
        others = sorted(key for key in declared if part.get_submodule(key.rpartition(".")[0]) is not layer)
        if others:
            raise ValueError(f"cannot untie {name!r} alone: config.tie_word_embeddings also ties {', '.join(others)}")
        part.config.tie_word_embeddings = False
        part.all_tied_weights_keys = {}
    owners = _owners(model)
    for parameter_name, parameter in list(layer.named_parameters(recurse=False)):
        if len(owners[id(parameter)]) > 1:
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(layer, parameter_name, copy)


def _walk(model, types):
    """(name, module, parent) of every match, a shared module once per name; replacements are not entered."""
    pending = [("", model, None)]
    while pending:
        name, module, parent = pending.pop()
        if module is None:  # a child slot that is declared and left empty
            continue
        if _matches(module, types):
            yield name, module, parent
        elif _MARK not in vars(module):
            prefix = f"{name}." if name else ""
            children = [(prefix + child, inner, module) for child, inner in module._modules.items()]
            pending.extend(reversed(children))


def _places(model, types):
    """First name of a layer → (layer, every (parent, child name) that holds it)."""
    layers, first_names = {}, {}
    for name, module, parent in _walk(model, types):
        first = first_names.setdefault(id(module), name)
        layers.setdefault(first, (module, []))[1].append((parent, name.rpartition(".")[2]))
    return layers


def _matches(module, types):
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    wanted = tuple(t for t in types if not (_MARK in vars(module) and t in LINEAR_TYPES))
    return isinstance(module, wanted)


def _owners(model):
    """id of a Parameter → the names under which modules hold it, each module once."""
    owners = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _tied_to(owners, name, layer):
    """The names that other modules have for the Parameters of `layer`."""
    names = [other for parameter in layer.parameters(recurse=False) for other in owners[id(parameter)]]
    return tuple(other for other in names if other.rpartition(".")[0] != name)


def _selected(model, layers, select):
    """First names of the selected layers, in the model's order."""
    if callable(select):
        chosen = {name for name, (module, _) in layers.items() if select(name, module)}
    else:
        by_name = dict(model.named_modules(remove_duplicate=False))  # a shared module under each of its names
        first = {id(module): name for name, (module, _) in layers.items()}
        chosen = set()
        for name in [select] if isinstance(select, str) else select:
            if name not in by_name or id(by_name[name]) not in first:
                raise ValueError(_no_such_layer(by_name, layers, name))
            chosen.add(first[id(by_name[name])])
    if not chosen:
        marked = [name for name, module in model.named_modules() if _MARK in vars(module)]
        raise ValueError(
            f"no layer is selected: {len(layers)} can be replaced ({', '.join(list(layers)[:5]) or 'none'}), "
            f"{len(marked)} are replacements already ({', '.join(marked[:5]) or 'none'})"
        )
    return [name for name in layers if name in chosen]


def _no_such_layer(by_name, layers, name):
    if name in by_name:
        above = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
        if _MARK in vars(by_name[name]):
            why = "was already replaced"
        elif any(_MARK in vars(by_name[upper]) for upper in above):
            why = "is inside a module that already replaced a layer"
        else:
            why = "is not one of the layers to replace"
        return f"{name!r} is a {type(by_name[name]).__name__} and {why}"
    same_end = [known for known in layers if known.rpartition(".")[2] == name.rpartition(".")[2]]
    close = difflib.get_close_matches(name, layers, n=3) or same_end[:3] or list(layers)[:3]
    return f"no layer is named {name!r}. Close: {', '.join(map(repr, close)) or 'the model has no such layers'}"


def _made(make, name, old, result):
    try:
        new = make(name, old)
        if not isinstance(new, nn.Module):
            raise TypeError(f"make({name!r}, module) returned {type(new).__name__}, not a torch.nn.Module")
    except Exception as error:
        error.add_note(f"while replacing {name!r}; already replaced: {', '.join(result.replaced) or 'nothing'}")
        raise
    new.train(old.training)
    if new is not old and not is_plain_linear(new):
        setattr(new, _MARK, True)
    return new
