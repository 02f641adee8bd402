"""Which merge is right? `python -m qlab.train.merges` fine-tunes models on quantized bases, merges, and asks again.

The base is rounded to integers in groups of 32 with float32 scale and zero point (the format that QA-LoRA needs, so that both
adapters stand on the same weights). A LoRA and a QALoRA of the same r are trained on a task of `merge_tasks`, and each is asked
before and after every merge that it has, the same questions each time, which share no town (no wording) with the training:

    dequantize, requantize, original, naive-add, naive-codes    `qlab.adapters.merge`
    stochastic                                                  requantize, rounded at random in proportion
    gptq, hqq                                                   dequantize, and the result quantized again by that method
    zero-points (float32, float16, bfloat16, uint8)             of a QALoRA, by the dtype of the merged zero points

Written to data/tables/merge.csv for qlab-mini's questions, and merge_encoder.csv for an encoder's intents (`--task intents`):
one row for each bit width, seed, adapter and merge; `gain` is the paired difference to the unmerged model, its interval by
bootstrap over towns (wordings).

Each adapter has the learning rate and the pooling that suit it. `--tune` measures those of `RATES` on questions about towns of
the training half, which then do not train, and writes data/tables/qalora_lr.csv: the test towns have no part in the choice.
`--shrink` asks the encoder at 3 bits with less and less of its Δ, in wordings that it was trained on and in others, and writes
merge_shrunk.csv.
"""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from qlab.adapters import adapters_of, merge, unmerge
from qlab.nn import weight_of
from qlab.train.classify import classified
from qlab.train.corpus import DATA
from qlab.train.evaluate import bootstrap, paired_difference
from qlab.train.merge_tasks import TASKS, IntentTask, MergeTask, TuningTask
from qlab.train.tables import estimate_columns, write_table

TABLES = {"questions": DATA / "tables" / "merge.csv", "intents": DATA / "tables" / "merge_encoder.csv"}
LR_TABLE, SHRUNK_TABLE = DATA / "tables" / "qalora_lr.csv", DATA / "tables" / "merge_shrunk.csv"
BITS = (4, 3, 2)
RATES = {  # (adapter, pooling) → peak learning rates; mean pooling takes larger steps of A and B for the same ΔW
    ("lora", ""): (1e-3, 2e-3, 4e-3, 8e-3),
    ("qalora", "sum"): (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    ("qalora", "mean"): (1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1),
}
MERGES = {
    "dequantize": {"how": "dequantize"},
    "requantize": {"how": "requantize"},
    "stochastic": {"how": "requantize"},
    "original": {"how": "original"},
    "naive-add": {"how": "naive-add"},
    "naive-codes": {"how": "naive-codes"},
    "gptq": {"how": "dequantize"},
    "hqq": {"how": "dequantize"},
}
ZERO_POINTS = {name: MERGES[name] for name in ("dequantize", "requantize")} | {
    f"zero-points {str(dtype).removeprefix('torch.')}": {"how": "zero-points", "dtype": dtype}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
}


def learning_rates(task: MergeTask, bits: int, steps: int) -> Iterator[dict]:
    """One row for each adapter, pooling and rate of `RATES`: exact match, and the median over layers of norm(Δ)/norm(W)."""
    for (kind, pooling), rates in RATES.items():
        settings = {"pooling": pooling} if pooling else {}
        for lr in rates:
            model = task.tuned(bits, kind, replace(task.recipes[kind], lr=lr, steps=steps), **settings)
            layers = adapters_of(model).values()
            sizes = [float(a.delta_weight().detach().norm() / weight_of(a.base).norm()) for a in layers]
            score = estimate_columns("exact_match", bootstrap(task.scores(model), task.groups))
            row = {"bits": bits, "seed": task.seed, "adapter": kind, "pooling": pooling, "lr": lr, "steps": steps}
            yield row | score | {"delta_over_weight": f"{np.median(sizes):.4f}"}


def merges(task: MergeTask, bits: int, kind: str, recipe) -> Iterator[dict]:
    """The unmerged model's row, then one for each merge of the adapters of `kind`, "lora" or "qalora"."""
    model = task.tuned(bits, kind, recipe, **task.settings[kind])
    unmerged = task.scores(model)
    same = {"bits": bits, "seed": task.seed, "adapter": kind}
    yield same | {"merge": "unmerged"} | _measured(task, model, unmerged, unmerged) | _sizes()
    for name, settings in (ZERO_POINTS if kind == "qalora" else MERGES).items():
        settings = dict(settings)
        if name == "original":
            settings["originals"] = task.model
        if name == "stochastic":
            settings["generator"] = torch.Generator().manual_seed(task.seed)
        report = merge(model, keep=True, **settings)
        merged = model
        if name in ("gptq", "hqq"):
            merged = copy.deepcopy(model)
            again = task.quantize(merged, bits, name)
        sizes = _sizes(report, again.bits_per_weight if merged is not model else None)
        yield same | {"merge": name} | _measured(task, merged, task.scores(merged), unmerged) | sizes
        unmerge(report)


def shrunk(task: IntentTask, bits: int, recipe, shares=(1.0, 0.75, 0.41, 0.2, 0.0)) -> Iterator[dict]:
    """A trained LoRA with a share of its Δ, unrounded, and re-quantized whole: right answers in unseen and in trained wordings."""
    model = task.tuned(bits, "lora", recipe)

    def row(merge: str, share: str) -> dict:
        unseen, fresh = task.scores(model).mean(), classified(model, task.tokenizer, task.fresh).mean()
        same = {"bits": bits, "seed": task.seed, "merge": merge, "delta_share": share}
        return same | {"unseen_wordings": f"{unseen:.5f}", "trained_wordings": f"{fresh:.5f}"}

    layers = {adapter: adapter.scaling for adapter in adapters_of(model).values()}
    for share in shares:
        for adapter, scaling in layers.items():
            adapter.scaling = share * scaling
        yield row("unmerged", f"{share:.2f}")
    for adapter, scaling in layers.items():
        adapter.scaling = scaling
    merge(model, "requantize")
    yield row("requantize", "")


def _measured(task: MergeTask, model, scores: np.ndarray, unmerged: np.ndarray) -> dict[str, str]:
    columns = estimate_columns("exact_match", bootstrap(scores, task.groups))
    gain = estimate_columns("gain", paired_difference(unmerged, scores, task.groups))
    return columns | gain | task.measures(model)


def _sizes(report=None, bits_per_weight: float | None = None) -> dict[str, str]:
    """Bits per weight after the merge, and medians over layers: norm(Δ)/norm(W), and the share of Δ that is left."""
    if report is None:
        return {"bits_per_weight": "", "delta_over_weight": "", "delta_kept": ""}
    layers = report.layers.values()
    return {
        "bits_per_weight": f"{bits_per_weight or report.bits_per_weight:.3f}",
        "delta_over_weight": f"{np.median([layer.size for layer in layers]):.4f}",
        "delta_kept": "" if bits_per_weight else f"{np.median([layer.kept for layer in layers]):.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train adapters on quantized bases, merge in every way, and compare.")
    parser.add_argument("--bits", nargs="+", type=int, default=BITS)
    parser.add_argument("--kinds", nargs="+", choices=("lora", "qalora"), default=("lora", "qalora"))
    parser.add_argument("--task", choices=TASKS, default="questions")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="of every adapter, in place of its own")
    parser.add_argument("--lr", type=float, default=None, help="likewise")
    parser.add_argument("--tune", action="store_true", help="measure learning rates (seed 0) instead of merges")
    parser.add_argument(
        "--shrink", action="store_true", help="measure an encoder with a share of its Δ instead of merges"
    )
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    given = {name: value for name in ("steps", "lr") if (value := getattr(args, name)) is not None}
    if args.tune:
        task, steps = TuningTask(), args.steps or TuningTask.recipes["lora"].steps
        write_table(args.out or LR_TABLE, [row for bits in args.bits for row in learning_rates(task, bits, steps)])
        return
    if args.shrink:
        intents = [IntentTask(seed) for seed in range(args.seeds)]
        rows = [row for task in intents for row in shrunk(task, 3, replace(task.recipes["lora"], **given))]
        write_table(args.out or SHRUNK_TABLE, rows)
        return
    rows = []
    for seed in range(args.seeds):
        task = TASKS[args.task](seed)
        for bits in args.bits:
            for kind in args.kinds:
                for row in merges(task, bits, kind, replace(task.recipes[kind], **given)):
                    rows.append(row)
                    print(*row.values(), flush=True)
    write_table(args.out or TABLES[args.task], rows)


if __name__ == "__main__":
    main()
