"""Several processes train what one would: FSDP2 shares the parameters, DDP copies them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("fsdp_worker.py")
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
    (alone,), shared = results(run(WORKER, method)), results(run(*TORCHRUN, WORKER, method))
    assert [result["rank"] for result in shared] == [0, 1]
    assert shared[0]["adapter"] == shared[1]["adapter"]
    assert shared[0]["losses"] == shared[1]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert alone["losses"][-1] < alone["losses"][0] / 2
    for result in shared:  # every row of every parameter is on one rank; packed codes are buffers, on both
        assert result["parameter_bytes"] * 2 == alone["parameter_bytes"]
        assert result["buffer_bytes"] == alone["buffer_bytes"]
