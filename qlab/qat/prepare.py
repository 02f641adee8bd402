"""prepare_qat, training, convert: from a float model to one that computes with its codes, and on to one that stores them.

    report = prepare_qat(model, IntAffine(2, granularity="channel"), "lsq")        linear layers become QATLinear
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1e-5))    or trainable_parameters(model)
    … loss.backward(); optimizer.step(); constrain_weights(model) …                  the caller's own loop
    report = convert(model.eval())                                                 QATLinear become QuantLinear

Layers are taken as in `quantize_model`: all linear ones but the output head of a language model and tied ones.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qlab import models
from qlab.formats import Format
from qlab.models import find_linears, trainable_parameters, weight_of
from qlab.ptq.quantize import LayerReport, Report, formats_of
from qlab.qat.binary_connect import BinaryConnect
from qlab.qat.fake_quant import FakeQuant
from qlab.qat.lsq import LSQ
from qlab.qat.qat_linear import QATLinear, master_weight
from qlab.qat.xnor_net import XNORWeights

Maker = Callable[[Format, Tensor], FakeQuant]

METHODS: dict[str, Maker] = {
    "ste": FakeQuant,
    "frozen": lambda fmt, w: FakeQuant(fmt, w, grid="frozen"),
    "learned": lambda fmt, w: FakeQuant(fmt, w, grid="learned"),
    "lsq": lambda fmt, w: LSQ(fmt, w, learn_zero_point=not getattr(fmt, "symmetric", True)),
    "binaryconnect": BinaryConnect,
    "binaryconnect-stochastic": lambda fmt, w: BinaryConnect(fmt, w, stochastic=True),
    "xnor": XNORWeights,
}
TRAINED = ("all", "layers", "grids")


@dataclass
class QATReport:
    """What `prepare_qat` did. `model` is the model given, or the new layer if the model itself was a single one.

    trainable, frozen : numbers in the whole model, each Parameter once.
    """

    model: nn.Module
    layers: dict[str, QATLinear] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)  # linear layers that were not replaced → why
    trainable: int = 0
    frozen: int = 0

    def __str__(self) -> str:
        lines = [f"{'layer':40} {'(out, in)':>14}  weights; activations"]
        for name, layer in self.layers.items():
            quant = layer.weight_quant
            lines.append(
                f"{name:40} {layer.shape!s:>14}  {type(quant).__name__}({quant.extra_repr()}); {layer.activations}"
            )
        lines += [f"{name:40} left as it was: {why}" for name, why in self.left.items()]
        return "\n".join(
            [*lines, f"{len(self.layers)} layers; {self.trainable} numbers train, {self.frozen} are frozen"]
        )


def prepare_qat(
    model: nn.Module,
    fmt: Format | Mapping[str, Format | None],
    method: str | Maker = "ste",
    *,
    activations: nn.Module | None = None,
    select: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    train: str = "all",
) -> QATReport:
    """Replace linear layers of `model`, in place, by QATLinear.

    Parameters
    ----------
    fmt : the format of every weight; or layer name → format, None for a layer to leave alone.
    method : a name out of `qlab.qat.METHODS`, or a function (format, weight) → FakeQuant.
        "ste": the grid follows the weights · "frozen": it stays where it started · "learned": its params are Parameters, any
        format · "lsq": learned steps (integer formats; with a zero point, if the format has one, LSQ+) · "binaryconnect",
        "binaryconnect-stochastic": Binary("tensor") · "xnor": Binary(), and signs of inputs unless `activations` says more.
    activations : how inputs are quantized, copied for each layer: FakeActivations, LSQActivations, PACT, ActQuant; None: not.
    select : full layer names, or a predicate (name, module) → bool.
    train : "all": every Parameter that required a gradient before, and the grids · "layers": weights, biases and grids of
        the replaced layers, earlier ones included · "grids": learned scales, zero points, levels and clipping levels alone,
        all weights frozen.

    A shared layer is replaced once and stays shared. Layers that are QATLinear already are left as they are.

    Raises, before anything is changed: ValueError for unknown names, a pair of method and format that cannot be, a format
    that does not fit a layer's shape, and nothing to train; TypeError for a layer without trainable weights.
    """
    make = _maker(method)
    if train not in TRAINED:
        raise ValueError(f"train must be one of {', '.join(TRAINED)}, got {train!r}")
    if activations is None and getattr(make, "inputs", None):
        activations = make.inputs()
    formats, left = formats_of(model, fmt, select)
    layers = find_linears(model)
    made = {name: _made(name, layers[name], make, own, activations) for name, own in formats.items()}
    prepared = [*layers_of(model).values(), *made.values()]
    if train == "grids" and not any(map(_grid_parameters, prepared)):
        raise ValueError(f"train='grids' with method={method!r} leaves nothing to train: its grids are not learned")
    result = models.replace(model, list(made), lambda name, _: made[name])
    _set_trained(result.model, prepared, train)
    counts = {True: 0, False: 0}
    for parameter in result.model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return QATReport(result.model, result.replaced, left, counts[True], counts[False])


def grid_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned grids that require a gradient (scales, zero points, levels, clipping levels), each once."""
    found = {id(p): p for layer in layers_of(model).values() for p in _grid_parameters(layer) if p.requires_grad}
    return list(found.values())


def parameter_groups(model: nn.Module, lr: float, grid_lr: float, weight_decay: float = 0.0) -> list[dict]:
    """`trainable_parameters` as an optimizer's two groups: weights with lr, grids with grid_lr and no weight decay.

    Adam moves each number by about its learning rate, however small the gradient. A step of 8-bit weights is a
    hundredth of the weights themselves: at their learning rate it is soon below 0.
    """
    grids = grid_parameters(model)
    own = {id(p) for p in grids}
    weights = [p for p in trainable_parameters(model) if id(p) not in own]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": grids, "lr": grid_lr, "weight_decay": 0.0},
    ]


@torch.no_grad()
def constrain_weights(model: nn.Module) -> None:
    """After each optimizer step: put the real weights where their method keeps them (BinaryConnect: ±H; XNOR-Net: centred
    and within ±1). Weights of the other methods, and frozen ones, are left alone."""
    for layer in layers_of(model).values():
        if layer.weight.requires_grad:
            layer.weight_quant.constrain(layer.weight)


def layers_of(model: nn.Module) -> dict[str, QATLinear]:
    """name → QATLinear, in the model's own order, a shared one under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QATLinear)}


def convert(model: nn.Module) -> Report:
    """Replace every QATLinear of `model`, in place, by the QuantLinear that stores what it computes in eval mode.

    Equal to the bit where x has the dtype of training. Biases stay the Parameters that they are. The report is that of
    `quantize_model`; weight_error is against the real weights. Memory: codes of all layers beside the float ones, for a while.

    Raises ValueError, naming the layer, before anything is changed: where there is no QATLinear, and where activations cannot
    be stored.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError("there is no QATLinear in this model: call prepare_qat first")
    made, reports = {}, {}
    for name, layer in layers.items():
        try:
            made[name] = layer.quant_linear()
        except (TypeError, ValueError, RuntimeError) as error:
            error.add_note(f"while converting the layer {name!r}. Nothing was changed")
            raise
        reports[name] = _layer_report(made[name], layer.weight.detach())
    result = models.replace(model, list(made), lambda name, _: made[name], types=(QATLinear,))
    left = {name: "not prepared" for name in find_linears(result.model)}
    return Report(result.model, reports, left)


def _layer_report(layer, w: Tensor) -> LayerReport:
    error = float((weight_of(layer).to(w.dtype) - w).norm() / w.norm())
    nbytes = sum(buffer.nbytes for buffer in layer.buffers())
    return LayerReport(layer.format, nbytes, 8 * nbytes / w.numel(), error, math.nan, "")


def _maker(method: str | Maker) -> Maker:
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(
            f"no method is named {method!r}: use one of {', '.join(METHODS)}, or (format, weight) → FakeQuant"
        )
    return METHODS[method] if isinstance(method, str) else method


def _made(name: str, linear: nn.Module, make: Maker, fmt: Format, activations: nn.Module | None) -> QATLinear:
    try:
        quant = make(fmt, master_weight(linear).detach())
        own = None if activations is None else copy.deepcopy(activations).to(linear.weight.device)
        return QATLinear(linear, quant, own)
    except (TypeError, ValueError) as error:
        error.add_note(
            f"for the layer {name!r}: give it another format, or leave it out by `select`. Nothing was changed"
        )
        raise


def _grid_parameters(layer: QATLinear) -> list[nn.Parameter]:
    return [p for part in (layer.weight_quant, layer.activations) if part is not None for p in part.parameters()]


def _set_trained(model: nn.Module, layers: list[QATLinear], train: str) -> None:
    if train == "all":
        return
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers:
        for parameter in layer.parameters() if train == "layers" else _grid_parameters(layer):
            parameter.requires_grad_(True)
