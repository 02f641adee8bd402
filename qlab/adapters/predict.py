"""How much of Δ a merge of a checkpoint will keep, estimated from some rows of every layer before anything is written."""

import math
import statistics

import torch
from torch import Tensor

from qlab.adapters.merge_plan import BaseLayer, Plan
from qlab.adapters.merge_weight import Survival, add, measure

ROWS = 1 << 16  # weights of each layer that are looked at, in whole rows


def predict_survival(plan: Plan) -> dict[str, Survival]:
    """Layer name → what becomes of Δ in the middle rows of that layer, 65,536 weights or a little more.

    Blocks of a format start anew at the first of these rows, and double quantization sees their scales alone: estimates.
    """
    return {layer.name: _survival(plan, layer) for layer in plan.adapted}


def _survival(plan: Plan, layer: BaseLayer) -> Survival:
    w, first = _middle_rows(plan, layer)
    a, b = layer.adapter.factors()
    delta = b[first : first + len(w)] @ a * layer.adapter.scaling
    w_hat = w.to(plan.base_dtype or w.dtype)
    if layer.quantized and not plan.prequantized:
        w_hat = plan.storage.decode(plan.storage.encode(w_hat))
    if plan.stores(layer):
        merged = plan.storage.decode(plan.storage.encode(add(w_hat, delta, torch.float32), plan.codes_dtype(layer)))
    else:
        merged = add(w if plan.how == "original" else w_hat, delta, plan.kept_dtype(w_hat.dtype))
    return measure(w_hat, delta, merged)


def _middle_rows(plan: Plan, layer: BaseLayer) -> tuple[Tensor, int]:
    """(some rows of the weight as it is on disk, decoded where it is codes; the number of the first)."""
    count = min(layer.shape[0], -(-ROWS // layer.shape[1]))
    first = (layer.shape[0] - count) // 2
    if plan.prequantized and layer.quantized:
        whole = plan.storage.decode({end: entry.read() for end, entry in plan.stored_entries(layer).items()})
        return whole[first : first + count], first
    entry = plan.entries[f"{layer.key}.weight"]
    if layer.conv1d:
        return entry.read().T[first : first + count].contiguous(), first
    return entry.rows(first, count), first


def survival_text(plan: Plan, survival: dict[str, Survival]) -> str:
    """One line for each kind of layer (the end of its name), medians over the model; and warnings."""
    kinds: dict[str, list[Survival]] = {}
    for name, one in survival.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(one)
    width = max(12, *map(len, kinds))
    lines = ["predicted from some rows of every layer; medians over the layers of a kind, and the least kept",
             f"{'layers':{width}} {'count':>5} {'|Δ|/|W|':>9} {'Δ kept':>8} {'least':>8} {'error/|Δ|':>9}"]  # fmt: skip
    for kind, group in kinds.items():
        size, kept, error = (
            statistics.median(getattr(one, field) for one in group) for field in ("size", "kept", "error")
        )
        least = min(one.kept for one in group)
        lines.append(f"{kind:{width}} {len(group):5} {size:9.2e} {kept:8.1%} {least:8.1%} {error:9.2g}")
    return "\n".join([*lines, *_warnings(plan, survival)])


def _warnings(plan: Plan, survival: dict[str, Survival]) -> list[str]:
    lines = []
    if empty := [name for name, one in survival.items() if math.isnan(one.kept)]:
        lines.append(f"WARNING: Δ is 0 in {len(empty)} of {len(survival)} layers ({empty[0]}, …): never trained?")
    lost = [name for name, one in survival.items() if one.kept < 0.5 or one.error > 1]
    if lost and plan.how == "requantize":
        lines.append(
            f"WARNING: re-quantizing would erase Δ, or add more error than Δ is large, in {len(lost)} of {len(survival)} layers "
            f"({', '.join(lost[:3])}{', …' * (len(lost) > 3)}): --how dequantize keeps it"
        )
    elif lost and plan.how == "original" and plan.storage:
        lines.append(
            f"WARNING: in {len(lost)} of {len(survival)} layers the original weight is farther from the quantized one that Δ was "
            "trained on than Δ is large: --how dequantize gives exactly what was trained"
        )
    elif lost:
        lines.append(
            f"WARNING: Δ is below the rounding of the dtype in {len(lost)} of {len(survival)} layers: --dtype float32 keeps it"
        )
    return lines
