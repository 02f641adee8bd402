"""Fine-tune any language model, or an encoder, by any method of the suite, on transformers' Trainer: `qlab finetune`.

    result = finetune(Settings("qlab-mini", "qlora", "train.jsonl", "out", steps=300))
    out/record.json      settings, versions, data, curves, time, checksums: written last, so a run that has it is finished
    out/adapter/         what was trained: a PEFT folder, or trained.safetensors; head.safetensors beside it for an encoder
    out/run.json         what a resumed run must agree with
    out/checkpoints/     while it runs: see checkpoints.py

A run that was killed goes on from its last whole checkpoint by the same call with resume=True, and on a CPU ends in the same bits: the
order of the data, dropout, optimizer and learning rate are restored. Under torchrun every process calls this; the first one writes.
"""

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor

from qlab.adapters.base_record import RECORD as ADAPTER_RECORD
from qlab.adapters.base_record import read_json
from qlab.adapters.peft_folder import WEIGHTS as PEFT_WEIGHTS
from qlab.models.checksums import sha256
from qlab.train import checkpoints
from qlab.train.finetune_data import labels_of, read_data
from qlab.train.finetune_methods import METHODS, TRAINED, base_record, refuse_another_base
from qlab.train.finetune_run import (
    ADAPTER,
    CHECKPOINTS,
    RECORD,
    RUN,
    agree,
    identity_of,
    predicted_memory,
    record_of,
    rows_of,
    state_of,
)
from qlab.train.finetune_settings import Settings
from qlab.train.finetune_tasks import TASKS
from qlab.train.finetune_trainer import FinetuneTrainer, training_arguments

HEAD = "head.safetensors"


@dataclass(frozen=True)
class Finetuned:
    """model : in eval mode, adapters on; a Classifier for an encoder. record : what record.json holds. folder : `out`."""

    model: nn.Module
    tokenizer: object
    record: dict
    folder: Path


def finetune(settings: Settings, resume: bool = False, progress: bool = False) -> Finetuned:
    """Train as `settings` say, and write `settings.out`.

    resume : go on with the run that `out` holds, from its last whole checkpoint; where it holds none, from the start; where it
        is finished, load it. progress : a bar on stderr.

    Raises, before a model is loaded: ValueError for settings and rows that cannot be, with file and line, and for a folder
    that holds something else; FileNotFoundError for a missing file. Later: what `qlab.models.load`, `add_adapters` and `quantize_model`
    raise, and ValueError for rows too long, for a resumed run whose settings, data or base are others, and for a loss that is NaN.
    """
    settings = settings.settled()
    train = read_data(settings.data)
    evaluation = None if settings.eval_data is None else read_data(settings.eval_data, like=train)
    out = Path(settings.out).expanduser()
    state = state_of(out, resume)
    arguments = training_arguments(settings, out / CHECKPOINTS, evaluation is not None)
    identity = identity_of(settings, train, evaluation)
    agree(out, identity)
    if state == "finished":
        return load_finetuned(out)
    tokenizer, task, model, base = _built(settings, train.kind, labels_of(train))
    rows, eval_rows = task.encode(train), evaluation and task.encode(evaluation)
    agree(out, {"base": base})
    first = PartialState().is_main_process
    PartialState().wait_for_everyone()  # every process has looked at the folder before the first one writes to it
    if first and state == "new":
        out.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(out / RUN, identity | {"base": base})
    predicted = predicted_memory(settings, task, model, rows)
    if progress and first:
        print(f"predicted memory: {predicted}", file=sys.stderr)
    trainer = FinetuneTrainer(model, arguments, task, rows, eval_rows, out / CHECKPOINTS, progress)
    _, checkpoint = checkpoints.latest(out / CHECKPOINTS, warn=first) or (0, None)
    PartialState().wait_for_everyone()
    trainer.run(checkpoint)
    return _finish(settings, trainer, tokenizer, base, train, evaluation, predicted)


def load_finetuned(folder: str | Path, device: str | None = None) -> Finetuned:
    """The model of a finished run: its base, loaded and rounded again, and what was trained on it.

    Raises FileNotFoundError for an unfinished run, ValueError for files that are damaged and for another base.
    """
    folder = Path(folder).expanduser()
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"{folder} has no {RECORD}: it holds no finished run")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    settings = Settings(**record["settings"])
    settings = dataclasses.replace(settings, device=device or settings.device)
    tokenizer, task, model, base = _built(settings, record["data"]["kind"], record["labels"])
    tensors, about = METHODS[settings.method].read(folder / ADAPTER)
    refuse_another_base(folder / ADAPTER / ADAPTER_RECORD, about, base)
    try:
        checkpoints.load_trained(task.backbone(model), tensors)
    except ValueError as error:
        error.add_note(f"while reading {folder / ADAPTER}")
        raise
    if (head := task.head(model)) is not None:
        checkpoints.load_trained(head, _read_head(folder / ADAPTER / HEAD, record["head_sha256"]))
    return Finetuned(model.eval(), tokenizer, record, folder)


def _built(settings: Settings, kind: str, labels: list):
    """(tokenizer, task, model with what trains on it, base_record of what it stands on), the seed set."""
    method = METHODS[settings.method]
    loaded, tokenizer = method.load(settings)
    base = base_record(loaded)
    task = TASKS[kind](tokenizer, _max_length(settings, loaded), labels)
    torch.manual_seed(settings.seed)
    model = task.model(loaded)
    method.adapt(task.backbone(model), settings)
    return tokenizer, task, model, base


def _max_length(settings: Settings, model) -> int:
    limit = getattr(model.config, "max_position_embeddings", None) or float("inf")
    if settings.max_length is None:
        return min(limit, 1024)
    if settings.max_length > limit:
        raise ValueError(f"max_length={settings.max_length}, and {settings.model} reads at most {limit} tokens")
    return settings.max_length


def _finish(settings, trainer, tokenizer, base, train, evaluation, predicted) -> Finetuned:
    """Write the adapter and the record, and take away the checkpoints. Every process must call it."""
    task, out, counts, measured = trainer.task, Path(settings.out).expanduser(), trainer.counts(), trainer.memory()
    model = trainer.plain_model()
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        tensors = checkpoints.trained_tensors(model)
        tokenizer, _, model, _ = _built(settings, train.kind, task.labels)
        checkpoints.load_trained(model, tensors)
    record = record_of(settings, trainer, model, train, evaluation, counts)
    record["memory"] = {"predicted": rows_of(predicted), "measured": rows_of(measured)}
    if trainer.args.process_index == 0:
        partial = out / f".{ADAPTER}{checkpoints.PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        METHODS[settings.method].save(task.backbone(model), partial, settings, base)
        weights = next(path for path in (partial / PEFT_WEIGHTS, partial / TRAINED) if path.is_file())
        record["adapter_sha256"] = sha256(weights)
        if (head := task.head(model)) is not None:
            checkpoints.save_tensors(partial / HEAD, checkpoints.trained_tensors(head))
            record["head_sha256"] = sha256(partial / HEAD)
        for path in partial.iterdir():
            checkpoints.flush(path)
        shutil.rmtree(out / ADAPTER, ignore_errors=True)
        partial.rename(out / ADAPTER)
        checkpoints.write_json(out / RECORD, record)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    PartialState().wait_for_everyone()
    return Finetuned(model.eval(), tokenizer, read_json(out / RECORD), out)


def _read_head(path: Path, digest: str) -> dict:
    if not path.is_file() or sha256(path) != digest:
        raise ValueError(f"{path} is missing, cut off or was changed: its SHA-256 is not the one in {RECORD}")
    return checkpoints.load_tensors(path)
