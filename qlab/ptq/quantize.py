"""quantize_model: any format, any method, layer by layer.

Layers are taken in the order in which the model runs them, those that share an input together. The statistics of an input
are gathered when its layers' turn has come, so that they are of the model as quantized so far (later layers see the errors
of earlier ones, as in GPTQ's own code) and only one input's statistics are in memory. The price is one forward of the
calibration data, as far as that layer, for every input.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qlab import models
from qlab.calibrate import InputStats, MinMax, Observer, capture, observe_inputs, output_error
from qlab.formats import Format
from qlab.models import find_linears, find_tied, shape_of, weight_of
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq.awq import AWQ
from qlab.ptq.gptq import GPTQ
from qlab.ptq.hqq import HQQ
from qlab.ptq.llm_int8 import LLMInt8
from qlab.ptq.method import RTN, Method
from qlab.ptq.smoothquant import SmoothQuant
from qlab.ptq.transform import InputGroup, fold, input_groups
from qlab.ptq.xnor import XNOR

METHODS: dict[str, Callable[[], Method]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "awq+gptq": lambda: AWQ(codes=GPTQ()),
    "hqq": HQQ,
    "smoothquant": SmoothQuant,
    "llm.int8": LLMInt8,
    "xnor": XNOR,
}


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    nbytes, bits_per_weight : codes, params, input_scale, g_idx and static activation ranges counted; the bias is not.
    weight_error : ‖W' − W‖ / ‖W‖, of the weight as it acts on the layer's own input.
    output_error : root mean square of the error of the outputs over that of the outputs, on the calibration data, weights
        alone rounded. NaN where the method asked for no Hessian.
    scale : where the transform of the layer's input went: "folded into <norm>", "input_scale", or "" without one.
    """

    format: Format
    nbytes: int
    bits_per_weight: float
    weight_error: float
    output_error: float
    scale: str


@dataclass
class Report:
    """What `quantize_model` did. `model` is the model given, or the new layer if the model itself was a single one."""

    model: nn.Module
    layers: dict[str, LayerReport] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)  # linear layers that were not quantized → why

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Of all quantized layers together."""
        weights = sum(8 * layer.nbytes / layer.bits_per_weight for layer in self.layers.values())
        return 8 * self.nbytes / weights

    def __str__(self) -> str:
        lines = [f"{'layer':40} {'bits/weight':>11} {'weight error':>12} {'output error':>12}  format"]
        for name, layer in self.layers.items():
            output = "" if math.isnan(layer.output_error) else f"{layer.output_error:.4f}"
            lines.append(
                f"{name:40} {layer.bits_per_weight:11.3f} {layer.weight_error:12.4f} {output:>12}  {layer.format}"
                f"{', ' * bool(layer.scale)}{layer.scale}"
            )
        lines += [f"{name:40} left as it was: {why}" for name, why in self.left.items()]
        return "\n".join(
            [*lines, f"{len(self.layers)} layers, {self.nbytes} bytes, {self.bits_per_weight:.3f} bits a weight"]
        )


def quantize_model(
    model: nn.Module,
    fmt: Format | Mapping[str, Format | None],
    method: "str | Method" = "rtn",
    calibration: Iterable | None = None,
    *,
    select: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    activations: ActQuant | None = None,
    observer: Callable[[], Observer] = MinMax,
    progress: bool = True,
) -> Report:
    """Replace linear layers of `model`, in place, by QuantLinear.

    Parameters
    ----------
    fmt : the format of every weight; or layer name → format, None for a layer to leave alone (mixed precision).
    method : a name out of `qlab.ptq.METHODS`, or a Method with settings of its own: GPTQ(act_order=True), ZeroQ(shape), …
    calibration : batches as `qlab.calibrate.capture` takes them; a few dozen texts. Needed where the method asks for
        statistics and where activations have a static range.
    select : full layer names, or a predicate (name, module) → bool. None: every linear layer but the output head of a
        language model and layers whose weight is tied to another module.
    activations : how inputs are quantized, copied for each layer; None: as the method says (most: not at all).
    observer : makes the range observer of a static input.
    progress : show a progress bar.

    Raises ValueError before anything is changed for an unknown method, a pair of method and format that cannot be, a format
    that does not fit a layer's shape, missing calibration data and layers that it does not reach; TypeError for something
    else than a format. Where it fails later (NaN in a weight), a note on the error lists what was already replaced.
    """
    method = _method(method)
    formats, left = formats_of(model, fmt, select)
    _check(model, method, formats)
    activations = activations or method.activations
    batches = method.batches(model, None if calibration is None else list(calibration))
    asks = bool(method.keep) or (activations is not None and activations.static)
    if asks and not batches:
        raise ValueError(f"{method} needs calibration data: pass calibration=[batch, …], a few dozen texts")
    groups = input_groups(model, batches[0], formats) if asks else [InputGroup((name,)) for name in formats]
    report = Report(model, left=left)
    with tqdm(total=len(formats), desc=type(method).__name__, unit="layer", disable=not progress) as bar:
        for group in groups:
            try:
                _quantize_group(report, method, group, formats, batches, activations, observer)
            except Exception as error:
                error.add_note(
                    f"while quantizing {', '.join(group.names)}; already replaced: {', '.join(report.layers) or 'nothing'}"
                )
                raise
            bar.update(len(group.names))
    return report


def _quantize_group(report, method, group, formats, batches, activations, observer) -> None:
    """One input: its statistics, its transform, and the codes of every layer that reads it."""
    model, first = report.model, group.names[0]
    layers = {name: model.get_submodule(name) for name in group.names}
    weights = {name: _wide(weight_of(layer)) for name, layer in layers.items()}
    stats, scale, folded = None, None, False
    if method.keep:
        stats = capture(model, batches, [first], method.keep, stop=group.calls == 1)[first]
        if group.after_norm or not method.norms_only:
            scale = method.scale(list(weights.values()), stats, [formats[name] for name in group.names])
    if scale is not None:
        stats = stats.divided_by(scale)
        if folded := group.norm is not None:
            fold(model, group.norm, scale)
    own_scale = None if folded else scale
    act_quant = _act_quant(model, batches, first, group, activations, observer, own_scale)
    for name, layer in layers.items():
        w = weights[name] if scale is None else weights[name] * scale
        q, g_idx = method.quantize(w, formats[name], stats, name)
        q = replace(q, dtype=weight_of(layer).dtype)
        new = QuantLinear(q, layer.bias, copy.deepcopy(act_quant), own_scale, g_idx)
        where = "" if scale is None else f"folded into {group.norm}" if folded else "input_scale"
        report.layers[name] = _layer_report(new, w if own_scale is None else weights[name], stats, scale, where)
        report.model = models.replace(report.model, name, lambda name, old, new=new: new).model


def _layer_report(
    layer: QuantLinear, w: Tensor, stats: InputStats | None, scale: Tensor | None, where: str
) -> LayerReport:
    """w: (out, in), what `layer` should do to its own input."""
    difference = layer.dequantized_weight(w.dtype) - w
    error = math.nan
    if stats is not None and "hessian" in stats.keep:
        hessian = stats.hessian
        inner = scale if where == "input_scale" else 1  # the stats are of x / scale
        error = float((output_error(difference * inner, hessian).sum() / output_error(w * inner, hessian).sum()).sqrt())
    nbytes = sum(buffer.nbytes for buffer in layer.buffers())
    return LayerReport(layer.format, nbytes, 8 * nbytes / w.numel(), float(difference.norm() / w.norm()), error, where)


def _act_quant(model, batches, first, group, activations, observer, own_scale) -> ActQuant | None:
    """The activation quantizer of one input, its range frozen if it is static."""
    act_quant = copy.deepcopy(activations)
    if act_quant is not None and act_quant.static:
        make = observer if own_scale is None else lambda: _Divided(observer(), own_scale)
        act_quant.freeze(*observe_inputs(model, batches, make, [first], stop=group.calls == 1)[first].range())
    return act_quant


class _Divided:
    """Shows an observer x / scale."""

    def __init__(self, observer: Observer, scale: Tensor):
        self.observer, self.scale = observer, scale

    def observe(self, x: Tensor) -> None:
        self.observer.observe(x / self.scale)

    def range(self) -> tuple[Tensor, Tensor]:
        return self.observer.range()


def _wide(weight: Tensor) -> Tensor:
    """A copy in which methods compute: float32, or float64 where the weight is."""
    return weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32, copy=True)


def _method(method: "str | Method") -> Method:
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"no method is named {method!r}: use one of {', '.join(METHODS)}, or a Method such as ZeroQ(shape)"
        )
    return METHODS[method]()


def formats_of(model: nn.Module, fmt, select) -> tuple[dict[str, Format], dict[str, str]]:
    """Layer → format for the layers to quantize, and layer → reason for the linear layers left alone."""
    layers = find_linears(model)
    tied = {name.rpartition(".")[0] for group in find_tied(model) for name in group}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(fmt, Mapping):
        if unknown := [name for name in fmt if name not in layers]:
            raise ValueError(
                f"no linear layer is named {', '.join(map(repr, unknown))}; the model has {', '.join(layers)}"
            )
        chosen = {name for name, own in fmt.items() if own is not None}
        formats = fmt
    else:
        chosen = set(layers) if select is None else _selected(layers, select)
        formats = dict.fromkeys(layers, fmt)
    left = {}
    for name, layer in layers.items():
        if name not in chosen:
            left[name] = "not selected"
        elif name in tied:
            left[name] = "its weight is tied to another module"
        elif layer is head and select is None and not isinstance(fmt, Mapping):
            left[name] = "the output head"
    formats = {name: formats[name] for name in layers if name not in left}
    if not formats:
        raise ValueError(f"no layer is left to quantize: {left or 'the model has no linear layers'}")
    for name, own in formats.items():
        if not isinstance(own, Format):
            raise TypeError(f"the format of {name!r} is a {type(own).__name__}, not a qlab.formats.Format")
    return formats, left


def _selected(layers: dict[str, nn.Module], select) -> set[str]:
    if callable(select):
        return {name for name, layer in layers.items() if select(name, layer)}
    names = {select} if isinstance(select, str) else set(select)
    if unknown := names - layers.keys():
        raise ValueError(f"no linear layer is named {', '.join(sorted(unknown))}; the model has {', '.join(layers)}")
    return names


def _check(model: nn.Module, method: Method, formats: dict[str, Format]) -> None:
    """Refuse, before anything is changed, what would fail halfway."""
    checked = set()
    for name, fmt in formats.items():
        shape = torch.Size(shape_of(model.get_submodule(name)))
        if (fmt, shape) in checked:
            continue
        try:
            fmt.blocks(torch.empty(shape, device="meta"))
            method.check(fmt, shape)
        except ValueError as error:
            error.add_note(f"for the layer {name!r}: give it another format, or leave it out by `select`")
            raise
        checked.add((fmt, shape))
