"""qlab.json: what an adapter was trained on, beside the files of PEFT's format, which do not say.

| key | value |
|---|---|
| adapter_sha256 | of adapter_model.safetensors |
| quantization | format ("nf4", "fp4", "int8", "none", or the repr of another), block_size, double_quant, dtype |
| quantized | names of all layers of the base that stored codes, adapted or not |
| checksums | adapted layer → SHA-256 of the first 256 values of its base weight, row by row: codes' levels, or the float weights |

256 values tell another base from this one, at no cost; they do not prove that the rest of it is the same.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from qlab.adapters.add import adapters_of
from qlab.adapters.bases import holds_codes, qtensor_of
from qlab.adapters.dequantize import model_dtype, quantized_layers
from qlab.adapters.lora import LoRALinear
from qlab.formats import FP4, NF4, QTensor
from qlab.formats.packing import unpack
from qlab.models.checksums import sha256
from qlab.nn import weight_of
from qlab.nn.config import dtype_name
from qlab.nn.weights import bitsandbytes_kind

CONFIG, RECORD = "adapter_config.json", "qlab.json"
CHECKED = 256  # values of each layer that its checksum covers


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError and ValueError, naming it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not the settings of an adapter")
    return content


def record_of(model: nn.Module, weights: Path) -> dict:
    """What qlab.json says of the adapters of `model`, whose weights are in the file `weights`."""
    return {
        "adapter_sha256": sha256(weights),
        "quantization": quantization_of(model),
        "quantized": _quantized(model),
        "checksums": {name: layer_checksum(layer) for name, layer in adapters_of(model).items()},
    }


def read_record(weights: Path) -> dict | None:
    """The qlab.json beside the file `weights`, or None. Raises ValueError, naming the file, where the two do not fit."""
    if not weights.with_name(RECORD).is_file():
        return None
    record = read_json(weights.with_name(RECORD))
    if missing := {"adapter_sha256", "quantization", "quantized", "checksums"} - record.keys():
        raise ValueError(
            f"{weights.with_name(RECORD)} lacks {', '.join(sorted(missing))}: it is not as save_adapter writes it"
        )
    found = sha256(weights)
    if found != record["adapter_sha256"]:
        raise ValueError(
            f"{weights} has SHA-256 {found}, and {RECORD} says {record['adapter_sha256']}: the file is cut off or "
            f"was changed. Restore it; where it was changed on purpose, delete {RECORD}"
        )
    return record


def _quantized(model: nn.Module) -> list[str]:
    """Names of the layers that store codes, those under adapters included."""
    under = [name for name, layer in adapters_of(model).items() if holds_codes(layer.base)]
    return sorted([*quantized_layers(model), *under])


def quantization_of(model: nn.Module) -> dict:
    """How the layers of the model's base are stored, for qlab.json."""
    layers = [*quantized_layers(model).values(), *(layer.base for layer in adapters_of(model).values())]
    found = [_stored_as(layer, model) for layer in layers if holds_codes(layer)]
    if not found:
        return {"format": "none", "dtype": dtype_name(model_dtype(model))}
    different = [item for i, item in enumerate(found) if item not in found[:i]]
    if len(different) == 1:
        return different[0]
    return {"format": "mixed: " + "; ".join(sorted(item["format"] for item in different))}


def _stored_as(layer: nn.Module, model: nn.Module) -> dict:
    if bitsandbytes_kind(layer) == "Linear8bitLt":
        return {"format": "int8", "dtype": dtype_name(model_dtype(model))}
    q = qtensor_of(layer)
    if isinstance(q.format, (NF4, FP4)):
        fmt = q.format
        settings = {"block_size": fmt.block_size, "double_quant": fmt.double_quant, "dtype": dtype_name(q.dtype)}
        return {"format": fmt.name.lower(), **settings}
    return {"format": repr(q.format), "dtype": dtype_name(q.dtype)}


def layer_checksum(layer: nn.Module) -> str:
    """SHA-256 of the first 256 values of a base's weight, (out, in) row by row; scales do not enter."""
    if isinstance(layer, LoRALinear):
        layer = layer.base
    if bitsandbytes_kind(layer) == "Linear8bitLt" and holds_codes(layer):
        return checksum(layer.weight.data.reshape(-1))
    q = qtensor_of(layer)
    if q is None:
        weight = weight_of(layer).detach()
        return checksum(weight[: -(-CHECKED // weight.shape[1])].reshape(-1))
    return checksum(_first_values(q))


def _first_values(q: QTensor) -> Tensor:
    """What the first codes stand for before their block's scale is applied; the codes themselves where that is not fixed."""
    count = min(CHECKED, q.shape.numel())
    if not isinstance(q.format, (NF4, FP4)):
        return q.codes.reshape(-1)[:count]
    codes = unpack(q.packed[: -(-count // 2)], 4, count)
    return q.format.values.to(codes.device)[codes.int()]


def checksum(values: Tensor) -> str:
    """SHA-256 of the first 256 of `values`, (n,), as float32. The two zeros of FP4 count as one."""
    return hashlib.sha256((values[:CHECKED].float() + 0.0).cpu().numpy().tobytes()).hexdigest()


def check_base(path: Path, record: dict, quantization: Mapping, checksums: Mapping[str, str]) -> None:
    """ValueError where a base is not the one that qlab.json records.

    Codes chosen on another kind of device can differ where a weight lies exactly between two: so of quantized layers one in
    ten may have another checksum, of float layers none.
    """
    recorded = record["quantization"]
    for key, value in quantization.items():
        if recorded.get(key) != value:
            raise ValueError(
                f"{path}: the adapter was trained on a base with {key}={recorded.get(key)!r}, this one has {value!r}"
            )
    differ = [name for name, value in checksums.items() if record["checksums"].get(name) != value]
    allowed = len(checksums) // 10 if quantization["format"] != "none" else 0
    if len(differ) > allowed:
        raise ValueError(
            f"{path}: the base is not the one that the adapter was trained on: the weights of {len(differ)} of {len(checksums)} "
            f"adapted layers differ, the first is {differ[0]!r}. Take the base that {CONFIG} names"
        )
