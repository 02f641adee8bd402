"""What `qlab merge` is going to do: which layers the adapter stands on, how each was quantized, what will be written.

    base on disk    --base-quant        Ŵ, what the adapter was trained on
    float W         none                W
    float W         nf4, fp4, int8      decode(encode(W)), of every linear layer that transformers hands to bitsandbytes:
                                        all but the output embedding, what is tied to it, and --skip-modules
    bitsandbytes    what the base says  decode(what is stored)

Everything that can be refused is refused here, before anything is written.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlab.adapters.base_record import CHECKED, RECORD, check_base, checksum
from qlab.adapters.peft_folder import AdapterFolder, FolderLayer, check_shape, no_such_layer, read_adapter
from qlab.adapters.stored import Specs, Storage, check_same, storage_of
from qlab.models.shards import Entry, read_checkpoint
from qlab.models.sources import download, locate
from qlab.nn.config import dtype_name

HOW = ("dequantize", "original", "requantize")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BaseLayer:
    """A linear layer of the base. key: name of its tensors in the checkpoint.

    conv1d : its float weight is stored as (in, out).
    quantized : bitsandbytes stored its weight while the adapter was trained.
    """

    name: str
    key: str
    conv1d: bool
    quantized: bool
    shape: tuple[int, int]
    adapter: FolderLayer | None = None


@dataclass(frozen=True)
class Plan:
    """A merge that nothing speaks against.

    storage : how the base was quantized, None: not at all. prequantized: it is so on disk.
    base_dtype : in which the base was held when the adapter was trained; None: as on disk.
    dtype : of the floating-point tensors that are written; None: base_dtype, and with how="original" as on disk.
    files : file name → key → entry. layers : key of a weight → the layer it is of.
    """

    base: Path
    adapter: AdapterFolder
    how: str
    storage: Storage | None
    prequantized: bool
    base_dtype: torch.dtype | None
    dtype: torch.dtype | None
    skipped: list[str] | None
    config: dict
    files: dict[str, dict[str, Entry]]
    layers: dict[str, BaseLayer]
    entries: dict[str, Entry] = field(repr=False)

    @property
    def adapted(self) -> list[BaseLayer]:
        return [layer for layer in self.layers.values() if layer.adapter]

    def __str__(self) -> str:
        quantized = sum(layer.quantized for layer in self.layers.values())
        stored = f"{self.storage}, {quantized} of {len(self.layers)} linear layers" if self.storage else "not quantized"
        where = " on disk" if self.prequantized else ""
        size = sum(entry.nbytes for entry in self.entries.values())
        return (
            f"base     {self.base} ({size / 1e9:.2f} GB in {len(self.files)} file(s))\n"
            f"trained  on the base {stored}{where}, dtype {dtype_name(self.base_dtype) if self.base_dtype else 'as on disk'}"
            f"{f', as {RECORD} says' if self.adapter.record else ''}\n"
            f"adapter  {self.adapter.path}: {len(self.adapted)} layers\n"
            f"merge    {self.how}, dtype {dtype_name(self.dtype) if self.dtype else 'as the base'}"
        )

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a float tensor that is `dtype` on disk is written."""
        if dtype not in FLOATS:
            return dtype
        return self.dtype or (self.base_dtype if self.how != "original" else None) or dtype

    def stores(self, layer: BaseLayer) -> bool:
        """True if the layer is written as codes."""
        return layer.quantized and self.how == "requantize"

    def codes_dtype(self, layer: BaseLayer) -> torch.dtype:
        """The dtype that the weight of a quantized layer had before."""
        if not self.prequantized:
            return self.base_dtype or self.entries[f"{layer.key}.weight"].torch_dtype
        meta = next((entry for key, entry in self.stored_entries(layer).items() if "quant_state" in key), None)
        if meta is None:  # int8 does not say
            return self.base_dtype or torch.float16
        return getattr(torch, json.loads(bytes(meta.read().tolist()))["dtype"])

    def stored_entries(self, layer: BaseLayer) -> dict[str, Entry]:
        """The tensors of a layer that is quantized on disk, by the end of their name."""
        ends = [key.removeprefix(f"{layer.key}.") for key in self.entries if key.startswith(f"{layer.key}.")]
        return {end: self.entries[f"{layer.key}.{end}"] for end in ends if end != "bias"}

    def specs(self, file: str) -> Specs:
        """Everything that one file will hold: key → (dtype, shape)."""
        specs = {}
        for key, entry in self.files[file].items():
            layer = self.layers.get(key)
            if layer and (layer.quantized or layer.adapter):
                specs |= self._layer_specs(layer)
            elif not self.is_part(key):
                specs[key] = self.kept_dtype(entry.torch_dtype), entry.shape
        return specs

    def is_part(self, key: str) -> bool:
        """True for what belongs to the codes of a layer that is quantized on disk: it is written with them, or not at all."""
        if not self.prequantized:
            return False
        owner = key.partition(".weight.")[0] if ".weight." in key else key.rpartition(".")[0]
        layer = self.layers.get(f"{owner}.weight")
        return bool(layer and layer.quantized) and not key.endswith((".bias", f"{owner}.weight"))

    def _layer_specs(self, layer: BaseLayer) -> Specs:
        if self.stores(layer) and self.prequantized and not layer.adapter:
            specs = {end: (entry.torch_dtype, entry.shape) for end, entry in self.stored_entries(layer).items()}
        elif self.stores(layer):
            specs = self.storage.specs(layer.shape, self.codes_dtype(layer))
        else:
            own = self.codes_dtype(layer) if layer.quantized else self.entries[f"{layer.key}.weight"].torch_dtype
            specs = {"weight": (self.kept_dtype(own), layer.shape[::-1] if layer.conv1d else layer.shape)}
        return {f"{layer.key}.{end}": spec for end, spec in specs.items()}


def make_plan(
    base: str | Path,
    adapter: str | Path,
    how: str,
    *,
    dtype: torch.dtype | None = None,
    base_quant: str | None = None,
    double_quant: bool | None = None,
    block_size: int | None = None,
    base_dtype: torch.dtype | None = None,
    skip_modules: Iterable[str] | None = None,
) -> Plan:
    """Read the headers of the base and the adapter, and decide everything. Arguments as in `merge_checkpoint`."""
    if how not in HOW:
        raise ValueError(f"how is one of {', '.join(HOW)}, got {how!r}")
    for name, value in (("dtype", dtype), ("base_dtype", base_dtype)):
        if value is not None and value not in FLOATS:
            raise ValueError(f"{name} is a floating-point dtype of 16 bits or more, got {value}")
    folder = download(locate(base))
    found = read_adapter(adapter)
    files = read_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entries = {key: entry for group in files.values() for key, entry in group.items()}
    asked = _asked(base_quant, block_size, double_quant)
    storage, base_dtype = _storage(folder, config, entries, found, asked, base_dtype)
    skip = _asked_skips(found, config, skip_modules)
    layers, skipped = _layers(folder, config, entries, storage, skip, found)
    prequantized = "quantization_config" in config
    _check_how(how, storage, prequantized, found)
    plan = Plan(folder, found, how, storage, prequantized, base_dtype, dtype, skipped, config, files, layers, entries)
    _check_layers(plan)
    if found.record:
        here = storage.record() if storage else {"format": "none"}
        sums = {layer.name: _checksum(plan, layer) for layer in plan.adapted}
        check_base(found.path / RECORD, _renamed(found, plan), here, sums)
    return plan


def _asked(base_quant: str | None, block_size: int | None, double_quant: bool | None) -> dict:
    """What the caller says of the base, and no more: format, block_size, double_quant."""
    four_bit = {"block_size": block_size, "double_quant": double_quant}
    given = {key: value for key, value in {"format": base_quant, **four_bit}.items() if value is not None}
    if base_quant not in (None, "none"):
        Storage(base_quant, block_size or 64, bool(double_quant))  # raises for what there is not
    if base_quant in ("none", "int8") and given.keys() & four_bit.keys():
        raise ValueError(f"block_size and double_quant are about nf4 and fp4, and the base is said to be {base_quant}")
    if base_quant is None and given:
        raise ValueError("block_size and double_quant need base_quant, nf4 or fp4, to say what they are about")
    return given


def _storage(folder, config, entries, adapter: AdapterFolder, asked: dict, base_dtype):
    """(how the base was quantized or None, its dtype or None), from its own files, qlab.json and the caller: none may differ."""
    known, source = None, ""
    if "quantization_config" in config:
        meta = next((entry for key, entry in entries.items() if ".weight.quant_state." in key), None)
        known = storage_of(config["quantization_config"], meta and bytes(meta.read().tolist()))
        known, source = known.record(), f"{folder / 'config.json'}"
    if adapter.record:
        recorded = dict(adapter.record["quantization"])
        dtype = getattr(torch, str(recorded.pop("dtype", None)), None)
        if recorded["format"] not in ("nf4", "fp4", "int8", "none"):
            raise ValueError(
                f"{adapter.path / RECORD}: the adapter was trained on codes in {recorded['format']}, which a float base on disk "
                "does not tell: merge it in the process that has the model, with qlab.adapters.merge"
            )
        if base_dtype is not None and base_dtype != dtype:
            raise ValueError(f"{adapter.path / RECORD} says that the base was {dtype}, the command line {base_dtype}")
        base_dtype = dtype
        if known is not None and known != recorded:
            raise ValueError(f"{source} says that the base is {known}, {adapter.path / RECORD} that it was {recorded}")
        known, source = recorded, f"{adapter.path / RECORD}"
    if known is not None:
        if wrong := [key for key, value in asked.items() if known.get(key) != value]:
            key = wrong[0]
            raise ValueError(
                f"{source} says {key}={known.get(key)!r} of the base, the command line {asked[key]!r}: leave it out"
            )
        asked = known
    if asked.get("format", "none") == "none":
        return None, base_dtype
    return Storage(asked["format"], asked.get("block_size", 64), asked.get("double_quant", False)), base_dtype


def _asked_skips(adapter: AdapterFolder, config: dict, skip_modules) -> tuple[str, ...] | None:
    if "quantization_config" in config and skip_modules is not None:
        raise ValueError("the base is quantized on disk, which shows which layers were: leave skip_modules out")
    if adapter.record and skip_modules is not None:
        raise ValueError(f"{adapter.path / RECORD} says which layers were quantized: leave skip_modules out")
    return None if skip_modules is None else tuple(skip_modules)


def _skeleton(folder: Path, config: dict) -> nn.Module:
    """The model that AutoModelForCausalLM makes of the config, without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM  # here: they bring half of transformers along

    try:
        own = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(own, "quantization_config"):
            del own.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(own, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        named = config.get("architectures") or config.get("model_type")
        raise ValueError(
            f"{folder / 'config.json'} ({named}) is no causal LM that transformers can build: {error}"
        ) from error


def _layers(folder, config, entries, storage, skip, adapter: AdapterFolder):
    """(key of a weight → layer, names that are not quantized where they are not the usual ones)."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = _skeleton(folder, config)
    skip = config.get("quantization_config", {}).get("llm_int8_skip_modules") if skip is None else list(skip)
    keep = getattr(model, "_keep_in_fp32_modules", None)
    unquantized = HfQuantizer.get_modules_to_not_convert(model, skip, list(keep) if keep else None)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    prefix = f"{model.base_model_prefix}."
    names = {name if name in linears else prefix + name: name for name in adapter.layers}
    recorded = adapter.record and {name if name in linears else prefix + name for name in adapter.record["quantized"]}
    for full, name in names.items():
        if full not in linears:
            raise ValueError(no_such_layer(adapter.path, name, linears))
    stored = {key.removesuffix(".SCB") for key in entries if key.endswith(".SCB")}
    stored |= {key.partition(".weight.quant_state.")[0] for key in entries if ".weight.quant_state." in key}
    layers = {}
    for name, module in linears.items():
        key = next((k for k in (name, name.removeprefix(prefix)) if f"{k}.weight" in entries), "")
        quantized = type(module) in (nn.Linear, Conv1D) and should_convert_module(name, unquantized)
        if "quantization_config" in config:
            quantized = key in stored
        elif recorded is not None:
            quantized = name in recorded
        shape = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
        found = adapter.layers.get(names.get(name))
        tied = f"{name}.weight" in getattr(model, "all_tied_weights_keys", {})
        if tied or not key:
            _check_tied_or_absent(name, tied, found, bool(storage) and quantized, adapter, entries)
            continue
        layer = BaseLayer(name, key, isinstance(module, Conv1D), bool(storage) and quantized, shape, found)
        layers[f"{key}.weight"] = layer
    if recorded and (unknown := recorded - linears.keys()):
        raise ValueError(f"{adapter.path / RECORD} names {sorted(unknown)[0]!r}, which the base does not have")
    if recorded is not None and storage:
        skip = sorted(linears.keys() - recorded)
    return layers, skip


def _check_tied_or_absent(name: str, tied: bool, found: FolderLayer | None, quantized: bool, adapter, entries) -> None:
    """A linear layer without a weight of its own in the checkpoint is right where it is tied and nothing happens to it."""
    if tied and found:
        raise ValueError(
            f"{adapter.path}: the adapter of {name!r} stands on a weight that is tied to the embedding, so merging it would change "
            "both. Save the base with config.tie_word_embeddings=False and its own output weight, or merge in memory "
            "(qlab.adapters.merge unties it)"
        )
    if not tied and (found or quantized):
        close = difflib.get_close_matches(f"{name}.weight", entries, n=2)
        raise ValueError(
            f"the base has no tensor {name}.weight, though its model has that layer (close: {', '.join(close) or 'none'}): its "
            "checkpoint is stored otherwise than the model's modules, and cannot be merged tensor by tensor"
        )


def _check_how(how: str, storage: Storage | None, prequantized: bool, adapter: AdapterFolder) -> None:
    if how == "requantize" and storage is None:
        said = f"{adapter.path / RECORD} says that the base was not" if adapter.record else "base_quant is none"
        raise ValueError(f"requantize quantizes as the base was, and {said}: give base_quant, or take how='original'")
    if how == "original" and prequantized:
        raise ValueError(
            "the base is quantized on disk, so its original weights are not there: give the float checkpoint"
        )


def _check_layers(plan: Plan) -> None:
    """Shapes of all linear layers against the checkpoint and the adapters; settings of those that are quantized on disk."""
    for layer in plan.layers.values():
        entry = plan.entries[f"{layer.key}.weight"]
        if layer.adapter:
            check_shape(plan.adapter.path, layer.name, layer.adapter, layer.shape)
        if plan.prequantized and layer.quantized:
            parts = plan.stored_entries(layer)
            small = {end: part.read() for end, part in parts.items() if "quant" in end}
            check_same(plan.storage, layer.name, parts | small)
            plain = plan.storage.specs(layer.shape, plan.codes_dtype(layer))["weight"]
            if (entry.torch_dtype, entry.shape) != plain:
                raise ValueError(
                    f"{entry.path}: the codes of {layer.name!r} are {entry.dtype} {entry.shape}, expected {plain}"
                )
        elif entry.torch_dtype not in FLOATS or entry.shape != (layer.shape[::-1] if layer.conv1d else layer.shape):
            raise ValueError(
                f"{entry.path}: {layer.key}.weight is {entry.dtype} {entry.shape}, and config.json means a float weight of "
                f"(out, in) = {layer.shape}: the files do not belong together"
            )


def _renamed(adapter: AdapterFolder, plan: Plan) -> dict:
    """The record, its checksums under the names of the base."""
    sums = adapter.record["checksums"]
    short = {
        layer.name: next(name for name, own in adapter.layers.items() if own is layer.adapter) for layer in plan.adapted
    }
    return {**adapter.record, "checksums": {name: sums.get(short[name]) for name in short}}


def _checksum(plan: Plan, layer: BaseLayer) -> str:
    """That of `base_record.layer_checksum`, from the files."""
    if plan.prequantized and layer.quantized:
        codes = plan.entries[f"{layer.key}.weight"]
        if plan.storage.format == "int8":
            return checksum(codes.rows(0, min(layer.shape[0], -(-CHECKED // layer.shape[1]))).reshape(-1))
        packed = codes.rows(0, min(codes.shape[0], CHECKED // 2)).reshape(-1)
        nibbles = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: layer.shape[0] * layer.shape[1]]
        return checksum(plan.storage.codebook.levels[nibbles.int()])
    if layer.quantized:
        return checksum(plan.storage.first_values(first_rows(plan, layer, plan.storage.block_size), CHECKED))
    return checksum(first_rows(plan, layer, 1).reshape(-1))


def first_rows(plan: Plan, layer: BaseLayer, block_size: int) -> Tensor:
    """The first rows of a float weight, in the dtype it was trained in: enough for whole blocks of 256 weights or more."""
    entry = plan.entries[f"{layer.key}.weight"]
    count = min(layer.shape[0], -(-max(CHECKED, block_size) // layer.shape[1]))
    rows = entry.read().T[:count].contiguous() if layer.conv1d else entry.rows(0, count)
    return rows.to(plan.base_dtype or rows.dtype)
