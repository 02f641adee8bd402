"""A sweep that can be stopped at any time: each cell is one JSON file, named by its settings, and is measured once.

    measure(cell) → row, a dict of what JSON can hold;  cell = {"task": "questions", "method": "lora", "bits": 4, "seed": 0}
    rows = run_cells(measure, cells, folder)

A cell counts as measured once its file is there, and the file is renamed into place when it is whole: after a kill, the next
run measures what is missing and nothing else. The settings are inside the file, and a file whose settings are others is refused.
What the name does not hold is the code: delete the folder, or give the cells a version, when what `measure` does has changed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from joblib import Parallel, delayed
from tqdm.auto import tqdm


def run_cells(
    measure: Callable[[dict], dict], cells: Sequence[dict], folder: str | Path, jobs: int = 1, progress: bool = True
) -> list[dict]:
    """The row of every cell, in the order of `cells`: read where it was measured before, measured now where not.

    measure : called in one of `jobs` processes with one thread each, so that results do not depend on how many there are. It
        must be importable (joblib sends it by name) and depend on the cell alone.
    folder : where the files are. Two sweeps may share it: their cells differ.

    Raises ValueError for cells that are equal, or that JSON does not hold as they are, and for files that are damaged or of other
    settings; and what `measure` raises, with the cell as a note. What was measured by then is kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [cell_name(cell) for cell in cells]
    if len(set(names)) < len(names):
        raise ValueError(f"{len(names)} cells, and {len(names) - len(set(names))} are there twice")
    missing = [n for n, name in enumerate(names) if not (folder / name).exists()]
    work = (delayed(_measured)(measure, cells[n], folder / names[n]) for n in missing)
    done = Parallel(n_jobs=jobs, return_as="generator_unordered")(work)
    for _ in tqdm(done, total=len(missing), disable=not progress or not missing, desc="cells", mininterval=5):
        pass
    return [read_cell(cell, folder / name) for cell, name in zip(cells, names, strict=True)]


def cell_name(cell: dict) -> str:
    """The file of a cell: words that a reader can find, and a digest of all settings."""
    text = json.dumps(cell, sort_keys=True)
    if json.loads(text) != cell:
        raise ValueError(f"JSON does not hold {cell} as it is: settings are words, numbers, true or false, and lists")
    words = "-".join(str(cell[key]) for key in sorted(cell) if isinstance(cell[key], str | int)).replace(" ", "_")
    safe = "".join(letter for letter in words if letter.isalnum() or letter in "-_.")
    return f"{safe[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def read_cell(cell: dict, path: Path) -> dict:
    """The row in a cell's file. Raises ValueError where the file is not whole or was measured with other settings."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored, row = content["cell"], content["row"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of a measured cell ({error}): delete it to measure it again") from error
    if stored != cell:
        raise ValueError(f"{path} was measured with {stored}, not {cell}: delete it to measure it again")
    return row


def _measured(measure: Callable[[dict], dict], cell: dict, path: Path) -> None:
    torch.set_num_threads(1)  # sums of floats depend on how many threads share them
    try:
        row = measure(dict(cell))
    except Exception as error:
        error.add_note(f"while measuring {cell}")
        raise
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps({"cell": cell, "row": row}, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
