"""What takes too long for `make test`: `make full` runs it, and writes data/tables/full.json when all of it has passed.

Fifty fine-tunes, ten for each method, each killed at a random moment and resumed: they must end in the bits of one left alone.
Then the two sweeps whose cells are kept in build/cells: what has been measured before is read, the rest is measured.
"""

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from qlab.train.corpus import DATA

RECORD, BUILD = DATA / "tables" / "full.json", Path("build")
KILLS = [
    f"tests/train/test_finetune_kill.py build/kills/{method} --runs 10 --kills 1 --method {method}"
    for method in ("lora", "qlora", "qalora", "qat-lora", "bitfit")
]
SWEEPS = [
    "-m qlab.train.sweep --jobs 2 --cells build/cells/methods",
    "-m qlab.train.qat_lora_sweep --tune --jobs 2 --cells build/cells/qat_lora",
    "-m qlab.train.qat_lora_sweep --jobs 2 --cells build/cells/qat_lora",
]


def cells() -> int:
    return len(list(BUILD.glob("cells/*/*.json")))


def run(command: str) -> dict:
    before, start = cells(), time.monotonic()
    subprocess.run([sys.executable, *command.split()], check=True, stdout=subprocess.DEVNULL)
    took = {"command": f"python {command}", "seconds": round(time.monotonic() - start)}
    return took | ({"cells_measured": cells() - before, "cells_found": before} if "--cells" in command else {})


def main() -> None:
    shutil.rmtree(BUILD / "kills", ignore_errors=True)
    steps = []
    for command in KILLS + SWEEPS:
        print(command, flush=True)
        steps.append(run(command))
    content = {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "steps": steps,
    }
    unfinished = RECORD.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, RECORD)


if __name__ == "__main__":
    main()
