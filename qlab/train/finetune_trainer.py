"""transformers' Trainer with qlab's checkpoints and evaluation; the training loop is Trainer's own.

What is replaced, in transformers 5.23 (trainer.py):
- `_save_checkpoint` writes the frozen base again each time, and torch.save's pickles, straight under the final name, and deletes old
  checkpoints by time: here only what trains, and the order of checkpoints.py.
- `_load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_rng_state` read those.
- `evaluate` runs in every process on all rows, so that its result depends on neither their number nor its batches.
"""

import contextlib
import json
import shutil
import threading
import time
from pathlib import Path

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from qlab.models.guard import guard_bitsandbytes
from qlab.models.load import quiet
from qlab.train import checkpoints
from qlab.train.finetune_callbacks import Bar, StopAtInterrupt, StopAtNaN
from qlab.train.ledger import Ledger, measure

guard_bitsandbytes()
with quiet():  # importing Trainer imports every quantization library that is installed, with its notices
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.trainer import TRAINER_STATE_NAME


def training_arguments(settings, folder: Path, evaluates: bool) -> TrainingArguments:
    """Settings of `qlab.train.finetune` in the words of transformers' Trainer."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1.0,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        optim="adamw_torch",
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.compute == "bfloat16",
        use_cpu=settings.device == "cpu",
        save_steps=settings.save_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        activation_checkpointing=settings.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        fsdp=settings.fsdp,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=settings.device != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    if arguments.n_gpu > 1:  # one process uses one device: Trainer would spread it over all by DataParallel
        arguments._n_gpu = 1
    return arguments


class FinetuneTrainer(Trainer):
    """Trains `model` on rows that `task` has encoded.

    checkpoints : the folder they are in. eval_rows : what `evaluate` scores; None: nothing is.
    seconds, positions, targets : of the whole run, those before a resume included. positions: token ids read, padding
    included; targets: tokens (or texts) that had a loss. Over all processes.
    """

    def __init__(self, model, args: TrainingArguments, task, rows, eval_rows, folder: Path, progress: bool):
        self.use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        bar = [Bar()] if progress and args.process_index == 0 else []
        self.stop = StopAtInterrupt()
        super().__init__(
            model,
            args,
            task.collate,
            rows,
            eval_rows,
            compute_loss_func=task.loss,
            callbacks=[StopAtNaN(), self.stop, *bar],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is the task's: the model needs no count of targets
        self.task, self.folder = task, folder
        self.seconds, self.positions, self.targets, self.started = 0.0, 0, 0, time.monotonic()

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate 1.15 shards on accelerators only, and on CPUs takes DDP without a word: there it is told to shard."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            plugin, state = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args), self.accelerator.state
            state.distributed_type, state.fsdp_plugin, self.is_fsdp_enabled = DistributedType.FSDP, plugin, True

    def run(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint or from the start. Raises KeyboardInterrupt, which says from where the run can go on."""
        # Processes that stop at different steps would wait for each other for ever: with several, Ctrl-C ends them at once.
        alone = self.args.world_size == 1 and threading.current_thread() is threading.main_thread()
        try:
            with self.stop.listening() if alone else contextlib.nullcontext():
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if self.state.global_step < self.state.max_steps:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            saved = checkpoints.latest(self.folder, warn=False)
            place = "the start" if saved is None else f"step {saved[0]}"
            raise KeyboardInterrupt(
                f"interrupted at step {self.state.global_step} of {self.state.max_steps}; --resume goes on from {place}"
            ) from None

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.positions += inputs["input_ids"].numel()
        self.targets += int((inputs["labels"] >= 0).sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *_, **__) -> dict[str, float]:
        """The task's scores on `eval_rows`, logged as eval_…"""
        self.model.eval()
        scores = self.task.evaluate(self.model, self.eval_dataset, self.args.eval_batch_size)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # what no backward follows stays gathered, and is then not what the optimizer holds
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def counts(self) -> dict[str, float]:
        """seconds, positions and targets so far. Every process must call it."""
        counted = torch.tensor([[self.positions, self.targets]], device=self.args.device)
        positions, targets = self.accelerator.gather(counted).sum(0).tolist()
        return {"seconds": self.seconds + time.monotonic() - self.started, "positions": positions, "targets": targets}

    def plain_model(self):
        """The model as it was before Trainer wrapped it, in eval mode."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.use_cache is not None:  # Trainer turns it off for good
            model.config.use_cache = self.use_cache
        return model.eval()

    def memory(self) -> Ledger | None:
        """Measured, with a backward pass of the longest rows as a batch. None where several processes share the model."""
        if self.args.world_size > 1:
            return None
        inputs = self._prepare_inputs(self.task.collate(longest(self.train_dataset, self.args.train_batch_size)))
        labels = inputs.pop("labels")
        return measure(self.model, self.optimizer.optimizer, lambda: self.task.loss(self.model(**inputs), labels))

    def _save_checkpoint(self, model, trial) -> None:
        step, first = self.state.global_step, self.args.process_index == 0
        partial = checkpoints.path_of(self.folder, step).with_suffix(checkpoints.PARTIAL)
        tensors = checkpoints.trained_tensors(self.model)
        moments, rest = checkpoints.optimizer_state(self.optimizer.optimizer, self.model)
        counts = self.counts()
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            checkpoints.save_tensors(partial / checkpoints.TRAINED, tensors)
            checkpoints.save_tensors(partial / checkpoints.OPTIMIZER, moments)
            scheduler = self.lr_scheduler.state_dict()
            state = {"optimizer": rest, "scheduler": scheduler, "counts": counts}
            checkpoints.write_json(partial / checkpoints.STATE, state)
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        checkpoints.write_json(partial / self._rng_file(), checkpoints.rng_state())
        self.accelerator.wait_for_everyone()
        if first:
            checkpoints.delete_others(self.folder, checkpoints.complete(partial, step))
        self.accelerator.wait_for_everyone()

    def _rng_file(self) -> str:
        return f"rng-{self.args.process_index}.json"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        tensors = checkpoints.load_tensors(Path(resume_from_checkpoint) / checkpoints.TRAINED)
        checkpoints.load_trained(self.model if model is None else model, tensors)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = _read(Path(checkpoint) / checkpoints.STATE)
        moments = checkpoints.load_tensors(Path(checkpoint) / checkpoints.OPTIMIZER)
        checkpoints.load_optimizer(self.optimizer.optimizer, self.model, moments, state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        counts = state["counts"]
        self.seconds = counts["seconds"]
        if self.args.process_index == 0:  # the sum over processes is what was saved
            self.positions, self.targets = counts["positions"], counts["targets"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.set_rng_state(_read(Path(checkpoint) / self._rng_file()))


def longest(rows: list, count: int) -> list:
    """The `count` rows with most tokens."""
    return sorted(rows, key=lambda row: len(row[0]), reverse=True)[:count]


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
