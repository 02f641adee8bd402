"""Two processes, each with its copy of the model and half of every batch (DDP), train what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlab.train.tasks import question_task

WORKER = Path(__file__).with_name("ddp_worker.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(settings: dict, *launcher: str) -> list[dict]:
    """What each process prints, in the order of their ranks. One thread each, so that sums do not depend on the machine."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, *launcher, str(WORKER), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(map(json.loads, lines), key=lambda result: result["rank"])


def test_two_processes_train_what_one_does(tmp_path):
    """The same rows at every step, half of them in each process: the means differ by rounding, and so does what comes of them."""
    train, test = question_task(0, 20, 10)
    for name, items in (("train", train), ("test", test)):
        rows = [json.dumps({"prompt": item.prompt, "answer": item.answer}) for item in items]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "model": "qlab-mini", "method": "qlora", "data": str(tmp_path / "train.jsonl"),
        "eval_data": str(tmp_path / "test.jsonl"), "steps": 8, "eval_steps": 8, "save_steps": 4, "device": "cpu",
    }  # fmt: skip
    (alone,) = run(settings | {"out": str(tmp_path / "one"), "batch_size": 16})
    both = run(settings | {"out": str(tmp_path / "two"), "batch_size": 8}, *TORCHRUN)
    assert [result["rank"] for result in both] == [0, 1]
    assert both[0]["adapter"] == both[1]["adapter"] != alone["adapter"]
    alone, both = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("one", "two"))
    assert both["machine"]["processes"] == 2
    losses = [[row["loss"] for row in record["curve"]] for record in (alone, both)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < 0.9 * losses[0][0]
    assert both["evaluations"][-1]["loss"] == pytest.approx(alone["evaluations"][-1]["loss"], rel=1e-3)
    assert both["targets"] == alone["targets"]  # padding is each its own
    assert not list(tmp_path.glob("*/checkpoints"))
