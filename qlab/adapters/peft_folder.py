"""Adapter folders in PEFT's format, read and written: adapter_config.json and adapter_model.safetensors.

    base_model.model.<layer>.lora_A.weight    (r, in)          <layer>: its name in model.named_modules()
    base_model.model.<layer>.lora_B.weight    (out, r)

Which layers have an adapter is what the tensors say: target_modules, exclude_modules, layers_to_transform and layers_pattern
have been decided when they were written. r is their shape; lora_alpha is the config's, or alpha_pattern's. fan_in_fan_out is
left to the layer's class, as PEFT does. What a plain LoRA cannot be is refused by name (`REFUSED`, `BASE_CHANGED`).

PEFT does not write down what the adapter was trained on. Folders written here do, in a third file: see base_record.py.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlab.adapters.add import LAYER_TYPES, AdapterReport, adapters_of, add_adapters
from qlab.adapters.base_record import (
    RECORD,
    check_base,
    layer_checksum,
    quantization_of,
    read_json,
    read_record,
    record_of,
)
from qlab.adapters.lora import LoRALinear
from qlab.models import find_linears
from qlab.models.shards import Entry, read_header
from qlab.nn import shape_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
REFUSED = {
    "use_dora": "DoRA also learns the length of every row",
    "lora_bias": "B has a bias of its own",
    "modules_to_save": "whole modules were trained beside the adapters",
    "trainable_token_indices": "rows of the embedding were trained beside the adapters",
    "target_parameters": "adapters stand on parameters that are no linear layers",
    "layer_replication": "layers of the base are repeated",
    "use_qalora": "PEFT applies it on GPTQ bases only, and ignores it elsewhere",
    "alora_invocation_tokens": "aLoRA adapts only some positions of the input",
    "velora_config": "VeLoRA is a LoRA variant",
    "monteclora_config": "MonteCLoRA is a LoRA variant",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow chooses among several adapters",
    "kasa_config": "KaSA has changed the base weights",
    "megatron_config": "the layers are Megatron's",
}
BASE_CHANGED = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
    "mica",
)  # first subtract something from the base, or vary LoRA
_KNOWN = {
    *REFUSED, "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
    "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True)
class FolderLayer:
    """The adapter of one layer, still in its file. shape: (out, in) of the weight it stands on."""

    a: Entry
    b: Entry
    lora_alpha: float
    use_rslora: bool

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r): float32 or wider, as PEFT computes with them."""
        return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in (self.a.read(), self.b.read()))


@dataclass(frozen=True)
class AdapterFolder:
    """What `read_adapter` found. layers: name → adapter, in the file's order. record: qlab.json, or None."""

    path: Path
    config: dict
    layers: dict[str, FolderLayer]
    record: dict | None


def read_adapter(folder: str | Path) -> AdapterFolder:
    """Read a PEFT LoRA folder and refuse, naming the file, what cannot be used as one.

    Raises FileNotFoundError for a file that is missing; ValueError for a config that cannot be read, another kind of adapter
    (by its name), a weight file that is cut off, tampered with or empty, and factors that do not fit each other or are NaN
    or Inf.
    """
    folder = Path(folder).expanduser()
    config = _read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (
            ": adapter_model.bin is a pickle, and opening one can run code"
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}{pickled}. PEFT's save_pretrained writes one")
    record = read_record(path)
    entries = read_header(path)
    if not entries:
        raise ValueError(f"{path} holds no tensors: the adapter was saved without its weights. Save it again")
    layers = {name: _folder_layer(path, config, name, pair) for name, pair in _pairs(path, entries).items()}
    for name, layer in layers.items():
        for factor, letter in zip(layer.factors(), "AB", strict=True):
            if not factor.isfinite().all():
                raise ValueError(f"{path}: lora_{letter} of {name!r} holds NaN or Inf: its training has diverged")
    return AdapterFolder(folder, config, layers, record)


def _read_config(folder: Path) -> dict:
    """adapter_config.json, once it is known to mean a plain LoRA."""
    path = folder / CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type is {config.get('peft_type')!r}, and qlab reads LORA only. Merge it with PEFT"
        )
    for key, why in REFUSED.items():
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported: {why}. Merge it with PEFT")
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{path}: bias={config['bias']!r} is not supported: biases were trained too. Merge it with PEFT"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(BASE_CHANGED):
        raise ValueError(
            f"{path}: init_lora_weights={init!r} means an adapter to a base that PEFT had changed first, not to the one on disk. "
            "Save it with save_pretrained(…, path_initial_model_for_weight_conversion=…), which makes a plain LoRA of it"
        )
    if unknown := [key for key, value in config.items() if key not in _KNOWN and value]:
        raise ValueError(
            f"{path}: {unknown[0]}={config[unknown[0]]!r} is not known here, so what it changes is not either"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or isinstance(config[key], bool) or not config[key] > 0:
            raise ValueError(f"{path}: {key} is a number above 0, got {config.get(key)!r}")
    return config


def _pairs(path: Path, entries: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Layer name → {"A": …, "B": …}; raises for every other tensor."""
    pairs: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        match = _KEY.fullmatch(key)
        if not match:
            raise ValueError(f"{path} holds {key!r}, which is {_kind_of(key)}: not supported. Merge it with PEFT")
        pairs.setdefault(match[1], {})[match[2]] = entry
    return pairs


def _kind_of(key: str) -> str:
    kinds = {
        "lora_magnitude_vector": "a magnitude vector of DoRA", "lora_embedding_": "an adapter of an embedding",
        "lora_A.bias": "a bias of A", "lora_B.bias": "a bias of B (lora_bias)", "hada_": "a factor of LoHa",
        "lokr_": "a factor of LoKr", "ia3_": "a vector of IA3", "oft_": "a factor of OFT",
    }  # fmt: skip
    found = next((kind for part, kind in kinds.items() if part in key), None)
    return found or "no factor of a LoRA, but a whole tensor that was trained or saved with it"


def _folder_layer(path: Path, config: dict, name: str, pair: dict[str, Entry]) -> FolderLayer:
    if len(pair) != 2:
        raise ValueError(
            f"{path} has only lora_{next(iter(pair))} of {name!r}: the other factor is missing. Save it again"
        )
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
        raise ValueError(f"{path}: lora_A {a.shape} and lora_B {b.shape} of {name!r} are no (r, in) and (out, r)")
    if not (a.torch_dtype.is_floating_point and b.torch_dtype.is_floating_point):
        raise ValueError(f"{path}: lora_A and lora_B of {name!r} are {a.dtype} and {b.dtype}, not floating point")
    rank = _by_pattern(config, "rank_pattern", name, config["r"])
    if rank != a.shape[0]:
        raise ValueError(
            f"{path}: {name!r} has rank {a.shape[0]}, and {CONFIG} says {rank}: they do not belong together"
        )
    return FolderLayer(
        a, b, _by_pattern(config, "alpha_pattern", name, config["lora_alpha"]), bool(config.get("use_rslora"))
    )


def _by_pattern(config: dict, key: str, name: str, default: float) -> float:
    """The value of the first pattern that matches, as PEFT's get_pattern_key."""
    patterns = config.get(key) or {}
    try:
        return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)
    except (re.error, AttributeError) as error:
        raise ValueError(f"{CONFIG}: {key}={patterns!r} does not map regular expressions to numbers: {error}") from None


def load_adapter(model: nn.Module, folder: str | Path, *, tied: str = "skip", any_base: bool = False) -> AdapterReport:
    """Put the adapters of a PEFT folder on the layers of `model`, in place, and freeze all other parameters.

    The layers become LoRALinear over whatever they are (float, bitsandbytes, QuantLinear) and compute what PEFT's do.
    A and B can be trained on. tied: as in `add_adapters`. any_base: do not ask whether this is the base that qlab.json records.

    Raises, before anything is changed, what `read_adapter` raises; ValueError for a layer that the model does not have or that
    has another shape, and for a base that is not the one recorded in qlab.json.
    """
    adapter = read_adapter(folder)
    found = find_linears(model, LAYER_TYPES)
    for name, layer in adapter.layers.items():
        if name not in found:
            raise ValueError(no_such_layer(adapter.path, name, found))
        check_shape(adapter.path, name, layer, shape_of(found[name]))
    if adapter.record and not any_base:
        now = {name: layer_checksum(found[name]) for name in adapter.layers}
        stored = {key: value for key, value in quantization_of(model).items() if key != "dtype"}
        check_base(adapter.path / RECORD, adapter.record, stored, now)
    # Longest first: PEFT's patterns also match the end of a name.
    names = sorted(adapter.layers, key=len, reverse=True)
    report = add_adapters(
        model,
        r=int(adapter.config["r"]),
        lora_alpha=adapter.config["lora_alpha"],
        target_modules="|".join(map(re.escape, names)),
        rank_pattern={re.escape(name): adapter.layers[name].r for name in names},
        alpha_pattern={re.escape(name): adapter.layers[name].lora_alpha for name in names},
        tied=tied,
        lora_dropout=adapter.config.get("lora_dropout") or 0.0,
        use_rslora=bool(adapter.config.get("use_rslora")),
    )
    with torch.no_grad():
        for name, layer in report.added.items():
            a, b = adapter.layers[name].factors()
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
    return report


def no_such_layer(path: Path, name: str, layers: Mapping[str, object]) -> str:
    same_end = [known for known in layers if known.rpartition(".")[2] == name.rpartition(".")[2]]
    return (
        f"{path / WEIGHTS} has an adapter for {name!r}, and the base has no such linear layer: it is an adapter for another "
        f"base. Layers of this one: {', '.join((same_end or list(layers))[:3]) or 'none'}"
    )


def check_shape(path: Path, name: str, layer: FolderLayer, shape: tuple[int, int]) -> None:
    """ValueError where an adapter stands on a weight of another shape."""
    if layer.shape != tuple(shape):
        raise ValueError(
            f"{path / WEIGHTS}: the adapter of {name!r} is for a weight (out, in) = {layer.shape}, and that of the base is "
            f"{tuple(shape)}: it is an adapter for another base"
        )


def save_adapter(model: nn.Module, folder: str | Path, *, base: str | None = None) -> Path:
    """Write the adapters of `model` as a PEFT folder, with qlab.json beside it. Returns the folder.

    `peft.PeftModel.from_pretrained(base model, folder)` computes what `model` does, on the same base. Ranks and alphas that
    differ between layers go into rank_pattern and alpha_pattern.

    base : name or path of the base model, for the config. None: what the model's own config says.

    Raises, before anything is written: ValueError for a model without adapters, for NaN or Inf, for dropouts that differ (PEFT
    has one), and TypeError for a QALoRALinear: its A reads sums of groups, for which PEFT has no name. Written out as
    (r, in) it would load, and no longer be the change of zero points that makes its merge exact.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError("the model has no adapters to save: add_adapters makes them, and merge takes them away")
    for name, layer in adapters.items():
        if type(layer) is not LoRALinear:
            raise TypeError(
                f"{name!r} is a {type(layer).__name__}, which PEFT's format cannot hold: its A reads sums over groups. Merge it "
                "into the zero points (qlab.adapters.merge, how='zero-points') and save the model"
            )
        if not (layer.lora_A.isfinite().all() and layer.lora_B.isfinite().all()):
            raise ValueError(
                f"the adapter of {name!r} holds NaN or Inf: its training has diverged. Nothing was written"
            )
    config = _config(model, adapters, base)
    tensors = {}
    for name, layer in adapters.items():
        for letter in "AB":
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = (
                getattr(layer, f"lora_{letter}").detach().cpu().contiguous()
            )
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    record = record_of(model, partial)
    os.replace(partial, folder / WEIGHTS)
    for name, content in ((RECORD, record), (CONFIG, config)):
        partial = folder / f".{name}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / name)
    return folder


def _config(model: nn.Module, adapters: Mapping[str, LoRALinear], base: str | None) -> dict:
    """The adapter_config.json of these adapters."""
    dropouts = {layer.lora_dropout for layer in adapters.values()}
    if len(dropouts) > 1:
        raise ValueError(f"PEFT has one lora_dropout for all layers, these have {sorted(dropouts)}: set them alike")
    rslora = all(layer.use_rslora for layer in adapters.values())
    # PEFT has one use_rslora too: where layers differ, the alpha that gives the same scaling without it.
    alphas = {n: _number(x.lora_alpha if x.use_rslora == rslora else x.scaling * x.r) for n, x in adapters.items()}
    ranks = {name: layer.r for name, layer in adapters.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    longest = sorted(adapters, key=len, reverse=True)
    own = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM"
        if own is not None and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        else None,
        "base_model_name_or_path": base if base is not None else getattr(own, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.pop(),
        "target_modules": sorted(adapters),
        "rank_pattern": {re.escape(name): ranks[name] for name in longest if ranks[name] != r},
        "alpha_pattern": {re.escape(name): alphas[name] for name in longest if alphas[name] != alpha},
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": all(isinstance(layer.base, Conv1D) for layer in adapters.values()),
        "init_lora_weights": True,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
