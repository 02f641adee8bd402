"""Measured tables as CSV files: how an estimate is written down, and a file that is whole or not there."""

import csv
import os
from pathlib import Path

from qlab.train.evaluate import Estimate


def estimate_columns(name: str, estimate: Estimate, digits: int = 5) -> dict[str, str]:
    """An estimate as three columns of a table: name, name_low, name_high."""
    low, high = f"{estimate.low:.{digits}f}", f"{estimate.high:.{digits}f}"
    return {name: f"{estimate.value:.{digits}f}", f"{name}_low": low, f"{name}_high": high}


def write_table(path: Path, rows: list[dict]) -> None:
    """Write all rows, or, where that fails, leave the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)
