"""Several processes train what one would: FSDP2 shares the parameters, DDP copies them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlab.train.tasks import question_task

FSDP, DDP = (Path(__file__).with_name(f"{name}_worker.py") for name in ("fsdp", "ddp"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(*arguments) -> str:
    """What a Python process with these arguments prints. One thread each, so that sums do not depend on the machine."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(output: str) -> list[dict]:
    return sorted((json.loads(line) for line in output.splitlines() if line[:1] == "{"), key=lambda r: r["rank"])


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_fsdp2_shares_the_model_and_trains_the_same_adapter(method):
    (alone,), shared = results(run(FSDP, method)), results(run(*TORCHRUN, FSDP, method))
    assert [result["rank"] for result in shared] == [0, 1]
    assert shared[0]["adapter"] == shared[1]["adapter"]
    assert shared[0]["losses"] == shared[1]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert alone["losses"][-1] < alone["losses"][0] / 2
    for result in shared:  # every row of every parameter is on one rank; packed codes are buffers, on both
        assert result["parameter_bytes"] * 2 == alone["parameter_bytes"]
        assert result["buffer_bytes"] == alone["buffer_bytes"]


@pytest.mark.parametrize("method", ["qlora", "qalora"])
def test_two_processes_train_what_one_does(tmp_path, method):
    """The same rows at every step, half of them in each process: the means differ by rounding, and so does what comes of them."""
    train, test = question_task(0, 20, 10)
    for name, items in (("train", train), ("test", test)):
        rows = [json.dumps({"prompt": item.prompt, "answer": item.answer}) for item in items]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "model": "qlab-mini", "method": method, "data": str(tmp_path / "train.jsonl"),
        "eval_data": str(tmp_path / "test.jsonl"), "steps": 8, "eval_steps": 8, "save_steps": 4, "device": "cpu",
    }  # fmt: skip
    one = settings | {"out": str(tmp_path / "one"), "batch_size": 16}
    two = settings | {"out": str(tmp_path / "two"), "batch_size": 8}
    (alone,), both = results(run(DDP, json.dumps(one))), results(run(*TORCHRUN, DDP, json.dumps(two)))
    assert [result["rank"] for result in both] == [0, 1]
    assert both[0]["adapter"] == both[1]["adapter"] != alone["adapter"]
    alone, both = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("one", "two"))
    assert both["machine"]["processes"] == 2
    losses = [[row["loss"] for row in record["curve"]] for record in (alone, both)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < 0.9 * losses[0][0]
    assert both["evaluations"][-1]["loss"] == pytest.approx(alone["evaluations"][-1]["loss"], rel=1e-3)
    assert both["targets"] == alone["targets"]  # padding is each its own
    assert not list(tmp_path.glob("*/checkpoints"))
