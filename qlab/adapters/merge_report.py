"""What a merge did, layer by layer."""

import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from qlab.adapters.bases import base_weight, qtensor_of
from qlab.adapters.lora import LoRALinear
from qlab.adapters.merge_weight import Survival, measure
from qlab.calibrate import output_error
from qlab.nn import QuantLinear, weight_of
from qlab.nn.weights import bitsandbytes_kind


@dataclass(frozen=True)
class LayerMerge(Survival):
    """What became of one layer; Ŵ is its base weight, Δ the adapter's, W' the weight after the merge (see `Survival`).

    became : class or format of the layer now.
    output_without, output_error : root mean square of Δ·x and of (W' − Ŵ − Δ)·x over that of (Ŵ + Δ)·x, on the inputs of
        the calibration data before the merge: what forgetting the adapter would cost, and what the merge did cost. NaN
        without calibration data.
    nbytes_before, nbytes_after : of the weight with all its constants, and before the merge of A and B. No bias.
    bits_per_weight : of the merged layer, every constant counted.
    note : what else changed; "" for nothing.
    """

    became: str
    output_without: float
    output_error: float
    nbytes_before: int
    nbytes_after: int
    bits_per_weight: float
    note: str = ""


@dataclass
class MergeReport:
    """What `merge` did. `model` is the model given, or the new layer if the model itself was an adapter.

    left : quantized layers that had no adapter, and so are still quantized.
    """

    model: nn.Module
    how: str
    layers: dict[str, LayerMerge] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    kept: dict[str, tuple[nn.Module, nn.Module]] = field(
        default_factory=dict, repr=False
    )  # name → (adapter, merged layer)
    quantizers: list[tuple] = field(default_factory=list, repr=False)  # what `forget_quantizer` took away

    @property
    def nbytes_before(self) -> int:
        return sum(layer.nbytes_before for layer in self.layers.values())

    @property
    def nbytes_after(self) -> int:
        return sum(layer.nbytes_after for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Of all merged layers together."""
        weights = sum(8 * layer.nbytes_after / layer.bits_per_weight for layer in self.layers.values())
        return 8 * self.nbytes_after / weights

    def __str__(self) -> str:
        width = max(20, *map(len, self.layers)) if self.layers else 20
        lines = [
            f"merged: {self.how}",
            f"{'layer':{width}} {'|Δ|/|W|':>8} {'codes ≠':>8} {'Δ kept':>8} {'error/|Δ|':>9} {'out: no Δ':>9} {'out: now':>9} "
            f"{'bytes':>9} {'→':>9} {'bits/w':>7}  became",
        ]
        for name, layer in self.layers.items():
            lines.append(
                f"{name:{width}} {_number(layer.size):>8} {_number(layer.codes_changed, '.1%'):>8} {_number(layer.kept):>8} "
                f"{_number(layer.error):>9} {_number(layer.output_without):>9} {_number(layer.output_error):>9} "
                f"{layer.nbytes_before:>9} {layer.nbytes_after:>9} {layer.bits_per_weight:>7.3f}  {layer.became}"
                f"{'; ' * bool(layer.note)}{layer.note}"
            )
        if self.left:
            lines.append(f"still quantized, for they had no adapter: {', '.join(self.left)}")
        return "\n".join(
            [
                *lines,
                f"{len(self.layers)} layers, {self.nbytes_before} → {self.nbytes_after} bytes, {self.bits_per_weight:.3f} "
                "bits a weight",
            ]
        )


def _number(value: float, spec: str = ".3g") -> str:
    return "" if math.isnan(value) else format(value, spec)


def layer_merge(adapter: LoRALinear, new: nn.Module, hessian: Tensor | None, note: str = "") -> LayerMerge:
    """What became of `adapter` in `new`. hessian: (in, in), of the layer's inputs (see InputStats), or None."""
    base, w_hat, merged, delta = adapter.base, base_weight(adapter.base), base_weight(new), adapter.delta_weight()
    before, after = qtensor_of(base), qtensor_of(new)
    codes = (before.codes, after.codes) if before and after else ()
    without, error = math.nan, math.nan
    if hessian is not None:
        size = output_error(w_hat + delta, hessian).sum()
        without = float((output_error(delta, hessian).sum() / size).sqrt())
        error = float((output_error(merged - w_hat - delta, hessian).sum() / size).sqrt())
    nbytes = _nbytes(new)
    rounded = getattr(base, "act_quant", None) is not None or bitsandbytes_kind(base) == "Linear8bitLt"
    if rounded and after is None and before is not None:
        note = f"{note}; " * bool(note) + "activations are no longer quantized"
    return LayerMerge(
        **vars(measure(w_hat, delta, merged, *codes)),
        became=type(new).__name__ if after is None else f"{type(new).__name__} {after.format}",
        output_without=without,
        output_error=error,
        nbytes_before=_nbytes(base) + adapter.lora_A.nbytes + adapter.lora_B.nbytes,
        nbytes_after=nbytes,
        bits_per_weight=8 * nbytes / merged.numel(),
        note=note,
    )


def _nbytes(layer: nn.Module) -> int:
    """Bytes of the weight and of all that decodes it; not of the bias."""
    if isinstance(layer, QuantLinear):
        return sum(buffer.nbytes for buffer in layer.buffers())
    q = qtensor_of(layer)
    return weight_of(layer).nbytes if q is None else q.nbytes
