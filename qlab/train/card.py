"""The measurements beside qlab-mini: `python -m qlab.train.card` writes them into data/qlab-mini.

- damage.csv: the base rounded to nearest in every format, asked in its pretraining form (cloze), and perplexity.
- questions.csv: the question task. "under": a LoRA trained on the unrounded base, which is rounded under it
  afterwards. "on": a LoRA trained on the rounded base (QLoRA's order). "merged": that LoRA merged and the sum
  rounded again.
- weights.csv: how heavy the tails of the linear weights are, beside a public encoder's.
- losses.csv: the training curve. SHA256SUMS: every file of the folder, in sha256sum's format.
"""

import argparse
import copy
import hashlib
from pathlib import Path

import torch
from tqdm import tqdm

from qlab.formats import NF4, Format, IntAffine
from qlab.models import find_linears, load
from qlab.train import tasks
from qlab.train.answers import LoraRecipe, train_lora
from qlab.train.corpus import DATA
from qlab.train.evaluate import Estimate, exact_match, perplexity
from qlab.train.pretrain import mean_losses
from qlab.train.tables import estimate_columns, write_table

BITS = (8, 6, 5, 4, 3, 2)


def damage_formats() -> dict[str, Format | None]:
    """Label → format of the damage curve, `None` for the unrounded weights."""
    channel = {f"int{b} channel": IntAffine(bits=b, granularity="channel") for b in BITS}
    group = {f"int{b} g64": IntAffine(bits=b, granularity="group", group_size=64) for b in BITS}
    return {"none": None, **channel, **group, "nf4 g64": NF4(block_size=64)}


@torch.no_grad()
def rounded(model, fmt: Format | None):
    """A copy of `model` whose linear weights went through `fmt`; embeddings (and the tied head) and norms did not."""
    model = copy.deepcopy(model)
    embeddings = {p.data_ptr() for p in model.get_input_embeddings().parameters()}
    for layer in find_linears(model).values() if fmt else ():
        if layer.weight.data_ptr() not in embeddings:
            layer.weight.copy_(fmt.quantize(layer.weight).dequantize())
    return model


def damage_row(model, tokenizer, label: str, fmt: Format | None, items, texts) -> dict:
    """One line of damage.csv."""
    damaged = rounded(model, fmt)
    match, ppl = exact_match(damaged, tokenizer, items), perplexity(damaged, tokenizer, texts)
    return {
        "format": label,
        **estimate_columns("exact_match", match, digits=4),
        **estimate_columns("perplexity", ppl, digits=4),
    }


def damage_sample(towns: int = 300) -> list[tasks.Item]:
    """Cloze items of every n-th town, `towns` of them, all eight relations."""
    rows = len(tasks.atlas())
    kept = {row["name"] for row in tasks.atlas()[:: max(1, rows // towns)]}
    return [item for item in tasks.atlas_cloze() if item.entity in kept]


def damage(model, tokenizer) -> list[dict]:
    """The damage curve: every format of `damage_formats()`."""
    items, texts = damage_sample(), tasks.held_out_prose()
    return [
        damage_row(model, tokenizer, label, fmt, items, texts)
        for label, fmt in tqdm(damage_formats().items(), desc="damage", mininterval=5)
    ]


@torch.no_grad()
def round_base(peft_model, fmt: Format) -> None:
    """Round the base weights under trained adapters, in place."""
    for name, layer in peft_model.named_modules():
        if name.endswith("base_layer"):
            layer.weight.copy_(fmt.quantize(layer.weight).dequantize())


def question_rows(model, tokenizer, seed: int, steps: int) -> list[dict]:
    """One seed of the question task: before any adapter, after a LoRA, and with the base rounded under that LoRA."""
    train, test = tasks.question_task(seed, test_towns=250)
    rows = [question_row(seed, "none", "no adapter", exact_match(model, tokenizer, test))]
    tuned = train_lora(copy.deepcopy(model), tokenizer, train, LoraRecipe(steps=steps), seed)
    rows.append(question_row(seed, "none", "on", exact_match(tuned, tokenizer, test)))
    for label in ("nf4 g64", *(f"int{b} g64" for b in BITS)):
        under = copy.deepcopy(tuned)
        round_base(under, damage_formats()[label])
        rows.append(question_row(seed, label, "under", exact_match(under, tokenizer, test)))
    return rows


def rounded_base_rows(
    model, tokenizer, seed: int, steps: int, labels: tuple[str, ...] = ("nf4 g64", "int3 g64")
) -> list[dict]:
    """One seed of the question task with the LoRA trained on a rounded base, then merged, then rounded again."""
    train, test = tasks.question_task(seed, test_towns=250)
    rows = []
    for label in labels:
        fmt = damage_formats()[label]
        tuned = train_lora(rounded(model, fmt), tokenizer, train, LoraRecipe(steps=steps), seed)
        rows.append(question_row(seed, label, "on", exact_match(tuned, tokenizer, test)))
        merged = tuned.merge_and_unload()
        rows.append(question_row(seed, label, "merged, not rounded", exact_match(merged, tokenizer, test)))
        rows.append(question_row(seed, label, "merged", exact_match(rounded(merged, fmt), tokenizer, test)))
    return rows


def question_row(seed: int, label: str, adapter: str, match: Estimate) -> dict:
    return {"seed": seed, "format": label, "adapter": adapter, **estimate_columns("exact_match", match, digits=4)}


def tails(weight: torch.Tensor) -> dict[str, float]:
    """Tails of a weight (out, in), per output channel: median kurtosis (a normal distribution: 3), the share of weights
    more than 4 standard deviations from their channel's mean (normal: 6.3e-5), and the median of max |w| / rms."""
    w = weight.detach().double()
    centred = w - w.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    return {
        "kurtosis": float(((centred**4).mean(1) / variance**2).median()),
        "outlier_share": float((centred.abs() > 4 * variance.sqrt()[:, None]).double().mean()),
        "peak_to_rms": float((w.abs().amax(1) / w.square().mean(1).sqrt()).median()),
    }


def weight_tails(names: tuple[str, ...] = ("qlab-mini", "all-MiniLM-L6-v2")) -> list[dict]:
    """weights.csv: `tails` of every linear layer of every model named."""
    return [
        {
            "model": Path(name).name,
            "layer": layer,
            "shape": "x".join(map(str, module.weight.shape)),
            **{key: f"{value:.4g}" for key, value in tails(module.weight).items()},
        }
        for name in names
        for layer, module in find_linears(load(name)[0]).items()
        if layer != "lm_head"
    ]


def write_sums(folder: Path) -> None:
    """SHA256SUMS over every other file of `folder`."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure data/qlab-mini and write the results and checksums into it.")
    parser.add_argument("--folder", type=Path, default=DATA / "qlab-mini")
    parser.add_argument("--losses", type=Path, help="losses.csv of a pretraining run, to be averaged and kept")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=("damage", "questions", "weights", "sums"),
        default=("damage", "questions", "weights"),
        help="checksums are always written",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounded-seeds", type=int, default=1, help="seeds of the runs on rounded bases")
    parser.add_argument("--steps", type=int, default=LoraRecipe.steps)
    args = parser.parse_args()
    if args.losses:
        write_table(args.folder / "losses.csv", mean_losses(args.losses, 100))
    if "damage" in args.only or "questions" in args.only:
        model, tokenizer = load(args.folder)
    if "damage" in args.only:
        write_table(args.folder / "damage.csv", damage(model, tokenizer))
    if "questions" in args.only:
        measured = [question_rows(model, tokenizer, seed, args.steps) for seed in range(args.seeds)]
        measured += [rounded_base_rows(model, tokenizer, seed, args.steps) for seed in range(args.rounded_seeds)]
        write_table(args.folder / "questions.csv", [row for rows in measured for row in rows])
    if "weights" in args.only:
        write_table(args.folder / "weights.csv", weight_tails((str(args.folder), "all-MiniLM-L6-v2")))
    write_sums(args.folder)


if __name__ == "__main__":
    main()
