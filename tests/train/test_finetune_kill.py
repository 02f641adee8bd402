"""Killed with SIGKILL ten times and resumed, a run ends in the bits of one that was left alone.

python tests/train/test_finetune_kill.py FOLDER --runs 10      ten runs, each killed once or more at random: `make full`
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

METHODS = ("lora", "qlora", "qalora", "qat-lora", "bitfit")


def settings_of(folder: Path, out: str, method: str = "qlora"):
    from qlab.train.finetune import Settings

    return Settings(
        model="qlab-mini", method=method, data=folder / "train.jsonl", eval_data=folder / "test.jsonl", out=folder / out,
        lora_dropout=0.0 if method == "qat-lora" else 0.1, targets=("q_proj", "down_proj"), r=4, steps=60, batch_size=3,
        grad_accum=2, save_steps=4, eval_steps=7, max_length=40, device="cpu",
    )  # fmt: skip


def write_rows(folder: Path) -> None:
    """31 rows: with six to a step no epoch ends where a checkpoint does."""
    rows = [{"prompt": f"Question: {n} and {n}?\nAnswer:", "answer": f" {2 * n}"} for n in range(31)]
    for name, part in (("train.jsonl", rows), ("test.jsonl", rows[:5])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))


def killed(settings, rng: random.Random) -> bool:
    """One process that trains, killed some steps from where it began, at any moment of a step. False: it came to its end."""
    from qlab.train.finetune import finetune
    from qlab.train.finetune_trainer import FinetuneTrainer

    read, write = os.pipe()
    child = os.fork()  # everything is imported already: ten imports of it would take longer than the runs
    if child == 0:
        step = FinetuneTrainer.training_step

        def reported(self, *args):
            os.write(write, b".")
            return step(self, *args)

        FinetuneTrainer.training_step = reported
        status = 1
        try:
            finetune(settings, resume=True)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    for _ in range(rng.randint(1, 2 * 10)):  # two forwards a step
        if not os.read(read, 1):
            break
    time.sleep(rng.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return False
    return True


def same_bits(folder: Path, one: str, other: str) -> None:
    records = [json.loads((folder / out / "record.json").read_text()) for out in (one, other)]
    for key in ("adapter_sha256", "curve", "evaluations", "positions", "targets"):
        assert records[0][key] == records[1][key], f"{other}: another {key}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument(
        "--kills", type=int, default=10, help="of all runs together, at most; a finished run is replaced"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, default="qlora")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_rows(args.folder)
    import torch

    from qlab.train.finetune import finetune

    torch.set_num_threads(1)
    rng, kills = random.Random(args.seed), 0
    left_alone = settings_of(args.folder, "alone", args.method)
    if (child := os.fork()) == 0:
        finetune(left_alone)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for number in range(args.runs):
        settings = dataclasses.replace(left_alone, out=str(args.folder / f"killed-{number}"))
        for _ in range(args.kills):
            if not killed(settings, rng):
                break
            kills += 1
        if (child := os.fork()) == 0:
            finetune(settings, resume=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        same_bits(args.folder, "alone", f"killed-{number}")
    print(kills)


def test_ten_kills_change_no_bit(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5, "the run was over before it could be killed often enough"
    assert not (tmp_path / "killed-0" / "checkpoints").exists(), "a finished run needs no checkpoints"


if __name__ == "__main__":
    main()
