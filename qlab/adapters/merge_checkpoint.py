"""qlab merge: a base on disk and a PEFT adapter become a checkpoint, one tensor at a time.

| how | layers with an adapter become | quantized layers without one | all others |
|---|---|---|---|
| dequantize | Ŵ + Δ, in floating point | Ŵ, in floating point: what the adapter was trained beside | as they are |
| original | W + Δ, with the W on disk | W | as they are |
| requantize | quantize(Ŵ + Δ), in the base's format | quantize(W) | as they are |

Ŵ is the weight that the codes stand for. Over a base that was not quantized, Ŵ = W. See merge_weight.py for what the three
keep of Δ, and merge_plan.py for how it is known what was quantized.

The result appears under its name when it is whole, verified and on the disk; until then it is written in a folder beside it
that begins with a dot. If the process is killed, that folder is left, and the next merge to the same place clears it away.
Besides the adapter's factors a few copies of the largest weight are in memory, whatever the size of the model.
"""

import errno
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from qlab.adapters.merge_plan import BaseLayer, Plan, make_plan
from qlab.adapters.merge_weight import add
from qlab.adapters.predict import predict_survival, survival_text
from qlab.adapters.stored import SLAB
from qlab.adapters.verify_merge import INPUTS, Check, product, reference_name, verify_file, verify_model
from qlab.models.shards import INDEX, Entry, ShardWriter
from qlab.nn.config import dtype_name

VERIFY = ("layers", "model", "none")
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


def merge_checkpoint(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    how: str = "dequantize",
    *,
    dtype: torch.dtype | None = None,
    base_quant: str | None = None,
    double_quant: bool | None = None,
    block_size: int | None = None,
    base_dtype: torch.dtype | None = None,
    skip_modules: Iterable[str] | None = None,
    dry_run: bool = False,
    verify: str = "layers",
    progress: bool = False,
    log: Callable[[str], None] = print,
) -> Plan:
    """Merge a PEFT LoRA folder into a checkpoint and write the result to `out`, which must not exist, or be empty.

    Parameters
    ----------
    base : folder or Hub id of the model that the adapter was trained on: safetensors, float or quantized by bitsandbytes.
    how : see above. dtype : of the floating-point tensors written; None: base_dtype, or as on disk.
    base_quant, block_size, double_quant, base_dtype : how the base was loaded when the adapter was trained: "nf4", "fp4",
        "int8" or "none" (None: "none"), 64, False, and the dtype (`torch_dtype`) it had before; None: as on disk. Where qlab.json or
        the base itself says so, that counts, and anything else given is refused.
    skip_modules : llm_int8_skip_modules of that load. None: transformers' own choice.
    dry_run : decide, predict, and write nothing.
    verify : "layers": read every tensor again, and compare each layer's output with base and adapter on random inputs;
        "model": that, and the logits of both models, each loaded whole in float32; "none".
    progress : show a bar. log : where lines of text go.

    Raises ValueError, FileNotFoundError, ConnectionError as `read_adapter` and `locate` do; FileExistsError for `out`; OSError
    where the disk is full; RuntimeError where the verification fails. Whatever is raised, nothing is left behind.
    """
    out = Path(out).expanduser().absolute()
    if verify not in VERIFY:
        raise ValueError(f"verify is one of {', '.join(VERIFY)}, got {verify!r}")
    _check_out(out)
    plan = make_plan(
        base,
        adapter,
        how,
        dtype=dtype,
        base_quant=base_quant,
        double_quant=double_quant,
        block_size=block_size,
        base_dtype=base_dtype,
        skip_modules=skip_modules,
    )
    log(str(plan))
    with torch.no_grad():
        log(survival_text(plan, predict_survival(plan)))
        if dry_run:
            log("dry run: nothing was written")
            return plan
        _write(plan, out, verify, progress, log)
    log(f"written  {out}")
    return plan


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder: give another, or remove it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder: make it first")


def _write(plan: Plan, out: Path, verify: str, progress: bool, log: Callable[[str], None]) -> None:
    total = sum(entry.nbytes for entry in plan.entries.values())
    try:
        with _partial_folder(out) as folder, tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            worst = 0.0
            for file in plan.files:
                checks, crc = _write_file(plan, folder / file, file, bar)
                if verify != "none":
                    worst = max([worst, *verify_file(plan, folder / file, checks, crc)])
            _write_side_files(plan, folder)
            if verify != "none":
                log(f"verified every tensor read again; outputs of layers within {worst:.1e} of {reference_name(plan)}")
            if verify == "model":
                log(verify_model(plan, folder))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(out.parent).free
            raise OSError(
                error.errno, f"the disk is full: {_out_bytes(plan) / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free, "
                "and nothing was left behind. Free some, or write elsewhere", str(out)
            ) from error  # fmt: skip
        raise


def _out_bytes(plan: Plan) -> int:
    specs = [spec for file in plan.files for spec in plan.specs(file).values()]
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in specs if isinstance(dtype, torch.dtype))


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, or goes. Those of merges that were killed go first."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        with _locked(left) as free:
            if free:
                shutil.rmtree(left)
    folder = out.parent / f".{out.name}.partial-{os.getpid()}"
    folder.mkdir()
    try:
        with _locked(folder):
            yield folder
            for path in (*folder.iterdir(), folder):
                _sync(path)
            os.rename(folder, out)  # replaces an empty folder, and no other
            _sync(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether the folder could be locked, as long as this process lives or the block lasts."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_file(plan: Plan, path: Path, file: str, bar: tqdm) -> tuple[list[Check], dict[str, int]]:
    """Write one file of the result. Returns what its layers have to compute, and the checksums of its tensors."""
    checks = []
    with ShardWriter(path, plan.specs(file)) as writer:
        for key, entry in plan.files[file].items():
            layer = plan.layers.get(key)
            if layer and (layer.quantized or layer.adapter):
                tensors, check = merged_layer(plan, layer)
                checks += [check] if check else []
                for end, tensor in tensors.items():
                    writer.write(f"{layer.key}.{end}", tensor)
                del tensors
            elif not plan.is_part(key):
                _keep(plan, writer, key, entry)
            bar.update(entry.nbytes)
    return checks, writer.crc


def _keep(plan: Plan, writer: ShardWriter, key: str, entry: Entry) -> None:
    """A tensor that no adapter and no quantization changes: its bytes, or its values in another dtype."""
    dtype = plan.kept_dtype(entry.torch_dtype)
    through = plan.base_dtype if plan.how != "original" and entry.torch_dtype.is_floating_point else None
    if dtype == entry.torch_dtype and through in (None, dtype):
        writer.copy(key, entry)
        return
    tensor = entry.read().to(through or dtype)
    writer.write(key, _finite(key, tensor.to(dtype)))


def _finite(key: str, tensor: Tensor) -> Tensor:
    ends = (
        tensor.aminmax() if tensor.numel() else ()
    )  # NaN and Inf show in them, and nothing of the tensor's size is made
    if not all(end.isfinite() for end in ends):
        raise ValueError(
            f"{key} holds NaN or Inf in {tensor.dtype}: the base does already, or the dtype is too narrow for it"
        )
    return tensor


def trained_on(plan: Plan, layer: BaseLayer) -> Tensor:
    """Ŵ (out, in), in the dtype the base had; for how="original" W as it is on disk."""
    if plan.prequantized and layer.quantized:
        return plan.storage.decode({end: entry.read() for end, entry in plan.stored_entries(layer).items()})
    w = _float_weight(plan, layer)
    if plan.how == "original":
        return w
    w = w.to(plan.base_dtype or w.dtype)
    return plan.storage.decode(_encoded(plan, layer, w)) if layer.quantized else w


def _float_weight(plan: Plan, layer: BaseLayer) -> Tensor:
    """W (out, in) as it is on disk."""
    w = plan.entries[f"{layer.key}.weight"].read()
    return w.T.contiguous() if layer.conv1d else w


def _encoded(plan: Plan, layer: BaseLayer, w: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    try:
        return plan.storage.encode(w, dtype)
    except ValueError as error:
        error.add_note(f"for {layer.key}.weight of the base")
        raise


def merged_layer(plan: Plan, layer: BaseLayer) -> tuple[dict[str, Tensor], Check | None]:
    """What is written for a layer, by the end of its keys, and what that has to compute (None: codes without an adapter)."""
    key = f"{layer.key}.weight"
    if plan.stores(layer) and not layer.adapter:
        if plan.prequantized:
            return {end: entry.read() for end, entry in plan.stored_entries(layer).items()}, None
        w = _float_weight(plan, layer)
        return _encoded(plan, layer, w.to(plan.base_dtype or w.dtype)), None
    w_hat = trained_on(plan, layer)
    x = torch.randn(INPUTS, layer.shape[1], generator=torch.Generator().manual_seed(0))
    y = product(x, w_hat)
    if layer.adapter:
        a, b = layer.adapter.factors()
        y += ((x @ a.T.float()) @ b.T.float()) * layer.adapter.scaling
        dtype = torch.float32 if plan.stores(layer) else plan.kept_dtype(w_hat.dtype)
        w_hat = _added(w_hat, a, b, layer.adapter.scaling, dtype)
    if plan.stores(layer):
        tensors = _encoded(plan, layer, w_hat, plan.codes_dtype(layer))
        return tensors, Check(layer, x, y, _apart(plan.storage.decode(tensors), w_hat))
    own = plan.codes_dtype(layer) if layer.quantized else plan.entries[key].torch_dtype
    w_hat = _finite(key, w_hat.to(plan.kept_dtype(own)))
    return {"weight": w_hat.T if layer.conv1d else w_hat}, Check(layer, x, y, 0.0)


def _apart(found: Tensor, target: Tensor) -> float:
    """‖found − target‖ / ‖target‖, some rows at a time."""
    step = max(1, SLAB // target.shape[1])
    pairs = zip(found.split(step), target.split(step), strict=True)
    return (sum(float((f.float() - t).square().sum()) for f, t in pairs) ** 0.5) / float(target.norm())


def _added(w_hat: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Ŵ + scaling · B·A in `dtype`, some rows at a time."""
    merged, step = torch.empty(w_hat.shape, dtype=dtype), max(1, SLAB // w_hat.shape[1])
    for start in range(0, len(w_hat), step):
        rows = slice(start, start + step)
        merged[rows] = add(w_hat[rows], b[rows] @ a * scaling, dtype)
    return merged


def _write_side_files(plan: Plan, folder: Path) -> None:
    """config.json, the index, what else a model folder has, and a record of the merge."""
    config = {key: value for key, value in plan.config.items() if key != "quantization_config"}
    if plan.how == "requantize":
        config["quantization_config"] = plan.storage.config(plan.skipped, _main_dtype(plan))
    changed = plan.dtype or (plan.base_dtype if plan.how != "original" else None)
    for part in [config, *(value for value in config.values() if isinstance(value, dict))] if changed else []:
        for key in ("dtype", "torch_dtype"):
            if key in part and part is not config.get("quantization_config"):
                part[key] = dtype_name(changed)
    if changed and "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype_name(changed)
    for pattern in SIDE_FILES:
        for path in plan.base.glob(pattern):
            if path.is_file() and path.name not in ("config.json", INDEX):
                shutil.copyfile(path, folder / path.name)
    _dump(folder / "config.json", config)
    if (plan.base / INDEX).is_file():
        weight_map = {key: file for file in plan.files for key in plan.specs(file)}
        _dump(
            folder / INDEX,
            {"metadata": {"total_size": _out_bytes(plan)}, "weight_map": dict(sorted(weight_map.items()))},
        )
    _dump(folder / "qlab_merge.json", {
        "how": plan.how, "base": str(plan.base), "adapter": str(plan.adapter.path),
        "base_quantization": str(plan.storage) if plan.storage else "none",
        "base_dtype": dtype_name(plan.base_dtype) if plan.base_dtype else None,
        "merged_layers": [layer.name for layer in plan.adapted],
    })  # fmt: skip


def _main_dtype(plan: Plan) -> torch.dtype:
    """The dtype in which a re-quantized model computes: that of its layers before."""
    return next(plan.codes_dtype(layer) for layer in plan.layers.values() if layer.quantized)


def _dump(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
