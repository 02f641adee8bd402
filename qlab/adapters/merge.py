"""merge: fold the adapters of a model into its weights, in one of the ways of `merge_weight`.

| how | layers become | what they compute |
|---|---|---|
| dequantize | nn.Linear, Conv1D | what the unmerged model computes, up to the rounding of `dtype` |
| requantize | what their bases are | that, rounded to the base's format again: PEFT's merge_and_unload |
| original | nn.Linear, Conv1D | Δ on top of the weight before it was quantized, which is not what Δ was trained on |
| zero-points | QuantLinear | what the unmerged model computes, up to the precision of the zero points; QALoRALinear only |
| naive-add | nn.Linear, Conv1D | codes + Δ, taken for weights: a misreading, kept to be measured |
| naive-codes | QuantLinear | Δ added to the codes and rounded: another |

A float base (nn.Linear, Conv1D) has nothing to round: dequantize and requantize both add Δ to it. Biases are kept.

Axis legend: out, in = rows and columns of a weight.
"""

import sys
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from qlab.adapters import merge_weight as pure
from qlab.adapters.add import adapters_of
from qlab.adapters.bases import (
    base_weight,
    float_layer,
    from_stored,
    holds_codes,
    qtensor_of,
    requantized,
    to_stored,
    with_codes,
)
from qlab.adapters.dequantize import (
    conv1d_names,
    dtype_of,
    forget_quantizer,
    model_dtype,
    quantized_layers,
    restore_quantizer,
)
from qlab.adapters.lora import LoRALinear
from qlab.adapters.merge_report import MergeReport, layer_merge
from qlab.calibrate import capture
from qlab.models import find_tied, guard_bitsandbytes, replace, untie
from qlab.nn import LINEAR_TYPES, weight_of
from qlab.nn.weights import bitsandbytes_kind

HOW = ("dequantize", "requantize", "original", "zero-points", "naive-add", "naive-codes")
Make = Callable[[str, LoRALinear], nn.Module]


def merge(
    model: nn.Module,
    how: str = "dequantize",
    *,
    dtype: torch.dtype | None = None,
    originals: nn.Module | Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    calibration: Iterable | None = None,
    keep: bool = False,
) -> MergeReport:
    """Replace every adapter of `model`, in place, by its base with the adapter merged into it.

    Parameters
    ----------
    how : see above.
    dtype : of merged float weights and their biases; None: the dtype that the base was quantized from (int8: that of the
        model's other parameters). zero-points: of the merged zero points; None: as the base keeps them; torch.uint8: rounded.
    originals : for how="original": the model that was quantized, or its state dict.
    generator : for how="requantize": draw a stochastic rounding from it; None: round to nearest.
    calibration : batches as `qlab.calibrate.capture` takes them; adds output errors to the report, on the inputs that layers
        have before the merge. One Hessian, (in, in), for each merged layer is held at once.
    keep : hold on to the adapters and their bases, so that `unmerge(report)` can put them back.

    A base whose weight is tied to another module gets its own copy first (`models.untie`). Where dequantize or original
    leaves no quantized layer in a transformers model, its quantization config goes too: with it, the saved model would be
    quantized again at its next load.

    Raises, before anything is changed, ValueError for settings that do not fit each other, the model or one of its layers
    (named); for a model without adapters (merged already?); for NaN or Inf in Δ; and for originals that are not the weights
    that were quantized. RuntimeError for 4-bit layers that bitsandbytes has repacked. Where a merge fails later (a constant
    that a format cannot hold), a note on the error names the layer and those that were merged already.
    """
    adapters = adapters_of(model)
    if "bitsandbytes" in sys.modules:
        guard_bitsandbytes(model)
    _check(adapters, how, dtype, originals, generator)
    make = _maker(model, adapters, how, dtype, originals, generator)
    if how == "original":
        _check_originals(adapters, make)
    stats = {} if calibration is None else capture(model, calibration, list(adapters), ("hessian",))
    notes = _untie(model, adapters)
    report = MergeReport(model, how)

    def merged(name: str, adapter: LoRALinear) -> nn.Module:
        with torch.no_grad():
            new = make(name, adapter)
            hessian = stats[name].hessian if stats else None
            report.layers[name] = layer_merge(adapter, new, hessian, notes.get(name, ""))
        if keep:
            report.kept[name] = adapter, new
        return new

    report.model = replace(model, lambda name, _: name in adapters, merged, tied="untie", types=(LoRALinear,)).model
    if how in ("dequantize", "original"):
        report.left = list(quantized_layers(report.model))
        if not report.left:
            report.quantizers = forget_quantizer(report.model)
    return report


def unmerge(report: MergeReport) -> nn.Module:
    """Put back the adapters that `merge(…, keep=True)` has kept, bases and all, bit for bit. Returns the model.

    Without them there is no way back: W' − Δ is not the weight that the merge began with, for it has rounded. A weight that
    `merge` untied stays untied.

    Raises ValueError for a report that holds no adapters, and where a merged layer is no longer in its place.
    """
    if not report.kept:
        raise ValueError(
            "this report holds no adapters, so its merge cannot be undone: it has rounded the weights, or left their codes "
            "altogether. merge(…, keep=True) keeps what there was"
        )
    for name, (_, merged) in report.kept.items():
        if report.model.get_submodule(name) is not merged:
            raise ValueError(f"{name!r} is no longer the layer that was merged: nothing was put back")
    for name, (adapter, merged) in report.kept.items():
        adapter.train(merged.training)
        if name:
            _put(report.model, merged, adapter)
        else:
            report.model = adapter
    restore_quantizer(report.quantizers)
    report.kept, report.quantizers = {}, []
    return report.model


def _maker(model, adapters, how, dtype, originals, generator) -> Make:
    """(name, adapter) → the merged layer."""
    conv1d = conv1d_names(model, {name: adapter.base for name, adapter in adapters.items()})
    otherwise = model_dtype(model)

    def as_float(name: str, adapter: LoRALinear, weight: Tensor) -> nn.Module:
        return float_layer(weight, adapter.base, name in conv1d)

    def dequantize(name: str, adapter: LoRALinear) -> nn.Module:
        own = dtype or dtype_of(adapter.base, otherwise)
        return as_float(name, adapter, pure.add(base_weight(adapter.base), adapter.delta_weight(), own))

    def requantize(name: str, adapter: LoRALinear) -> nn.Module:
        delta = _delta_as_peft(adapter)
        if holds_codes(adapter.base):
            return requantized(adapter.base, delta, generator)
        return as_float(name, adapter, pure.add(weight_of(adapter.base), delta, dtype))

    def original(name: str, adapter: LoRALinear) -> nn.Module:
        weight = _original(originals, name, adapter, name in conv1d)
        return as_float(name, adapter, pure.add(weight, adapter.delta_weight(), dtype))

    def zero_points(name: str, adapter: LoRALinear) -> nn.Module:
        return with_codes(adapter.base, pure.merge_zero_points(adapter.base.qtensor, adapter.zero_point_delta(), dtype))

    def naive_add(name: str, adapter: LoRALinear) -> nn.Module:
        q, delta = qtensor_of(adapter.base), to_stored(adapter.base, adapter.delta_weight())
        weight = pure.merge_naive_add(q, delta, dtype or dtype_of(adapter.base, otherwise))
        return as_float(name, adapter, from_stored(adapter.base, weight))

    def naive_codes(name: str, adapter: LoRALinear) -> nn.Module:
        q, delta = qtensor_of(adapter.base), to_stored(adapter.base, adapter.delta_weight())
        return with_codes(adapter.base, pure.merge_naive_codes(q, delta))

    return dict(zip(HOW, (dequantize, requantize, original, zero_points, naive_add, naive_codes), strict=True))[how]


def _delta_as_peft(adapter: LoRALinear) -> Tensor:
    """ΔW (out, in) in the dtype of A and B: multiplied out in it over codes, rounded to it from float32 over floats."""
    if not holds_codes(adapter.base) or hasattr(adapter, "zero_point_delta"):
        return adapter.delta_weight().to(adapter.lora_A.dtype)
    return adapter.lora_B @ adapter.lora_A * adapter.scaling


def _original(originals, name: str, adapter: LoRALinear, conv1d: bool) -> Tensor:
    """(out, in): the weight of the layer before it was quantized."""
    key = f"{name}.weight" if name else "weight"
    try:
        if isinstance(originals, nn.Module):
            weight = weight_of(originals.get_submodule(name)).detach()
        else:
            weight = originals[key].T if conv1d else originals[key]
    except (AttributeError, KeyError) as error:
        raise ValueError(
            f"the originals have no {key!r}: pass the model that was quantized, or its state dict"
        ) from error
    if tuple(weight.shape) != tuple(adapter.shape):
        raise ValueError(f"{name!r} has a weight (out, in) = {adapter.shape}, the original is {tuple(weight.shape)}")
    return weight


def _check(adapters: Mapping[str, LoRALinear], how: str, dtype, originals, generator) -> None:
    """Refuse, before anything is changed, what cannot be merged so."""
    if how not in HOW:
        raise ValueError(f"how is one of {', '.join(map(repr, HOW))}, got {how!r}")
    if not adapters:
        raise ValueError("no adapter is left to merge: the model has none, or they have been merged already")
    if (originals is not None) != (how == "original"):
        raise ValueError(
            f"how='original', and no other, takes originals: got how={how!r} and originals={type(originals)}"
        )
    if generator is not None and how != "requantize":
        raise ValueError(f"only how='requantize' rounds, and so can draw from a generator; got how={how!r}")
    rounded = how == "zero-points" and dtype == torch.uint8
    if dtype is not None and not dtype.is_floating_point and not rounded:
        raise ValueError(f"dtype is that of floating-point results (zero-points: or torch.uint8), got {dtype}")
    for name, adapter in adapters.items():
        try:
            _check_layer(adapter, how, generator)
        except ValueError as error:
            error.add_note(f"for the layer {name!r}. Nothing was changed")
            raise


def _check_layer(adapter: LoRALinear, how: str, generator) -> None:
    base, q = adapter.base, qtensor_of(adapter.base)
    for factor in (adapter.lora_A, adapter.lora_B):
        if not factor.isfinite().all():
            raise ValueError(f"the adapter holds NaN or Inf, in {tuple(factor.shape)}: its training has diverged")
    if how == "zero-points" and not hasattr(adapter, "zero_point_delta"):
        raise ValueError(
            f"Δ of a {type(adapter).__name__} differs within a group, so zero points cannot take it up: only a QALoRALinear "
            "merges into them"
        )
    if q is None and (how.startswith("naive") or not isinstance(base, LINEAR_TYPES) and how == "requantize"):
        raise ValueError(f"how={how!r} is about codes, and a {type(base).__name__} holds none to add to or to fit anew")
    if q is None and bitsandbytes_kind(base) and how == "requantize":
        raise ValueError(f"this {type(base).__name__} was never quantized: move it to its device first")
    if how == "naive-codes":
        pure.check_fixed_levels(q.format, "adding to codes")
    if generator is not None and q is not None:
        pure.check_fixed_levels(q.format, "stochastic rounding")


def _check_originals(adapters: Mapping[str, LoRALinear], make: Make) -> None:
    for name, adapter in adapters.items():
        with torch.no_grad():
            w_hat, delta = base_weight(adapter.base), adapter.delta_weight()
            away = float((base_weight(make(name, adapter)) - delta - w_hat).norm() / w_hat.norm())
        if away >= 1:
            raise ValueError(
                f"the original of {name!r} is {away:.2f} times the norm of the base weight away from it: it is not the weight "
                "that was quantized (another model, or one whose layers were scaled before they were quantized)"
            )


def _untie(model: nn.Module, adapters: Mapping[str, LoRALinear]) -> dict[str, str]:
    """Own copies of the weights of bases that other modules hold too. Returns name → what was done."""
    notes = {}
    for group in find_tied(model):
        for name, adapter in adapters.items():
            own = f"{name}.base.weight"
            if own in group:
                _put(model, adapter, adapter.base)  # for `untie` looks at the layer that has the name
                try:
                    untie(model, name)
                finally:
                    _put(model, adapter.base, adapter)
                notes[name] = f"no longer tied to {', '.join(other for other in group if other != own)}"
    return notes


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """`new` in every place where `old` is a child."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new
