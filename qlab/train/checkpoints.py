"""Checkpoints that count only when they are whole, and hold nothing that would have to be unpickled.

    checkpoints/step-00000008/
        trained.safetensors      every parameter that requires a gradient
        optimizer.safetensors    the optimizer's tensors, "<parameter>/<state>"
        state.json               what else optimizer and scheduler hold, and what the run has counted
        trainer_state.json       transformers' TrainerState: the step, and what was logged
        rng-0.json, rng-1.json   random states of each process
        complete.json            the marker: step, and SHA-256 of every other file

The files are written into a folder of another name and flushed to the disk, the marker last; then the folder is renamed. A
folder without its marker, or whose files are not those that the marker names, is skipped with a warning. An older checkpoint is
deleted after the newer one is complete, never before.
"""

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from qlab.models.checksums import sha256

MARKER, TRAINED, OPTIMIZER, STATE = "complete.json", "trained.safetensors", "optimizer.safetensors", "state.json"
PARTIAL = ".partial"


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def complete(partial: Path, step: int) -> Path:
    """Mark the checkpoint in the folder `partial` as whole, and rename it. Returns where it is then."""
    sums = {path.name: sha256(path) for path in sorted(partial.iterdir())}
    for name in sums:
        flush(partial / name)
    write_json(partial / MARKER, {"step": step, "sha256": sums})
    final = path_of(partial.parent, step)
    if final.exists():  # one that was skipped because it is damaged
        shutil.rmtree(final)
    partial.rename(final)
    flush(final.parent)
    return final


def latest(folder: Path, warn: bool = True) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint that is whole, or None. Warns of each newer one, and says what is wrong with it."""
    found = [path for path in folder.glob("step-*") if path.is_dir()] if folder.is_dir() else []
    for path in sorted(found, reverse=True):
        wrong = what_is_wrong(path)
        if wrong is None:
            return int(path.name.removeprefix("step-")), path
        if warn:
            warnings.warn(f"the checkpoint {path} is skipped: {wrong}", stacklevel=2)
    return None


def what_is_wrong(path: Path) -> str | None:
    """Why a checkpoint does not count; None where it does."""
    if path.name.endswith(PARTIAL) or not (path / MARKER).is_file():
        return f"it has no {MARKER}: it was being written when the run stopped"
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        step, sums = marker["step"], dict(marker["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        return f"its {MARKER} cannot be read ({error})"
    if path.name != f"step-{step:08d}":
        return f"its {MARKER} is that of step {step}"
    for name, digest in sums.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != digest:
            return f"{name} ({file.stat().st_size} bytes) is cut off or was changed: its SHA-256 is not the one in {MARKER}"
    return None


def delete_others(folder: Path, keep: Path) -> None:
    """Delete every checkpoint but `keep`, half-written ones too."""
    for path in folder.glob("step-*"):
        if path != keep:
            shutil.rmtree(path)


def write_json(path: Path, content: object) -> None:
    """Whole, or not at all: under another name, flushed, then renamed."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Onto the disk, not only to the operating system: what a rename promises must survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name → every parameter that trains, on the CPU; those that are sharded are gathered, which every process must join."""
    return {name: _whole(p) for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fill the parameters that train. Raises ValueError where these are not the ones that were saved."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = ({name: tuple(t.shape) for name, t in part.items()} for part in (parameters, tensors))
    here, there = shapes
    if differ := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        raise ValueError(
            f"what was saved is not what trains here: {differ[0]} is {there.get(differ[0], 'not there')} in the file, and "
            f"{here.get(differ[0], 'not there')} in the model ({len(differ)} differ)"
        )
    for name, parameter in parameters.items():
        parameter.copy_(_like(tensors[name].to(parameter.device), parameter))


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """(tensors by "<parameter>/<state>", the rest as JSON holds it)."""
    state, names = optimizer.state_dict(), _names(optimizer, model)
    tensors = {
        f"{names[i]}/{key}": _whole(value)
        for i, values in state["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    numbers = {
        names[i]: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for i, values in state["state"].items()
    }
    return tensors, {"numbers": numbers, "groups": state["param_groups"]}


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], rest: dict) -> None:
    """What `optimizer_state` gave, put back."""
    names = _names(optimizer, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: dict(rest["numbers"][name]) for i, name in enumerate(names) if name in rest["numbers"]}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        i = names.index(name)
        state[i][kind] = _like(tensor, parameters[i]) if tensor.shape == parameters[i].shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Of the optimizer's parameters, in its own order, in which its state_dict numbers them."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def rng_state() -> dict:
    """The random states of this process, as JSON holds them."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state().tolist()).hex() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict) -> None:
    """What `rng_state` gave, put back."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state["cuda"])), dtype=torch.uint8))


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)
