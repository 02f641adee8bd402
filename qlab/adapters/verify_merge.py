"""Is a merged checkpoint what it should be? Layer by layer from the written files, and as a whole model.

Layers: every tensor is read again and compared, by checksum, with what was written; and each layer that was merged or decoded is
applied to random inputs, W' · x against Ŵ · x + scaling · B · (A · x), which never forms the sum that was written. What is
allowed is the rounding of the dtype that was written: a Δ smaller than that cannot be told from it.

Model: the logits of the result against those of the base with its adapter unmerged, both loaded whole in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qlab.adapters.dequantize import dequantize_model
from qlab.adapters.lora import LoRALinear
from qlab.adapters.merge_plan import BaseLayer, Plan
from qlab.adapters.stored import SLAB
from qlab.models import guard_bitsandbytes, replace
from qlab.models.load import load
from qlab.models.shards import read_header
from qlab.nn.weights import set_weight, weight_of

INPUTS = 4  # random inputs of each layer in its verification
POSITIONS = 32  # random tokens that both models read


@dataclass(frozen=True)
class Check:
    """What a written layer has to compute. x: (INPUTS, in), y: (INPUTS, out) by the base and the adapter, unmerged.

    error : of the written weight itself, ‖W' − (Ŵ + Δ)‖ / ‖Ŵ + Δ‖.
    """

    layer: BaseLayer
    x: Tensor
    y: Tensor
    error: float


def product(x: Tensor, w: Tensor) -> Tensor:
    """x · Wᵀ in float32, some rows of W at a time. x: (n, in), w: (out, in); returns (n, out)."""
    step = max(1, SLAB // w.shape[1])
    return torch.cat([x @ part.float().T for part in w.split(step)], 1)


def verify_file(plan: Plan, path: Path, checks: list[Check], crc: Mapping[str, int]) -> list[float]:
    """Read a written file again. Returns the error of each layer's output, relative to the output. Raises RuntimeError."""
    entries = read_header(path)
    if entries.keys() != crc.keys():
        raise RuntimeError(f"verification failed: {path.name} holds other tensors than were written")
    for key, entry in entries.items():
        if entry.crc32() != crc[key]:
            raise RuntimeError(
                f"verification failed: {key} in {path.name} is not what was written: the disk may be faulty"
            )
    errors = []
    for check in checks:
        key = check.layer.key
        if plan.stores(check.layer):
            own = {end: entries[f"{key}.{end}"].read() for end in plan.storage.specs(check.layer.shape, torch.float32)}
            weight = plan.storage.decode(own)
            allowed = 2 * check.error + 1e-5
        else:
            weight = entries[f"{key}.weight"].read()
            weight = weight.T if check.layer.conv1d else weight
            allowed = max(torch.finfo(weight.dtype).eps / 2, 1e-5)
        error = float((product(check.x, weight) - check.y).norm() / check.y.norm())
        if not (error <= allowed or check.y.norm() == 0):
            raise RuntimeError(
                f"verification failed: the merged {check.layer.name!r} computes something else than base and adapter: the "
                f"relative error of its output is {error:.1e}, and {allowed:.1e} is allowed"
            )
        errors.append(error)
    return errors


def reference_name(plan: Plan) -> str:
    """What the layers are compared with, in words."""
    if plan.how == "original" or plan.storage is None:
        return "base on disk + adapter"
    return "quantized base + adapter" + ", which is what re-quantizing costs" * (plan.how == "requantize")


def verify_model(plan: Plan, folder: Path) -> str:
    """A line that says how far apart the logits are: ‖merged − unmerged‖ / ‖unmerged‖ on random tokens.

    The reference is the base with Ŵ in the place of every quantized weight (with how="original": W) and the adapters beside it.
    Its activations are not quantized. Both models are loaded by transformers, one after the other.

    Raises RuntimeError where floating-point results are farther apart than rounding to their dtype explains. What
    re-quantizing costs is reported, for that is no fault of the merge.
    """
    guard_bitsandbytes()
    tokens = torch.randint(plan.config["vocab_size"], (1, POSITIONS), generator=torch.Generator().manual_seed(0))
    expected = _logits(_reference(plan), tokens)
    found = _logits(load(folder)[0], tokens)
    error = float((found - expected).norm() / expected.norm())
    line = f"verified logits of the whole model within {error:.1e} of {reference_name(plan)}"
    if plan.how == "requantize":
        return line
    widest = max(torch.finfo(plan.kept_dtype(_dtype(plan, layer))).eps for layer in plan.adapted)
    allowed = max(8 * widest, 1e-4)
    if not error <= allowed:
        raise RuntimeError(
            f"verification failed: the logits differ by {error:.1e} (relative), and {allowed:.1e} is allowed"
        )
    return line


def _dtype(plan: Plan, layer: BaseLayer) -> torch.dtype:
    return plan.codes_dtype(layer) if layer.quantized else plan.entries[f"{layer.key}.weight"].torch_dtype


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens[:, : getattr(model.config, "max_position_embeddings", POSITIONS)]).logits.float()


def _reference(plan: Plan) -> nn.Module:
    """The base with Ŵ written out in float32 and every adapter as a LoRALinear."""
    model, _ = load(plan.base)
    if plan.prequantized:
        model = dequantize_model(model, torch.float32)
    by_name = {layer.name: layer for layer in plan.layers.values()}
    if plan.how != "original":
        for parameter in model.parameters() if plan.base_dtype else ():
            parameter.data = parameter.data.to(plan.base_dtype).float()
        for name, layer in by_name.items():
            if layer.quantized and not plan.prequantized:
                module = model.get_submodule(name)
                set_weight(module, _quantized(plan, weight_of(module).detach().to(plan.codes_dtype(layer))))

    def adapted(name: str, module: nn.Module) -> LoRALinear:
        adapter = by_name[name].adapter
        made = LoRALinear(module, adapter.r, adapter.lora_alpha, use_rslora=adapter.use_rslora)
        made.lora_A.data, made.lora_B.data = adapter.factors()
        return made

    return replace(model, [layer.name for layer in plan.adapted], adapted).model.eval()


def _quantized(plan: Plan, w: Tensor) -> Tensor:
    """Ŵ (out, in), 4 bit by the format itself and not by the code that writes checkpoints."""
    if plan.storage.format == "int8":
        return plan.storage.decode(plan.storage.encode(w))
    return plan.storage.codebook.quantize(w).dequantize()
