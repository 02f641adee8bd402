"""The folder of a fine-tune: may a run use it, does a resumed run agree with it, and what its record says."""

import contextlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import PartialState

from qlab.adapters.base_record import read_json
from qlab.models import trainable_parameters
from qlab.train.finetune_data import Data
from qlab.train.finetune_methods import METHODS
from qlab.train.finetune_settings import Settings
from qlab.train.finetune_trainer import longest
from qlab.train.ledger import Ledger, predict

RUN, RECORD, ADAPTER, CHECKPOINTS = "run.json", "record.json", "adapter", "checkpoints"
MAY_DIFFER = ("data", "eval_data", "out")  # in a resumed run: the files' checksums are compared, wherever they are now


def state_of(out: Path, resume: bool) -> str:
    """ "new", "unfinished" or "finished". Raises ValueError for a folder that this run may not use."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return "new"
    if not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder to write")
    if not (out / RUN).is_file():
        held = ", ".join(sorted(path.name for path in out.iterdir())[:3])
        raise ValueError(f"{out} holds something else ({held}, …), and no {RUN}: name a new folder")
    state = "finished" if (out / RECORD).is_file() else "unfinished"
    if not resume:
        raise ValueError(
            f"{out} holds {'a finished' if state == 'finished' else 'an unfinished'} run: --resume goes on with it, or name a new folder"
        )
    return state


def identity_of(settings: Settings, train: Data, evaluation: Data | None) -> dict:
    """What a resumed run must agree with, beside the base."""
    same = {name: value for name, value in asdict(settings).items() if name not in MAY_DIFFER}
    return {
        "settings": json.loads(json.dumps(same)),
        "data_sha256": train.sha256,
        "eval_data_sha256": evaluation and evaluation.sha256,
        "processes": PartialState().num_processes,
    }


def agree(out: Path, identity: dict) -> None:
    """Compare run.json, where it is there. Raises ValueError that names what differs."""
    path = out / RUN
    if not path.is_file():
        return
    stored = read_json(path)
    flat, was = ({**run.get("settings", {}), **run} for run in (identity, stored))
    for name in flat:
        if name != "settings" and flat[name] != was.get(name):
            values = "" if name == "base" else f" ({was.get(name)!r} then, {flat[name]!r} now)"
            raise ValueError(
                f"{path}: the run that is to go on had another {name}{values}: give it what it had, or name a new folder"
            )


def record_of(settings, trainer, model, train: Data, evaluation: Data | None, counts: dict) -> dict:
    """What record.json says, but for the checksums of what is written."""
    history = trainer.state.log_history
    evaluations = [{k.removeprefix("eval_"): v for k, v in row.items()} for row in history if "eval_loss" in row]
    trained = trainable_parameters(model)
    return {
        "settings": asdict(settings),
        "versions": _versions(),
        "machine": {"device": settings.device, "processes": trainer.args.world_size, "system": platform.platform()},
        "data": _about(train, len(trainer.train_dataset)),
        "eval_data": evaluation and _about(evaluation, len(trainer.eval_dataset)),
        "labels": trainer.task.labels,
        "texts_cut": trainer.task.cut,
        "trainable": sum(parameter.numel() for parameter in trained),
        "steps": trainer.state.global_step,
        **counts,
        "curve": [
            {k: row[k] for k in ("step", "loss", "grad_norm", "learning_rate")} for row in history if "loss" in row
        ],
        "evaluations": evaluations,
    }


def predicted_memory(settings: Settings, task, model, rows: list) -> Ledger | str:
    """The memory of one process, before the run; or why it cannot be said, which is no reason not to run."""
    method, backbone = METHODS[settings.method], task.backbone(model)
    own = {name: value for name, value in method.adapter(settings).items() if name != "fmt"}
    batch = longest(rows, settings.batch_size)
    try:
        return predict(
            task.skeleton(backbone.config),
            settings.method,
            format=method.format(settings),
            backend="bitsandbytes" if settings.bitsandbytes else "qlab",
            r=settings.r,
            target_modules=settings.target_modules,
            head=task.heads,
            autocast=torch.bfloat16 if settings.compute == "bfloat16" else None,
            batch_size=len(batch),
            tokens=len(batch[0][0]),
            gradient_checkpointing=settings.activation_checkpointing,
            **own,
        )
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"not known ({type(error).__name__}: {str(error).splitlines()[0]})"


def rows_of(ledger: Ledger | str | None) -> dict | str | None:
    return ledger.rows if isinstance(ledger, Ledger) else ledger


def _about(data: Data, rows: int) -> dict:
    return {"path": str(data.path), "kind": data.kind, "rows": len(data.rows), "encoded": rows, "sha256": data.sha256}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("qlab", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
