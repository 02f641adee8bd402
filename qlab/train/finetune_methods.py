"""The methods of `qlab finetune`, one table: how each loads its base, what it puts on it to train, and how that is saved.

| method | base | trains | adapter folder |
|---|---|---|---|
| lora | floating point | LoRA | PEFT's |
| qlora | 4 bits: NF4, double quantization; otherwise integers by group | LoRA | PEFT's |
| qalora | integers by group, floating-point zero points | QA-LoRA, mean pooling | trained.safetensors |
| qat-lora | floating point, W + ΔW rounded to integers by group in each forward | LoRA | PEFT's |
| bitfit | as qlora | biases, new ones where a layer has none | trained.safetensors |

The table's learning rates suit qlab-mini (measured there, LoRA of rank 8, 300 steps); 1e-4 to 2e-4 is usual for LoRA at 7B and more.
On a CUDA device the NF4 base is bitsandbytes' Linear4bit, loaded by transformers; elsewhere it is a QuantLinear of the same codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qlab.adapters import add_adapters, bitfit, read_adapter, save_adapter
from qlab.adapters.add import LAYER_TYPES
from qlab.adapters.base_record import RECORD, check_base, layer_checksum, quantization_of, read_json, read_record
from qlab.adapters.bases import float_layer
from qlab.adapters.dequantize import forget_quantizer
from qlab.adapters.lora import LoRALinear
from qlab.adapters.qat_lora import QATLoRALinear
from qlab.formats import NF4, Format, IntAffine
from qlab.models import find_linears, load, replace
from qlab.models.checksums import sha256
from qlab.nn.config import format_config
from qlab.ptq import quantize_model
from qlab.train.checkpoints import load_tensors, save_tensors, trained_tensors, write_json

if TYPE_CHECKING:
    from qlab.train.finetune import Settings

TRAINED = "trained.safetensors"


@dataclass(frozen=True)
class Method:
    """One line of the table.

    bits : the default; None: nothing is rounded. format : of what is rounded; None: nothing is. rounds_base : before the training
    starts; otherwise the training rounds. kind : of the adapter, for add_adapters; "": bitfit. adapter : its own settings.
    save, read : the adapter folder; read gives (tensors by parameter, qlab.json).
    """

    lr: float
    bits: int | None
    format: Callable[["Settings"], Format | None]
    rounds_base: bool
    kind: str
    adapter: Callable[["Settings"], dict]
    save: Callable[[nn.Module, Path, "Settings", dict], None]
    read: Callable[[Path], tuple[dict[str, Tensor], dict]]

    def load(self, settings: "Settings"):
        """(model, tokenizer), the model as the base of this method."""
        fmt = self.format(settings)
        if self.rounds_base and isinstance(fmt, NF4) and settings.bitsandbytes:
            return load_bitsandbytes(settings)
        model, tokenizer = load(settings.model, settings.place, getattr(torch, settings.dtype))
        if self.rounds_base:
            quantize_model(model, fmt, progress=False)
        return model, tokenizer

    def adapt(self, model: nn.Module, settings: "Settings") -> None:
        """Freeze `model` and put on it what trains."""
        own = self.adapter(settings)
        if self.kind:
            add_adapters(model, self.kind, settings.r, settings.lora_alpha, settings.target_modules, **own)
        else:
            bitfit(model, **own)


def integers(settings: "Settings") -> IntAffine:
    """One scale and one floating-point zero point for each group of a row: what QA-LoRA needs, and the others can use."""
    return IntAffine(
        settings.bits, symmetric=False, granularity="group", group_size=settings.group_size, float_zero_point=True
    )


def nf4_or_integers(settings: "Settings") -> Format:
    """QLoRA's base: NF4 at 4 bits, integers otherwise."""
    return NF4(settings.block_size, settings.double_quant) if settings.bits == 4 else integers(settings)


def load_bitsandbytes(settings: "Settings"):
    """(model, tokenizer) of an NF4 base. transformers quantizes tensor by tensor: the whole is never in memory in floating point."""
    from transformers import BitsAndBytesConfig

    if settings.block_size != 64:
        raise ValueError(
            f"transformers has bitsandbytes make blocks of 64: block_size={settings.block_size} needs bitsandbytes=False"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, settings.compute),
    )
    model, tokenizer = load(settings.model, settings.place, getattr(torch, settings.dtype), config)
    forget_quantizer(model)  # Trainer takes a model with that mark for one that has no adapters
    return model, tokenizer


def base_record(model: nn.Module) -> dict:
    """What qlab.json says of a base, before anything is put on it."""
    layers = find_linears(model, LAYER_TYPES)
    return {
        "quantization": quantization_of(model),
        "checksums": {name: layer_checksum(layer) for name, layer in layers.items()},
    }


def refuse_another_base(path: Path, record: dict, base: dict) -> None:
    """ValueError where what was trained stands on another base than `base`, a base_record."""
    if unknown := record["checksums"].keys() - base["checksums"].keys():
        raise ValueError(f"{path} is of another base: this one has no linear layer {min(unknown)!r}")
    now = {name: base["checksums"][name] for name in record["checksums"]}
    check_base(path, record, {k: v for k, v in base["quantization"].items() if k != "dtype"}, now)


def _lora(settings: "Settings") -> dict:
    return {"lora_dropout": settings.lora_dropout}


def _qalora(settings: "Settings") -> dict:
    return _lora(settings) | {"pooling": "mean"}


def _qat_lora(settings: "Settings") -> dict:
    return _lora(settings) | {"fmt": integers(settings), "school": "merged"}


def _bitfit(settings: "Settings") -> dict:
    return {"new_biases": True}


def _save_peft(model: nn.Module, folder: Path, settings: "Settings", base: dict) -> None:
    save_adapter(model, folder, base=settings.model)


def _save_qat(model: nn.Module, folder: Path, settings: "Settings", base: dict) -> None:
    """A and B as PEFT's folder, on the float base; qlab.json says through which rounding they were trained.

    A merge into the float base, rounded by `trained_through`, is the model that trained.
    """

    def plain(name: str, layer: QATLoRALinear) -> LoRALinear:
        stand_in = LoRALinear(
            float_layer(layer.base.weight, layer.base, False), layer.r, layer.lora_alpha, dtype=layer.lora_A.dtype
        )
        stand_in.lora_A, stand_in.lora_B = layer.lora_A, layer.lora_B
        return stand_in

    layers = find_linears(model, (QATLoRALinear,))
    replaced = replace(model, list(layers), plain, types=(QATLoRALinear,))
    try:
        save_adapter(model, folder, base=settings.model)
    finally:
        replace(model, list(replaced.replaced), lambda name, _: layers[name], types=(LoRALinear,))
    through = {"school": "merged", "method": "ste", "format": format_config(integers(settings))}
    write_json(folder / RECORD, read_json(folder / RECORD) | {"trained_through": through})


def _read_peft(folder: Path) -> tuple[dict[str, Tensor], dict]:
    adapter, tensors = read_adapter(folder), {}
    for name, layer in adapter.layers.items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = layer.factors()
    if adapter.record is None:
        raise FileNotFoundError(f"{folder} has no {RECORD}, which says on what base it was trained")
    return tensors, adapter.record


def _save_trained(model: nn.Module, folder: Path, settings: "Settings", base: dict) -> None:
    """What trains, under its parameters' own names: PEFT's format has no place for it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / TRAINED, trained_tensors(model))
    about = {"adapter_sha256": sha256(folder / TRAINED), "weights": TRAINED, "method": settings.method, "quantized": []}
    write_json(folder / RECORD, about | base)


def _read_trained(folder: Path) -> tuple[dict[str, Tensor], dict]:
    path = folder / TRAINED
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {TRAINED}")
    record = read_record(path)
    if record is None:
        raise FileNotFoundError(f"{folder} has no {RECORD}, which says on what base it was trained")
    try:
        return load_tensors(path), record
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


METHODS = {
    "lora": Method(2e-3, None, lambda _: None, False, "lora", _lora, _save_peft, _read_peft),
    "qlora": Method(2e-3, 4, nf4_or_integers, True, "lora", _lora, _save_peft, _read_peft),
    "qalora": Method(8e-2, 4, integers, True, "qalora", _qalora, _save_trained, _read_trained),
    "qat-lora": Method(4e-3, 4, integers, False, "qat", _qat_lora, _save_qat, _read_peft),
    "bitfit": Method(2e-2, 4, nf4_or_integers, True, "", _bitfit, _save_trained, _read_trained),
}
