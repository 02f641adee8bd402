"""Post-training methods side by side: `python -m qlab.train.ptq_sweep` measures them and writes data/tables/ptq.csv.

Every method gets the same format, asymmetric integers in groups of 64 with float16 scale and zero point, so that at one
width only the choice of the codes differs; those that quantize activations too (W8A8) get 8-bit integers per channel.
Each is asked twice, by the embedded language model and by a public encoder:

    qlab-mini           exact match on 2,400 cloze items, 300 towns of the atlas
    all-MiniLM-L6-v2    cosine of sentence embeddings to those of the float model, 150 documents

Intervals are bootstrap percentiles over towns and over documents; `gain` is the paired difference to round-to-nearest at the
same width on the same items. Methods that use data are run with several draws of it. No calibration document is about a
town that is asked for, and none is among the 150.
"""

import argparse
import copy
import csv
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qlab.formats import Format, IntAffine
from qlab.models import load
from qlab.nn import ActQuant
from qlab.ptq import GPTQ, METHODS, Method, SmoothQuant, quantize_model
from qlab.train.card import damage_sample
from qlab.train.corpus import DATA, Corpus
from qlab.train.evaluate import bootstrap, embed, exact, paired_difference
from qlab.train.tables import estimate_columns, write_table

TABLE = DATA / "tables" / "ptq.csv"
BITS = (8, 4, 3, 2)
KINDS = ("atlas", "world", "prose")


def weight_format(bits: int) -> IntAffine:
    """What weights alone are stored in: 0.5 bits a weight go to scale and zero point."""
    return IntAffine(
        bits, symmetric=False, granularity="group", group_size=64, float_zero_point=True, param_dtype=torch.float16
    )


@dataclass(frozen=True)
class Entry:
    """A row of the table: a method, and what it quantizes activations to (None: as the method says)."""

    method: Callable[[], Method]
    activations: ActQuant | None = None
    data: bool = True


WEIGHT_ONLY = {
    "rtn": Entry(METHODS["rtn"], data=False),
    "hqq": Entry(METHODS["hqq"], data=False),
    "gptq": Entry(METHODS["gptq"]),
    "gptq act-order": Entry(lambda: GPTQ(act_order=True)),
    "awq": Entry(METHODS["awq"]),
    "awq+gptq": Entry(METHODS["awq+gptq"]),
}
STATIC = ActQuant(8, granularity="tensor", static=True)
W8A8 = {
    "rtn, token": Entry(METHODS["rtn"], ActQuant(8), data=False),
    "rtn, tensor": Entry(METHODS["rtn"], ActQuant(8, granularity="tensor"), data=False),
    "rtn, static": Entry(METHODS["rtn"], STATIC),
    "smoothquant, token": Entry(METHODS["smoothquant"]),
    "smoothquant, tensor": Entry(METHODS["smoothquant"], ActQuant(8, granularity="tensor")),
    "smoothquant, static": Entry(METHODS["smoothquant"], STATIC),
    "smoothquant everywhere, tensor": Entry(lambda: SmoothQuant(norms_only=False), ActQuant(8, granularity="tensor")),
    "llm.int8": Entry(METHODS["llm.int8"], data=False),
}


class LanguageTask:
    """What qlab-mini still knows: exact match on cloze items."""

    def __init__(self, name: str = "qlab-mini", towns: int = 300):
        self.model, self.tokenizer = load(name)
        self.items = damage_sample(towns)
        self.groups = [item.entity for item in self.items]

    def calibration(self, seed: int, texts: int = 512) -> list:
        return calibration(self.tokenizer, seed, texts)

    def scores(self, model) -> np.ndarray:
        """One number for each of `groups`."""
        return exact(model, self.tokenizer, self.items)


class EmbeddingTask:
    """How near an encoder's sentence embeddings stay: cosine to those of the float model."""

    def __init__(self, name: str = "all-MiniLM-L6-v2", documents: int = 150):
        self.model, self.tokenizer = load(name)
        rng, corpus = random.Random("documents to embed"), Corpus()
        self.texts = [corpus.document(rng, KINDS[n % len(KINDS)]) for n in range(documents)]
        self.groups = list(range(documents))
        self.reference = embed(self.model, self.tokenizer, self.texts)

    def calibration(self, seed: int, texts: int = 128) -> list:
        return calibration(self.tokenizer, seed, texts, set(self.texts), KINDS)

    def scores(self, model) -> np.ndarray:
        return (embed(model, self.tokenizer, self.texts) * self.reference).sum(-1).numpy()


TASKS = {"qlab-mini": LanguageTask, "all-MiniLM-L6-v2": EmbeddingTask}


def calibration(
    tokenizer, seed: int, texts: int, leave_out: Iterable[str] = (), kinds: tuple[str, ...] | None = None
) -> list:
    """Batches of 16 documents of the corpus, of the `kinds` in turn or (None) in its own mixture, none about a town of
    `damage_sample` and none of `leave_out`."""
    asked = {item.entity for item in damage_sample()}
    corpus, rng, documents = Corpus(), random.Random(f"calibration/{seed}"), []
    corpus.towns = [row for row in corpus.towns if row["name"] not in asked]
    while len(documents) < texts:
        document = corpus.document(rng, kinds[len(documents) % len(kinds)] if kinds else None)
        if document not in leave_out:
            documents.append(document)
    parts = [documents[start : start + 16] for start in range(0, texts, 16)]
    return [dict(tokenizer(part, padding=True, truncation=True, return_tensors="pt")) for part in parts]


def measure(
    task, name: str, entry: Entry, fmt: Format, seed: int, baseline: np.ndarray | None
) -> tuple[dict, np.ndarray]:
    """One row of the table, and the scores behind it. baseline: the scores of round-to-nearest at the same width."""
    model, batches = copy.deepcopy(task.model), task.calibration(seed) if entry.data else None
    start = time.perf_counter()
    report = quantize_model(model, fmt, entry.method(), batches, activations=entry.activations, progress=False)
    seconds = time.perf_counter() - start
    scores = task.scores(model)
    row = {"method": name, "bits": fmt.bits, "seed": seed, "bits_per_weight": f"{report.bits_per_weight:.3f}"}
    row |= estimate_columns("score", bootstrap(scores, task.groups))
    gain = bootstrap(scores * 0, task.groups) if baseline is None else paired_difference(baseline, scores, task.groups)
    return row | estimate_columns("gain", gain) | {"seconds": f"{seconds:.1f}"}, scores


def sweep(task, bits: Iterable[int] = BITS, seeds: int = 3):
    """Yield every row of one model's table."""
    widths = [(WEIGHT_ONLY, weight_format(b), "weights") for b in bits]
    for entries, fmt, what in [*widths, (W8A8, IntAffine(8), "w8a8")]:
        baseline = None
        for name, entry in entries.items():
            for seed in range(seeds if entry.data else 1):
                row, scores = measure(task, name, entry, fmt, seed, baseline)
                if baseline is None:  # the first entry is round-to-nearest
                    baseline = scores
                yield {"quantized": what, **row}


def read_table(path: Path = TABLE) -> list[dict[str, str]]:
    """The rows of the shipped table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure post-training methods on two models and write the table.")
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--bits", nargs="+", type=int, default=BITS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for row in sweep(TASKS[name](), args.bits, args.seeds):
            rows.append({"model": name, **row})
            print(*rows[-1].values(), flush=True)
    write_table(args.out, rows)


if __name__ == "__main__":
    main()
