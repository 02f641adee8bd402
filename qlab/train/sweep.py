"""Every method of the suite on one model, in one table: `python -m qlab.train.sweep` measures it and writes data/tables/methods.csv.

The model, the data and the questions are those of `qlab.train.merge_tasks.MergeTask`; the methods, and what each starts from,
are in `qlab.train.sweep_methods`. One cell is one training (or rounding) at one width and seed; each is a file of its own in
`--cells`, so a sweep that was stopped goes on where it was. The columns:

    exact_match         share of 2,000 questions about 250 towns answered exactly; interval: bootstrap over towns, one seed
    right               how many of the 8 questions about each town, a digit each, the towns in the order of their names
    prose_perplexity    of held-out stories, which no training question has anything to do with
    bits_per_weight     of the linear layers: codes, scales, zero points, tables, input scales, and an adapter where it stays
                        beside the codes (in float32, as it is kept), over the weights of these layers
    model_bytes         of the whole model: the float32 embedding, which is the output layer too, and norms included
    inference_bytes     that, and the largest weight that a forward writes out in float32 from its codes
    training_bytes      weights, what a step on 64 questions keeps for its backward pass, gradients, AdamW's averages
    quantize_seconds    processor time of the quantization or, where a method ends with one, of the merge
    training_seconds    processor time of all its training, that of the float model included where the method starts from it
    time_ratio          processor time of a forward (16 questions) over that of the float model, in the same process
    lr, steps           peak learning rate and steps of the training that is the method's own
    threads, torch      what was measured with

Rows of the family "tuning" were asked about towns of the training half, and are how learning rates were chosen; rows of
`SHORT_STEPS` steps are for whoever wants to measure a few again (`CHEAP`).
"""

import argparse
import csv
import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qlab.train import tasks
from qlab.train.cells import run_cells
from qlab.train.corpus import DATA
from qlab.train.evaluate import Estimate, bootstrap
from qlab.train.sweep_methods import BEST, FLOAT_BITS, FORMATS, PTQ, RATES, STEPS, W8A8, measure
from qlab.train.tables import write_table

TABLE = DATA / "tables" / "methods.csv"
SEEDS = (0, 1, 2)
SHORT_STEPS = 100
TOWNS, EACH = 250, 8
TRAINED = (
    *((make, bits) for bits in (4, 3, 2) for make in ("qlora", "qa-lora", "lsq", "qat-lora", "bitfit")),
    *(("qlora NF4", 4), ("further", FLOAT_BITS)),
)
MORE = (
    *(("format: k-means, channels", 4), ("format: pairs of a codebook", 4)),
    *(("lsq", 8), ("loftq", 4), ("loftq", 2)),
)
CHEAP = (("start", FLOAT_BITS), ("ptq: rtn", 3), ("ptq: gptq", 3), ("format: NF4", 4))


def cells(seeds: Iterable[int] = SEEDS, steps: int = STEPS, model: str = "qlab-mini", more: bool = False) -> list[dict]:
    """The settings of every cell. more: those of `MORE` too, half an hour of one processor that the shipped table does without."""

    def cell(make: str, bits: int, seed: int, **more) -> dict:
        rate = {"lr": BEST[make]} if make in BEST else {}
        return {"make": make, "bits": bits, "seed": seed, "steps": steps, "model": model} | rate | more

    kinds = [("ptq", PTQ), ("format", FORMATS), ("w8a8", W8A8)]
    rounded = [(f"{kind}: {name}", bits) for kind, all_of in kinds for name, bits in all_of]
    rounded = [pair for pair in rounded if pair not in MORE]
    pairs = [("start", FLOAT_BITS), *TRAINED, *rounded, *(MORE if more else ())]
    found = [cell("tuning", 2, 0, method=method, lr=lr) for method, rates in RATES.items() for lr in rates]
    found += [cell(make, bits, seed) for make, bits in pairs for seed in seeds]
    return found + [cell(make, bits, 0, steps=SHORT_STEPS) for make, bits in CHEAP]


def read_table(path: Path = TABLE) -> list[dict]:
    """The rows of the shipped table: numbers as numbers, "" where a row has none, `right` as (towns,) int array."""
    words = ("method", "family", "torch", "right")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(value) if value else "" for name, value in row.items() if name not in words}
        row |= {name: int(row[name]) for name in ("bits", "seed", "steps", "threads", "model_bytes", "inference_bytes")}
        row["right"] = np.array(list(row["right"]), dtype=int)
    return rows


def select(rows: Iterable[dict], method: str, bits: int) -> dict[int, dict]:
    """seed → the row of `method` at this width, of the full training."""
    found = [row for row in rows if (row["method"], row["bits"], row["steps"]) == (method, bits, STEPS)]
    return {row["seed"]: row for row in found if row["family"] != "tuning"}


@functools.cache
def towns(seed: int) -> list[str]:
    """Names of the towns that a seed asks about, in the order of `right`."""
    return sorted({item.entity for item in tasks.question_task(seed, test_towns=TOWNS)[1]})


def estimate(rows: dict[int, dict]) -> Estimate:
    """Exact match of a method (as from `select`) over all its seeds. The interval is a bootstrap over towns, of which a draw
    takes every seed that asks about it; it does not know how far apart trainings with other seeds may come out."""
    return bootstrap(np.concatenate([row["right"] / EACH for row in rows.values()]), _groups(rows))


def difference(first: dict[int, dict], second: dict[int, dict]) -> Estimate:
    """Exact match of `second` − `first`, on the same questions, over the seeds that both have; intervals as `estimate`."""
    seeds = sorted(first.keys() & second.keys())
    gains = [(second[seed]["right"] - first[seed]["right"]) / EACH for seed in seeds]
    return bootstrap(np.concatenate(gains), _groups(seeds))


def _groups(seeds: Iterable[int]) -> list[str]:
    return [name for seed in seeds for name in towns(seed)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure every method at every width on one model and write the table."
    )
    parser.add_argument("--cells", type=Path, default=Path("cells"), help="folder of what has been measured")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--more", action="store_true", help="the cells of MORE too")
    parser.add_argument("--model", default="qlab-mini", help="what qlab.models.load takes")
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    rows = run_cells(measure, cells(args.seeds, args.steps, args.model, args.more), args.cells, args.jobs)
    write_table(args.out, [row for cell in rows for row in cell["rows"]])


if __name__ == "__main__":
    main()
