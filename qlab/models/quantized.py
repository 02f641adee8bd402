"""Quantized models on disk: a folder that holds codes, so an int4 model is about 4 bits a weight there too.

| file | content |
|---|---|
| config.json | of transformers, but for model_type: "qlab_quantized", and the model's own as base_model_type |
| model.safetensors | every parameter and buffer once; of a QuantLinear its `packed`, params, bias, … (see qlab.nn.quant_linear) |
| qlab_quantized.json | layer → `QuantLinear.config()`; names that share a tensor; modules that were taken out |
| generation_config.json, tokenizer files | where the model has the one, and the others are given |
| SHA256SUMS | of all of them, in sha256sum's format |

transformers' Auto classes refuse that model_type. Without it they would open the folder, and put random numbers into every layer
whose weight they do not find. The folder gets its name when it is whole and on the disk; before that it is one beside it that begins with a dot.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qlab.models.checksums import sha256, verify_sha256sums
from qlab.models.shards import read_header
from qlab.models.surgery import replace
from qlab.nn import Base, QuantLinear
from qlab.nn.config import dtype_from_name, dtype_name
from qlab.nn.weights import bitsandbytes_kind, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD, WEIGHTS = "qlab_quantized.json", "model.safetensors"
VERSION = 1
MODEL_TYPE = "qlab_quantized"


def is_quantized_folder(folder: Path) -> bool:
    """True for a folder that `save_quantized` wrote."""
    return (folder / RECORD).is_file()


def save_quantized(
    model: "PreTrainedModel", folder: str | Path, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> Path:
    """Write a transformers model whose layers are QuantLinear to `folder`, which must not exist, or be empty. Returns it.

    `qlab.models.load(folder)` opens it again where a tokenizer was given, `open_quantized(folder)` always: with the same
    tensors, and the same outputs bit for bit.

    Raises, before anything is written: TypeError for what is no transformers model; ValueError for a model without codes, with
    adapters or other layers that its config does not describe; FileExistsError for the folder, FileNotFoundError where the one
    above it is missing. Where it fails later, nothing is left behind.
    """
    folder = Path(folder).expanduser().absolute()
    _check_model(model)
    layers = {name: module.config() for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    tensors, same = _distinct(model)
    removed = _removed(model)
    record = {
        "version": VERSION, "class": type(model).__name__, "dtype": dtype_name(model.dtype),
        "layers": layers, "same": same, "removed": removed,
    }  # fmt: skip
    if _model_class(record) is not type(model):
        raise ValueError(
            f"{type(model).__name__} is not the class of that name in transformers, so it could not be opened again"
        )
    _check_described(model, record, tensors)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: give another, or remove it")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent} is no folder: make it first")
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        _write(partial, model, tokenizer, record, tensors)
        os.rename(partial, folder)  # replaces an empty folder, and no other
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _write(folder: Path, model, tokenizer, record: dict, tensors: Mapping[str, Tensor]) -> None:
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    config |= {"model_type": MODEL_TYPE, "base_model_type": model.config.model_type}
    _dump(folder / "config.json", config)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    _dump(folder / RECORD, record)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    (folder / "SHA256SUMS").write_text(sums, encoding="utf-8")
    for path in (*files, folder / "SHA256SUMS", folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def open_quantized(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> "PreTrainedModel":
    """The model that `save_quantized` wrote, in eval mode. What is not quantized is in `dtype`; None: as it was saved.

    Raises FileNotFoundError for a folder that is none of those; ValueError, naming it, for a file that is missing, changed, cut off
    or not listed, an unknown class or format, and tensors that are not those that the config and the record describe.
    """
    folder = Path(folder).expanduser()
    if not is_quantized_folder(folder):
        raise FileNotFoundError(f"{folder} has no {RECORD}: it was not written by save_quantized. Use qlab.models.load")
    verify_sha256sums(folder)
    record = _read_record(folder)
    tensors = {name: entry.read() for name, entry in read_header(folder / WEIGHTS).items()}
    try:
        model = _skeleton(_model_class(record), _read_config(folder), record, tensors)
        _fill(model, record["same"], tensors, dtype)
    except ValueError as error:
        error.add_note(f"while opening {folder}")
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / RECORD} is not as save_quantized writes it: {error!r}") from error
    if (folder / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval()


def _check_model(model) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"save_quantized writes transformers models, whose config makes them anew, not a {type(model).__name__}: save the "
            "transformers model inside it, or its state_dict and the config() of its QuantLinear layers"
        )
    for name, module in model.named_modules():
        if bitsandbytes_kind(module):
            raise ValueError(
                f"{name!r} is bitsandbytes' {type(module).__name__}: transformers' own save_pretrained writes those"
            )
        if isinstance(module, Base) and not isinstance(module, QuantLinear):
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, which is still in training: merge or fold first (qlab.adapters.merge, "
                "fold_biases), or convert (qlab.qat.convert, convert_qat_lora)"
            )
    if not any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no QuantLinear: quantize it first, or use its own save_pretrained"
        )


def _places(model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor | None], str]]:
    """(full name, the dict that holds it, its key there) of every parameter and buffer; a shared module once."""
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    yield f"{prefix}.{key}".lstrip("."), held, key


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name → tensor, each once under its first name, and other name → first name."""
    tensors, same, first = {}, {}, {}
    for name, held, key in _places(model):
        tensor = held[key]
        if (known := first.setdefault(id(tensor), name)) != name:
            same[name] = known
        else:
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, same


def _removed(model: nn.Module) -> list[str]:
    """Names of modules that are None, as `load` takes out a pooler without weights."""
    children = (
        (prefix, child) for prefix, m in model.named_modules() for child in m._modules if m._modules[child] is None
    )
    return sorted(f"{prefix}.{child}".lstrip(".") for prefix, child in children)


def _check_described(model, record: dict, tensors: Mapping[str, Tensor]) -> None:
    """ValueError where config and record would not make this model again."""
    try:
        again = _skeleton(type(model), model.config, record, tensors)
        _fill(again, record["same"], {name: tensor.to("meta") for name, tensor in tensors.items()}, None)
    except ValueError as error:
        error.add_note(f"this {type(model).__name__} is not what its config describes, so it cannot be saved by it")
        raise


def _model_class(record: dict) -> type:
    import transformers

    made = getattr(transformers, str(record["class"]), None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        raise ValueError(
            f"{RECORD} names the class {record['class']!r}, which transformers {transformers.__version__} does not have"
        )
    return made


def _read_config(folder: Path):
    from transformers import CONFIG_MAPPING

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = config.pop("base_model_type")
    made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    made.name_or_path = str(folder)
    return made


def _read_record(folder: Path) -> dict:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} cannot be read as JSON: {error}") from None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        found = record.get("version") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{folder / RECORD} is of version {found!r}, and this qlab reads version {VERSION}")
    if missing := {"class", "dtype", "layers", "same", "removed"} - record.keys():
        raise ValueError(f"{folder / RECORD} lacks {', '.join(sorted(missing))}: it is not as save_quantized writes it")
    return record


def _skeleton(made: type, config, record: dict, tensors: Mapping[str, Tensor]) -> "PreTrainedModel":
    """The model of the config with its QuantLinear layers, all other parameters on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights():  # buffers that no file holds are made for real
        model = made._from_config(copy.deepcopy(config), dtype=dtype_from_name(record["dtype"]))
    for name in record["removed"]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, None)
    layers, every = record["layers"], dict(tensors)
    every |= {name: tensors[first] for name, first in record["same"].items() if first in tensors}
    if unknown := sorted(layers.keys() - dict(model.named_modules()).keys()):
        raise ValueError(f"{RECORD} has a layer {unknown[0]!r}, which {made.__name__} has not with this config")

    def make(name: str, old: nn.Module) -> QuantLinear:
        own = {key.removeprefix(f"{name}."): t for key, t in every.items() if key.startswith(f"{name}.")}
        layer = QuantLinear.from_config(layers[name], own)
        if layer.shape != shape_of(old):
            raise ValueError(f"{RECORD} says {layer.shape} for {name!r}, and the config of the model {shape_of(old)}")
        return layer

    replace(model, list(layers), make)
    return model


def _fill(model: nn.Module, same: Mapping[str, str], tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Put the tensors in their places, those of `same` as one. Raises ValueError for names and shapes that do not fit."""
    places = {name: (held, key) for name, held, key in _places(model)}
    named = tensors.keys() | {name for name, first in same.items() if first in tensors}
    if wrong := sorted(places.keys() ^ named):
        where = f"not in {WEIGHTS}" if wrong[0] in places else f"in {WEIGHTS} and not in the model"
        raise ValueError(f"{len(wrong)} tensors do not fit the model's config; {wrong[0]} is {where}")
    filled: dict[str, Tensor] = {}
    for name, (held, key) in places.items():
        first, old = same.get(name, name), held[key]
        if tensors[first].shape != old.shape:
            raise ValueError(
                f"{name} is {tuple(tensors[first].shape)} in {WEIGHTS}, and {tuple(old.shape)} by the model's config"
            )
        if first not in filled:
            tensor = tensors[first]
            if isinstance(old, nn.Parameter):
                wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
                tensor = nn.Parameter(tensor.to(wanted), requires_grad=old.requires_grad)
            filled[first] = tensor
        held[key] = filled[first]


def _dump(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
