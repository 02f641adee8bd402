"""BitFit: only the biases train, on any base, quantized or not.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
arXiv:2106.10199, section 3: every bias term (of the norms too) and the task's head; 0.08% to 0.09% of BERT's parameters.

    y = W·x + b,      W frozen, b trains

A bias in float32 trains where it is. That is not possible where

- bitsandbytes stores the weight: its forward casts the bias in place to the dtype it computes in, and in 16 bits the
  optimizer's small steps round away;
- the layer computes in 16 bits, and so takes a 16-bit bias;
- the layer has no bias, as in Llama.

There a `BiasLinear` takes the bias out and adds it itself. When training is over, `fold_biases` puts it back.

Axis legend: out, in = rows and columns of the weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qlab.adapters.add import LAYER_TYPES, _frozen, adapters_of
from qlab.adapters.bases import holds_codes
from qlab.models import find_linears, find_tied, replace
from qlab.nn import LINEAR_TYPES, shape_of, weight_of
from qlab.nn.weights import bitsandbytes_kind


class BiasLinear(nn.Module):
    """A frozen base layer without its bias (see `qlab.nn.Base`), and the bias, float32 or wider, which trains.

    Parameters
    ----------
    base : any layer that `weight_of` reads. Its bias is taken out of it and its other parameters are frozen. A bias of 32
        bits or more is kept as the Parameter it is, one of fewer is widened, and a missing one starts at 0.

    Raises TypeError for a base that has no weight to read or is a BiasLinear already.

    >>> layer = BiasLinear(nn.Linear(6, 4, bias=False, dtype=torch.bfloat16))
    >>> layer.bias.dtype, layer(torch.ones(2, 6, dtype=torch.bfloat16)).dtype
    (torch.float32, torch.bfloat16)
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        if isinstance(base, BiasLinear):
            raise TypeError("the base is a BiasLinear already: train the bias that is there")
        self.shape = shape_of(base)
        self.base = base.requires_grad_(False)
        self.bias = _wide(base).requires_grad_(True)
        base.bias = None

    def dequantized_weight(self) -> Tensor:
        """(out, in), weight units: the base's."""
        return weight_of(self.base)

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in). Returns (…, out) in the dtype that the base returns; the sum is rounded to it once."""
        # Conv1D adds a bias unasked, and fails without one
        y = functional.linear(x, weight_of(self.base)) if isinstance(self.base, Conv1D) else self.base(x)
        return (y + self.bias).to(y.dtype)

    def fold(self) -> nn.Module:
        """The base with the bias back in it, frozen: in the weight's dtype over float weights, as it is over quantized ones.

        This layer cannot be used any more.
        """
        bias = self.bias.detach()
        if isinstance(self.base, LINEAR_TYPES) and not bitsandbytes_kind(self.base):
            bias = bias.to(self.base.weight.dtype)
        self.base.bias = nn.Parameter(bias, requires_grad=False)
        return self.base

    def extra_repr(self) -> str:
        return f"{self.shape}"


@dataclass
class BitFitReport:
    """What `bitfit` did. `model` is the model given, or the new layer if the model itself was a single one.

    trained : name → the Parameter, every one that trains. wrapped : names of the layers that are a BiasLinear now.
    skipped : name → why a bias does not train. trainable, frozen : numbers, in the whole model; a weight counts as
        out · in however it is stored.
    """

    model: nn.Module
    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    wrapped: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    trainable: int = 0
    frozen: int = 0

    @property
    def share(self) -> float:
        """Part of the model's numbers that trains, 0 to 1."""
        return self.trainable / (self.trainable + self.frozen)

    def __str__(self) -> str:
        lines = [f"{'parameter':48} {'trains':>9}  dtype"]
        lines += [f"{name:48} {p.numel():9}  {str(p.dtype).removeprefix('torch.')}" for name, p in self.trained.items()]
        lines += [f"{name:48} stays frozen: {why}" for name, why in self.skipped.items()]
        lines.append(
            f"{len(self.wrapped)} layers wrapped: {self.trainable} numbers train ({self.share:.3%}), {self.frozen} are frozen"
        )
        return "\n".join(lines)


def bitfit(
    model: nn.Module, *, norms: bool = True, new_biases: bool = False, head: str | Iterable[str] = ()
) -> BitFitReport:
    """Train the biases of `model`, in place, and freeze every other parameter.

    Parameters
    ----------
    norms : biases of norms too, as in the paper. Their weights stay frozen.
    new_biases : linear layers without a bias get one, starting at 0; the output embedding of a transformers model does not.
    head : modules that train in full, in the dtype they have: full names, or ends of names from a dot on.

    A 16-bit bias outside linear layers would have to train in 16 bits: it stays frozen, and the report says so; convert
    such a module to float32 before, as PEFT's prepare_model_for_kbit_training does with norms. Called a second time, it
    wraps nothing twice.

    Raises, before anything is changed: ValueError for a model with adapters or without biases, and for a head that no
    module's name ends with, whose weights are codes, or that is tied to another module.
    """
    if adapters := adapters_of(model):
        raise ValueError(f"{len(adapters)} adapters stand on the layers ({', '.join(adapters)}): merge them first")
    heads = _heads(model, (head,) if isinstance(head, str) else tuple(head))
    to_wrap = _to_wrap(model, heads, new_biases)
    if not (to_wrap or heads or any(_is_bias(name) for name, _ in model.named_parameters())):
        raise ValueError(
            f"{type(model).__name__} has no biases: pass new_biases=True to give its linear layers some, starting at 0"
        )
    report = BitFitReport(model.requires_grad_(False))
    if to_wrap:
        result = replace(model, lambda name, _: name in to_wrap, lambda _, layer: BiasLinear(layer), types=LAYER_TYPES)
        report.model, report.wrapped = result.model, list(result.replaced)
        report.skipped = {name: f"its weight is tied to {', '.join(o)}" for name, o in result.skipped_tied.items()}
    _unfreeze(report, heads, norms)
    report.trainable = sum(parameter.numel() for parameter in report.trained.values())
    report.frozen = _frozen(report.model)
    return report


def fold_biases(model: nn.Module) -> nn.Module:
    """Replace every BiasLinear of `model`, in place, by its base with the trained bias in it. Returns the model.

    Over float weights of 16 bits the bias is rounded to them; bitsandbytes rounds it at its next 16-bit forward. Biases that
    trained where they are need no folding.
    """
    layers = find_linears(model, (BiasLinear,))
    if not layers:
        return model
    return replace(model, list(layers), lambda _, layer: layer.fold(), types=(BiasLinear,)).model


def _wide(base: nn.Module) -> nn.Parameter:
    """The bias of a layer, in 32 bits or more."""
    if base.bias is None:
        device = next(tensor.device for tensor in (*base.parameters(), *base.buffers()))
        return nn.Parameter(torch.zeros(shape_of(base)[0], device=device))
    if base.bias.dtype.itemsize >= 4:
        return base.bias
    return nn.Parameter(base.bias.detach().float())


def _heads(model: nn.Module, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Full names of the modules that `wanted` means."""
    names = [name for name, _ in model.named_modules() if name]
    heads = []
    for end in wanted:
        found = [name for name in names if name == end or name.endswith(f".{end}")]
        if not found:
            raise ValueError(f"head has {end!r}, which ends no module's name. They end with {', '.join(names[-5:])}")
        heads += found
    for head in heads:
        if codes := [
            name for name, module in model.get_submodule(head).named_modules(prefix=head) if holds_codes(module)
        ]:
            raise ValueError(f"the head {head!r} holds codes ({codes[0]}), which cannot train: leave it in float")
        for tied in find_tied(model):
            if any(_inside(name, (head,)) for name in tied):
                raise ValueError(
                    f"the head {head!r} shares {' = '.join(tied)}: training it changes both. Untie it first"
                )
    return tuple(heads)


def _inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _to_wrap(model: nn.Module, heads: tuple[str, ...], new_biases: bool) -> set[str]:
    """Names of the linear layers whose bias cannot train where it is."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    names = set()
    for name, layer in find_linears(model, LAYER_TYPES).items():
        if isinstance(layer, BiasLinear) or _inside(name, heads):
            continue
        if layer.bias is None:
            wrap = new_biases and layer is not output
        else:
            wrap = bitsandbytes_kind(layer) is not None or layer.bias.dtype.itemsize < 4
        names |= {name} if wrap else set()
    return names


def _is_bias(name: str) -> bool:
    """bias, and those of modules with several: in_proj_bias, bias_ih_l0."""
    own = name.rpartition(".")[2]
    return own == "bias" or own.endswith("_bias") or own.startswith("bias_")


def _unfreeze(report: BitFitReport, heads: tuple[str, ...], norms: bool) -> None:
    for name, parameter in report.model.named_parameters():
        owner = report.model.get_submodule(name.rpartition(".")[0])
        weight = getattr(owner, "weight", None)
        is_norm = not isinstance(owner, LAYER_TYPES) and weight is not None and weight.dim() == 1
        if not _inside(name, heads):
            if not _is_bias(name) or (is_norm and not norms) or name.rpartition(".")[0] in report.skipped:
                continue
            if parameter.dtype.itemsize < 4:
                report.skipped[name] = f"it is {parameter.dtype}, where small steps round away"
                continue
        report.trained[name] = parameter.requires_grad_(True)
