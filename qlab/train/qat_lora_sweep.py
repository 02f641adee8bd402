"""QAT + LoRA in three schools against rounding after training: `python -m qlab.train.qat_lora_sweep` → data/tables/qat_lora.csv.

Every method trains adapters of the same r, for as many steps, on the same batches of a task of `merge_tasks`. Weights are rounded
to integers in groups of 32, factors to integers by rows (r is shorter than a group).

    lora       float; nothing is rounded while it trains
    merged, base, factors    QAT + LoRA: Q(W + ΔW), Q(W), and Q(A), Q(B); `qlab.adapters.qat_lora`
    qlora      a LoRA over the codes of W: the base school with codes in place of weights, and the same A and B (not in the table)

Each is asked as it was trained (QAT converted to what it stores), and, where an adapter is left, merged into one integer weight:
W + ΔW in floating point, rounded by `rtn` or `gptq`. Rows of `rtn` and `gptq` and the merged school's own store the same bits, and
no adapter. Per row: score with its interval by bootstrap over towns (wordings), paired gains over the merged float LoRA
after rtn and after gptq, seconds of processor time a step, bytes that training needs, bits per weight; `right` counts right answers
town by town, so that any rows can be compared in pairs.

`--tune` measures the learning rates of `GRID` on towns of the training half, which then do not train, and writes
data/tables/qat_lora_lr.csv: the share of codes that are no longer those of the rounded W, norm(Δ)/norm(W), and the loss (nats per
token) on training questions after the last step. `RATES` are the best by it; 4 bits have the rate of 3. Not tuned: the encoder,
which has the rate that `merge_tasks` found for a LoRA.

`TRAINED` says which widths and seeds the table has. The base school on the encoder is in merge_encoder.csv, as a LoRA over codes.

Trainings compute in float32: under autocast B·A would be a product in bfloat16, and what trains another weight than what is stored.
"""

import argparse
import copy
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qlab.adapters import LoRALinear, QATLoRALinear, adapters_of, convert_qat_lora, merge
from qlab.adapters.qat_lora import SCHOOLS
from qlab.formats import IntAffine
from qlab.nn import QuantLinear, weight_of
from qlab.train.answers import AnswerLogits
from qlab.train.cells import run_cells
from qlab.train.classify import ClassifyRecipe, padded
from qlab.train.corpus import DATA
from qlab.train.evaluate import batches, bootstrap, encode_items
from qlab.train.merge_tasks import TASKS, IntentTask, MergeTask, TuningTask, base_format
from qlab.train.qat_sweep import compare, training_memory
from qlab.train.tables import estimate_columns, write_table

TABLE, LR_TABLE = DATA / "tables" / "qat_lora.csv", DATA / "tables" / "qat_lora_lr.csv"
BITS, SEEDS = (4, 3, 2), (0, 1, 2)
PTQ = ("rtn", "gptq")
TRAINED = {  # task → method → width → seeds
    "questions": {"merged": dict.fromkeys(BITS, SEEDS), "base": dict.fromkeys(BITS, SEEDS), "factors": {3: SEEDS}},
    "intents": {"merged": dict.fromkeys(BITS, SEEDS)},
}
GRID = {  # (task, bits, method) → the learning rates that it is measured at
    ("questions", 3, "merged"): (1e-4, 1e-3, 3e-3, 1e-2, 1e-1),
    ("questions", 3, "base"): (1e-4, 1e-3, 3e-3, 1e-2),
    ("questions", 3, "factors"): (3e-3, 1e-2, 3e-2),
    ("questions", 3, "lora"): (3e-3, 1e-2),
    ("questions", 2, "merged"): (1e-3, 3e-3, 1e-2),
    ("questions", 2, "base"): (3e-3, 1e-2, 3e-2),
    ("questions", 2, "lora"): (3e-3, 1e-2, 3e-2),
}
RATES = {  # of the main table: task → method → width → learning rate
    "questions": {
        "lora": dict.fromkeys(BITS, 1e-2), "merged": dict.fromkeys(BITS, 3e-3),
        "base": {4: 3e-3, 3: 3e-3, 2: 1e-2}, "factors": dict.fromkeys(BITS, 1e-2),
    },
    "intents": dict.fromkeys(("lora", *SCHOOLS), dict.fromkeys(BITS, 3e-3)),
}  # fmt: skip


@lru_cache(maxsize=2)
def task_of(name: str, seed: int, tuning: bool = False) -> MergeTask:
    """The task of a cell: `tuning` has other questions than the final measurement."""
    return ({"questions": TuningTask} if tuning else TASKS)[name](seed)


def as_classifier(task: MergeTask, model: nn.Module, count: int) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """(classifier, its inputs, labels) of the first `count` training items: what a cross-entropy takes."""
    items = task.train[:count]
    if isinstance(task, IntentTask):
        return model, *padded(task.tokenizer, items)
    ((_, ids, answer),) = batches(encode_items(task.tokenizer, items), task.tokenizer.pad_token_id, count)
    return AnswerLogits(model), {"input_ids": ids, "answer": answer}, ids[:, 1:][answer[:, 1:]]


def factor_format(bits: int) -> IntAffine:
    """What the factors school rounds A and B to: one scale and zero point for each row."""
    return IntAffine(bits, symmetric=False, granularity="channel", float_zero_point=True)


def trained(task: MergeTask, method: str, bits: int, recipe) -> tuple[nn.Module, dict[str, str]]:
    """A trained copy of the task's model, and what training it costs."""
    model = copy.deepcopy(task.model)
    if method == "qlora":
        task.quantize(model, bits)
    kind, settings = "lora", {}
    if method in SCHOOLS:
        fmt = factor_format(bits) if method == "factors" else base_format(bits)
        kind, settings = "qat", {"fmt": fmt, "school": method}
    torch.manual_seed(task.seed)
    start = time.process_time()
    task.adapt(model, kind, recipe, settings)
    seconds = (time.process_time() - start) / recipe.steps
    memory = training_memory(*as_classifier(task, model, recipe.batch_size))
    return model, {"seconds": f"{seconds:.4f}", "memory_mib": f"{memory / 2**20:.1f}"}


def bits_per_weight(model: nn.Module) -> float:
    """What the layers with adapters store, as they are trained: codes and constants or float32, and A and B."""
    layers = adapters_of(model).values()
    return 8 * sum(map(_stored_bytes, layers)) / sum(math.prod(layer.shape) for layer in layers)


def _stored_bytes(layer: LoRALinear) -> int:
    school = layer.school if isinstance(layer, QATLoRALinear) else None
    if school == "merged":
        return layer.quantized_weight().nbytes
    if school == "factors":
        return weight_of(layer.base).nbytes + sum(factor.nbytes for factor in layer.quantized_factors())
    stored = layer.quantized_weight() if school == "base" else weight_of(layer.base)
    if isinstance(layer.base, QuantLinear):
        stored = layer.base.qtensor
    return stored.nbytes + layer.lora_A.nbytes + layer.lora_B.nbytes


@torch.no_grad()
def change(task: MergeTask, model: nn.Module, bits: int) -> dict[str, str]:
    """How far training has come: the share of codes that rounding W + ΔW gives and rounding W does not, and the median
    over layers of norm(Δ)/norm(W). For the base school W is Q(W) here."""
    moved, weights, sizes, fmt = 0, 0, [], base_format(bits)
    for name, layer in adapters_of(model).items():
        q = fmt.quantize(weight_of(task.model.get_submodule(name)))
        school = layer.school if isinstance(layer, QATLoRALinear) else "lora"
        real = layer.merged_weight() if school == "merged" else layer.dequantized_weight()
        start = q.dequantize() if school == "base" else weight_of(task.model.get_submodule(name))
        moved += int((fmt.quantize(real).codes != q.codes).sum())
        weights += real.numel()
        sizes.append(float((real - start).norm() / start.norm()))
    return {"codes_moved": f"{moved / weights:.5f}", "delta_over_weight": f"{np.median(sizes):.5f}"}


def rate(cell: dict) -> dict:
    """One row of the learning-rate table. A float LoRA has the score of what can be stored: merged, and rounded by gptq."""
    task = task_of(cell["task"], cell["seed"], tuning=True)
    model, _ = trained(task, cell["method"], cell["bits"], recipe_of(cell))
    classifier, inputs, labels = as_classifier(task, model, 256)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(classifier(**inputs), labels))
    came = change(task, model, cell["bits"])
    if cell["method"] == "lora":
        merge(model, "dequantize")
        task.quantize(model, cell["bits"], "gptq")
    score = estimate_columns("score", bootstrap(task.scores(model), task.groups))
    prose = {"prose_perplexity": ""} | task.measures(model)
    return cell | score | came | {"loss": f"{loss:.5f}"} | prose


def measured(cell: dict) -> dict:
    """{"rows": every row of one training}: the model as it was trained, and rounded after a merge."""
    task = task_of(cell["task"], cell["seed"])
    widths = cell["bits"] if isinstance(cell["bits"], list) else [cell["bits"]]
    model, cost = trained(task, cell["method"], widths[0], recipe_of(cell))
    return {"rows": list(_rows(task, cell, widths, model, cost))}


def _rows(task: MergeTask, cell: dict, widths: list[int], model: nn.Module, cost: dict) -> Iterator[dict]:
    stored = bits_per_weight(model)
    if cell["method"] in SCHOOLS:
        convert_qat_lora(model)
    same = {name: cell[name] for name in ("task", "seed", "method")}
    width = 32 if cell["method"] == "lora" else widths[0]
    yield same | {"bits": width, "stored": "as trained"} | _score(task, model, stored) | cost | {"lr": cell["lr"]}
    if cell["method"] == "merged":
        return
    merge(model, "dequantize")
    for bits in widths:
        for ptq in PTQ:
            rounded = copy.deepcopy(model)
            report = task.quantize(rounded, bits, ptq)
            row = same | {"bits": bits, "stored": ptq} | _score(task, rounded, report.bits_per_weight)
            yield row | {name: "" for name in cost} | {"lr": cell["lr"]}


def _score(task: MergeTask, model: nn.Module, bits: float) -> dict[str, str]:
    scores = task.scores(model)
    _, index = np.unique(task.groups, return_inverse=True)
    right = " ".join(str(int(count)) for count in np.bincount(index, scores))
    columns = estimate_columns("score", bootstrap(scores, task.groups))
    return columns | {"bits_per_weight": f"{bits:.3f}", "right": right}


def recipe_of(cell: dict):
    """The task's recipe of a LoRA, at the cell's learning rate and steps."""
    recipe = replace(TASKS[cell["task"]].recipes["lora"], lr=cell["lr"], steps=cell["steps"])
    return recipe if isinstance(recipe, ClassifyRecipe) else replace(recipe, bf16=False)


def rate_cells(steps: int | None = None) -> list[dict]:
    """The cells of the learning-rate table, in the order of `GRID`."""
    return [
        {"table": "rates", "task": task, "bits": bits, "seed": 0, "method": method, "lr": lr, "steps": _steps(task, steps)}
        for (task, bits, method), rates in GRID.items() for lr in rates
    ]  # fmt: skip


def cells(task: str, steps: int | None = None) -> list[dict]:
    """The cells of the main table, seed by seed. One float LoRA serves all widths."""
    found = []
    for seed in (seed for seed in SEEDS if any(seed in seeds for w in TRAINED[task].values() for seeds in w.values())):
        same = {"table": "main", "task": task, "seed": seed, "steps": _steps(task, steps)}
        found.append(same | {"method": "lora", "bits": list(BITS), "lr": RATES[task]["lora"][BITS[0]]})
        for method, widths in TRAINED[task].items():
            found += [
                same | {"method": method, "bits": bits, "lr": RATES[task][method][bits]}
                for bits, seeds in widths.items()
                if seed in seeds
            ]
    return found


def _steps(task: str, steps: int | None) -> int:
    return steps or TASKS[task].recipes["lora"].steps


def with_gains(rows: list[dict]) -> list[dict]:
    """The rows, each with its paired gains over the merged float LoRA of its task, seed and width, rounded by rtn and by gptq."""
    rounded = {(r["task"], r["seed"], r["bits"], r["stored"]): r for r in rows if r["method"] == "lora"}
    found = []
    for row in rows:
        gains = {}
        for ptq in PTQ:
            other = rounded.get((row["task"], row["seed"], row["bits"], ptq))
            columns = dict.fromkeys([f"gain_{ptq}{end}" for end in ("", "_low", "_high")], "")
            if other:
                columns = estimate_columns(f"gain_{ptq}", compare({0: _counts(other)}, {0: _counts(row)}, each(row)))
            gains |= columns
        found.append({name: row[name] for name in row if name != "right"} | gains | {"right": row["right"]})
    return found


def _counts(row: dict) -> dict:
    return row | {"right": np.array(row["right"].split(), dtype=int)} if isinstance(row["right"], str) else row


def each(row: dict) -> int:
    """Test items of a group."""
    return 10 if row["task"] == "intents" else 8


def read_table(path: Path = TABLE) -> list[dict]:
    """The rows of a shipped table: numbers as numbers, "" where a row has none, `right` as (groups,) int array."""
    words = {"task", "method", "stored", "right"}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(value) if value else "" for name, value in row.items() if name not in words}
        row |= {name: int(row[name]) for name in ("seed", "bits")}
        if "right" in row:
            row["right"] = np.array(row["right"].split(), dtype=int)
    return rows


def select(rows: list[dict], task: str, method: str, bits: int, stored: str = "as trained") -> dict[int, dict]:
    """seed → the row of `method`, as it is `stored`."""
    wanted = task, method, bits, stored
    return {row["seed"]: row for row in rows if (row["task"], row["method"], row["bits"], row["stored"]) == wanted}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train LoRA through the rounding in three schools, and compare with PTQ."
    )
    parser.add_argument(
        "--cells", type=Path, required=True, help="folder of what is measured: a stopped sweep goes on there"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS))
    parser.add_argument("--steps", type=int, default=None, help="of every training, in place of the recipe's")
    parser.add_argument("--tune", action="store_true", help="measure learning rates instead")
    parser.add_argument("--out", type=Path, default=None, help="written when every cell is measured")
    args = parser.parse_args()
    if args.tune:
        chosen = [cell for cell in rate_cells(args.steps) if cell["task"] in args.tasks]
        rows = run_cells(rate, chosen, args.cells, args.jobs)
        write_table(args.out or LR_TABLE, [{k: v for k, v in row.items() if k != "table"} for row in rows])
        return
    chosen = [cell for task in args.tasks for cell in cells(task, args.steps)]
    found = run_cells(measured, chosen, args.cells, args.jobs)
    write_table(args.out or TABLE, with_gains([row for one in found for row in one["rows"]]))


if __name__ == "__main__":
    from qlab.train import qat_lora_sweep  # joblib sends functions by name, and those of __main__ have none

    qat_lora_sweep.main()
