"""Which merge is right? `python -m qlab.train.merges` fine-tunes qlab-mini on quantized bases, merges, and asks again.

The base is rounded to integers in groups of 32 with float32 scale and zero point (the format that QA-LoRA needs, so that both
adapters stand on the same weights). A LoRA and a QALoRA of the same r are trained on the question task, and each is asked before
and after every merge that it has, on the same questions about towns that no training question names:

    dequantize, requantize, original, naive-add, naive-codes    `qlab.adapters.merge`
    stochastic                                                  requantize, rounded at random in proportion
    gptq, hqq                                                   dequantize, and the result quantized again by that method
    zero-points (float32, float16, bfloat16, uint8)             of a QALoRA, by the dtype of the merged zero points

Written to data/tables/merge.csv: one row for each bit width, seed, adapter and merge; `gain` is the paired difference to the
unmerged model, its interval by bootstrap over towns.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from qlab.adapters import add_adapters, merge, unmerge
from qlab.formats import IntAffine
from qlab.models import load
from qlab.ptq import quantize_model
from qlab.train import tasks
from qlab.train.corpus import DATA
from qlab.train.evaluate import bootstrap, exact, paired_difference, perplexity
from qlab.train.finetune import LoraRecipe, train_answers
from qlab.train.tables import estimate_columns, write_table

TABLE = DATA / "tables" / "merge.csv"
BITS = (4, 3, 2)
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


def base_format(bits: int) -> IntAffine:
    """What the base is rounded to, before training and where a merge rounds again."""
    return IntAffine(bits, symmetric=False, granularity="group", group_size=32, float_zero_point=True)


class MergeTask:
    """One seed of the question task: what to train on, what to ask, and what to calibrate on."""

    def __init__(self, seed: int, name: str = "qlab-mini", test_towns: int = 250):
        self.seed = seed
        self.model, self.tokenizer = load(name)
        self.train, self.test = tasks.question_task(seed, test_towns=test_towns)
        self.groups = [item.entity for item in self.test]
        self.prose = tasks.held_out_prose(60)

    def scores(self, model) -> np.ndarray:
        """Which of the questions are answered exactly: (questions,) bool."""
        return exact(model, self.tokenizer, self.test)

    def calibration(self, questions: int = 256) -> list:
        """Training questions with their answers, in batches of 16."""
        texts = [item.prompt + item.answer for item in self.train[:questions]]
        parts = [texts[start : start + 16] for start in range(0, len(texts), 16)]
        return [dict(self.tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


def merges(task: MergeTask, bits: int, kind: str, recipe: LoraRecipe) -> Iterator[dict]:
    """The unmerged model's row, then one for each merge of the adapters of `kind`, "lora" or "qalora"."""
    fmt, model = base_format(bits), copy.deepcopy(task.model)
    quantize_model(model, fmt, progress=False)
    torch.manual_seed(task.seed)
    add_adapters(model, kind, r=recipe.r, lora_alpha=recipe.lora_alpha, target_modules=list(recipe.targets))
    train_answers(model, task.tokenizer, task.train, recipe, task.seed)
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
            again = quantize_model(merged, fmt, name, task.calibration(), progress=False)
        sizes = _sizes(report, again.bits_per_weight if merged is not model else None)
        yield same | {"merge": name} | _measured(task, merged, task.scores(merged), unmerged) | sizes
        unmerge(report)


def _measured(task: MergeTask, model, scores: np.ndarray, unmerged: np.ndarray) -> dict[str, str]:
    ppl = perplexity(model, task.tokenizer, task.prose).value
    columns = estimate_columns("exact_match", bootstrap(scores, task.groups))
    gain = estimate_columns("gain", paired_difference(unmerged, scores, task.groups))
    return columns | gain | {"prose_perplexity": f"{ppl:.4f}"}


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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=LoraRecipe.steps)
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        task = MergeTask(seed)
        for bits in args.bits:
            for kind in args.kinds:
                for row in merges(task, bits, kind, LoraRecipe(steps=args.steps)):
                    rows.append(row)
                    print(*row.values(), flush=True)
    write_table(args.out, rows)


if __name__ == "__main__":
    main()
