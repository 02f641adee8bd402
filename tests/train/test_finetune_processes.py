"""Two processes that share the model (FSDP2) are stopped, resumed, and train as one process does that takes both batches."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

ARGUMENTS = {"steps": 6, "save_steps": 2, "eval_steps": 3, "device": "cpu", "targets": ("q_proj", "down_proj")}


def rank(folder: Path, stop: int) -> None:
    """One process of torchrun. stop: the step in which all of them end, without a word; 0: none."""
    from qlab.train import finetune_trainer
    from qlab.train.checkpoints import trained_tensors
    from qlab.train.finetune import Settings, finetune

    number, out = os.environ["RANK"], folder / "shared"
    step = finetune_trainer.FinetuneTrainer.training_step

    def watched(self, *arguments):
        sharded = sum(hasattr(p, "to_local") for p in self.model.parameters() if p.requires_grad)
        (folder / f"sharded-{number}").write_text(str(sharded))
        if stop and self.state.global_step + 1 == stop:
            os._exit(0)
        return step(self, *arguments)

    finetune_trainer.FinetuneTrainer.training_step = watched
    data = {"data": folder / "train.jsonl", "eval_data": folder / "test.jsonl"}
    result = finetune(
        Settings("qlab-mini", "qlora", out=out, batch_size=4, fsdp=True, **data, **ARGUMENTS), resume=True
    )
    digest = hashlib.sha256()
    for tensor in trained_tensors(result.model).values():
        digest.update(tensor.numpy().tobytes())
    (folder / f"digest-{number}").write_text(digest.hexdigest())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("processes")
    rows = [{"prompt": f"Question: {n} and {n}?\nAnswer:", "answer": f" {2 * n}"} for n in range(32)]
    for name, part in (("train.jsonl", rows), ("test.jsonl", rows[:5])):
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    return home


@pytest.fixture(scope="module")
def alone(folder):
    """One process with the batch of both."""
    from qlab.train.finetune import Settings, finetune

    data = {"data": folder / "train.jsonl", "eval_data": folder / "test.jsonl"}
    return finetune(Settings("qlab-mini", "qlora", out=folder / "alone", batch_size=8, **data, **ARGUMENTS))


def launch(folder, stop: int = 0):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--standalone",
    ]
    done = subprocess.run(
        [*command, __file__, str(folder), str(stop)], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_of_two_processes_goes_on_where_it_stopped(folder, alone):
    launch(folder, stop=4)
    assert not (folder / "shared" / "record.json").exists()
    launch(folder)
    digests = [(folder / f"digest-{n}").read_text() for n in (0, 1)]
    assert digests[0] == digests[1]
    sharded = [int((folder / f"sharded-{n}").read_text()) for n in (0, 1)]
    trained = sum(isinstance(p, nn.Parameter) and p.requires_grad for p in alone.model.parameters())
    assert sharded == [trained] * 2, "accelerate takes DDP on a CPU where FSDP was asked for"
    record = json.loads((folder / "shared" / "record.json").read_text())
    assert record["machine"]["processes"] == 2 and record["targets"] == alone.record["targets"]
    curve, expected = ([row["loss"] for row in r["curve"]] for r in (record, alone.record))
    assert curve == pytest.approx(expected, rel=1e-5)
    for scores, wanted in zip(record["evaluations"], alone.record["evaluations"], strict=True):
        assert scores == pytest.approx(wanted, rel=1e-4)


if __name__ == "__main__":
    rank(Path(sys.argv[1]), int(sys.argv[2]))
