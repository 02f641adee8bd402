"""Post-training quantization against training through the rounding: `python -m qlab.train.qat_sweep` → data/tables/qat.csv.

A public encoder with a linear head learns to tell 16 intents apart (`qlab.train.intents`), and its linear layers are then
quantized, one scale per output channel; the head and the word embeddings stay in float32, and the embeddings do not train:
words that only the test's wordings have keep their place.

    steps = S     float, and its weights rounded: rtn, gptq, awq+gptq; and to LSQ's first steps: "lsq, untrained"
    steps = 2S    the same model after as many steps more: float (what more training alone gives) and its rtn; and with the
                  rounding in every forward: lsq, ste, lsq with its first steps for good, lsq with 8-bit activations per token

All that comes with 2S steps has seen the same batches at the same learning rate (LSQ's steps at `grid_lr`). The QAT rows are measured on the converted
model, which stores codes. Test sentences have wordings that no training sentence has, ten of each; `right` counts those that
got their intent, wording by wording, so that any two rows can be compared in pairs.
"""

import argparse
import copy
import csv
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qlab.formats import IntAffine
from qlab.models import load
from qlab.ptq import quantize_model
from qlab.qat import FakeActivations, constrain_weights, convert, grid_parameters, parameter_groups, prepare_qat
from qlab.train.classify import Classifier, ClassifyRecipe, classified, padded, train_classifier
from qlab.train.corpus import DATA
from qlab.train.evaluate import Estimate, bootstrap
from qlab.train.intents import INTENTS, requests
from qlab.train.tables import estimate_columns, write_table

TABLE = DATA / "tables" / "qat.csv"
BITS = (8, 4, 3, 2)
RECIPE = ClassifyRecipe(lr=1e-4, steps=80)
FLOAT_BITS = 32


@dataclass(frozen=True)
class Entry:
    """A QAT row: the method of `prepare_qat`, its widths, the width of activations (None: they stay in float), and whether
    the grid trains, where the method would learn it."""

    method: str
    bits: tuple[int, ...] = BITS
    activations: int | None = None
    learns_grid: bool = True


POST = {"rtn": BITS, "gptq": BITS, "awq+gptq": (3, 2)}
ENTRIES = {
    "lsq": Entry("lsq"),
    "lsq, steps frozen": Entry("lsq", (2,), learns_grid=False),
    "ste": Entry("ste", (2,)),
    "lsq, 8-bit activations": Entry("lsq", (2,), 8),
}


def weight_format(bits: int) -> IntAffine:
    """One scale per output; at 2 bits the codes are −1, 0, 1."""
    return IntAffine(bits, granularity="channel")


def grid_lr(lr: float, bits: int) -> float:
    """A learning rate at which Adam changes LSQ's steps as fast as the weights, each relative to its own size.

    Adam moves a number by about its learning rate. A step starts at 2 · mean|w| / √Q_P, so this is lr · 2 / √Q_P; the aim is
    that of the paper's gradient scale (arXiv:1902.08153, section 2.2), which a rate for each number would undo.
    """
    return lr * 2 / math.sqrt(weight_format(bits).qmax)


def encoder_layers(name: str, module: nn.Module) -> bool:
    """What is quantized: all linear layers but the head."""
    return name != "classifier"


class IntentTask:
    """One seed of the intent task: its own training sentences and batches; the test is the same for all."""

    def __init__(self, seed: int, name: str = "all-MiniLM-L6-v2", train: int = 3000, test: int = 480):
        self.seed = seed
        encoder, self.tokenizer = load(name)
        encoder.pooler = None  # the classifier reads the mean of the hidden states
        torch.manual_seed(seed)
        self.model = Classifier(encoder, len(INTENTS))
        self.model.encoder.embeddings.requires_grad_(False)
        self.train, self.test = requests("train", train, seed), requests("test", test)
        self.wordings = [item.wording for item in self.test]

    def scores(self, model) -> np.ndarray:
        """Which test sentences get their intent: bool, (sentences,)."""
        return classified(model, self.tokenizer, self.test)

    def calibration(self, sentences: int = 256) -> list:
        """Training sentences in batches of 32."""
        items = self.train[:sentences]
        return [dict(padded(self.tokenizer, items[at : at + 32])[0]) for at in range(0, len(items), 32)]

    def trained(self, model, recipe: ClassifyRecipe, bits: int | None = None, progress: bool = False):
        """`model`, trained in place, and the processor seconds of a step. bits: of its grids, for training on: then the
        batches are others than the first time."""
        seed, start = self.seed + 1000 * (bits is not None), time.process_time()
        groups = parameter_groups(model, recipe.lr, 0.0 if bits in (None, FLOAT_BITS) else grid_lr(recipe.lr, bits))
        groups = [group for group in groups if group["params"]]
        train_classifier(
            model, self.tokenizer, self.train, recipe, seed,
            groups=groups, after_step=lambda: constrain_weights(model), progress=progress,
        )  # fmt: skip
        return model, (time.process_time() - start) / recipe.steps


def training_memory(model, batch: dict, labels) -> int:
    """Bytes that training needs: weights, what a step keeps for its backward pass, and three times what trains (the gradient
    and AdamW's two averages). Counted tensor by tensor, every storage once; the code's own needs are not in it."""
    kept = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.state_dict().values()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    training = model.training
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nn.functional.cross_entropy(model(**batch), labels)
    model.train(training)
    trains = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(kept.values()) + 3 * trains


def prepared(model, entry: Entry, bits: int):
    """A copy of the float model with the rounding in its forward pass."""
    model = copy.deepcopy(model)
    activations = None if entry.activations is None else FakeActivations(entry.activations, granularity="token")
    prepare_qat(model, weight_format(bits), entry.method, activations=activations, select=encoder_layers)
    for grid in grid_parameters(model):
        grid.requires_grad_(entry.learns_grid)
    return model


def rounded(task: IntentTask, model, bits: int, method: str):
    """A copy of the float model with its weights rounded, and bits per weight."""
    model, batches = copy.deepcopy(model), None if method == "rtn" else task.calibration()
    report = quantize_model(model, weight_format(bits), method, batches, select=encoder_layers, progress=False)
    return model, report.bits_per_weight


def stored(model):
    """The trained model, its rounded weights stored as codes, and bits per weight."""
    report = convert(model.eval())
    return report.model, report.bits_per_weight


def sweep(task: IntentTask, bits: Iterable[int] = BITS, recipe: ClassifyRecipe = RECIPE) -> Iterator[dict]:
    """Yield every row of one seed."""
    bits, steps = tuple(bits), recipe.steps
    batch, labels = padded(task.tokenizer, task.train[: recipe.batch_size])

    start, seconds = task.trained(task.model, recipe)
    cost = {"seconds": f"{seconds:.3f}", "memory_mib": f"{training_memory(start, batch, labels) / 2**20:.1f}"}
    yield _row(task, "float", FLOAT_BITS, steps, start, FLOAT_BITS, cost)
    for b in bits:
        for method in (method for method, widths in POST.items() if b in widths):
            yield _row(task, method, b, steps, *rounded(task, start, b, method))
        model = prepared(start, ENTRIES["lsq"], b)
        yield _row(task, "lsq, untrained", b, steps, *stored(model))

    further, seconds = task.trained(copy.deepcopy(start), recipe, FLOAT_BITS)
    yield _row(task, "float", FLOAT_BITS, 2 * steps, further, FLOAT_BITS, cost | {"seconds": f"{seconds:.3f}"})
    for b in bits:
        yield _row(task, "rtn", b, 2 * steps, *rounded(task, further, b, "rtn"))

    for name, entry in ENTRIES.items():
        for b in (b for b in bits if b in entry.bits):
            model = prepared(start, entry, b)
            memory = training_memory(model, batch, labels)
            model, seconds = task.trained(model, recipe, b)
            cost = {"seconds": f"{seconds:.3f}", "memory_mib": f"{memory / 2**20:.1f}"}
            yield _row(task, name, b, 2 * steps, *stored(model), cost)


def _row(task: IntentTask, method: str, bits: int, steps: int, model, bits_per_weight: float, cost=None) -> dict:
    scores = task.scores(model)
    row = {"seed": task.seed, "method": method, "bits": bits, "steps": steps}
    row |= estimate_columns("accuracy", bootstrap(scores, task.wordings))
    row |= cost or {"seconds": "", "memory_mib": ""}
    _, index = np.unique(task.wordings, return_inverse=True)
    right = " ".join(str(int(n)) for n in np.bincount(index, scores))
    return row | {"bits_per_weight": f"{bits_per_weight:.3f}", "right": right}


def read_table(path: Path = TABLE) -> list[dict]:
    """The rows of the shipped table: numbers as numbers, "" where a row has none, `right` as (wordings,) int array."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        words = row["method"], np.array(row["right"].split(), dtype=int)
        row |= {name: float(value) if value else "" for name, value in row.items() if name not in ("method", "right")}
        row |= {name: int(row[name]) for name in ("seed", "bits", "steps")}
        row["method"], row["right"] = words
    return rows


def select(rows: list[dict], method: str, bits: int, again: bool) -> dict[int, dict]:
    """seed → the row of `method` at this width; again: after 2S steps, not S."""
    most = max(row["steps"] for row in rows)
    return {
        row["seed"]: row for row in rows
        if (row["method"], row["bits"], row["steps"] == most) == (method, bits, again)
    }  # fmt: skip


def compare(first: dict[int, dict], second: dict[int, dict], each: int = 10) -> Estimate:
    """Accuracy of `second` − `first` (as from `select`), mean over the seeds that both have, and the interval by bootstrap
    over wordings, of which a draw takes all seeds. each: test sentences of a wording."""
    seeds = sorted(first.keys() & second.keys())
    gains = np.mean([second[seed]["right"] - first[seed]["right"] for seed in seeds], axis=0) / each
    return bootstrap(gains, range(len(gains)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure rounding after training and training through the rounding.")
    parser.add_argument("--bits", nargs="+", type=int, default=BITS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument(
        "--steps", type=int, default=RECIPE.steps, help="S: of the float model, and once more of the others"
    )
    parser.add_argument("--out", type=Path, default=TABLE, help="written anew after each seed")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        for row in sweep(IntentTask(seed), args.bits, ClassifyRecipe(RECIPE.lr, args.steps)):
            rows.append(row)
            print(*row.values(), sep=",", flush=True)
        write_table(args.out, rows)


if __name__ == "__main__":
    main()
