"""The methods of the suite as cells of one table, and how one cell is measured (`qlab.train.sweep` measures them all).

Every model is asked the questions of `MergeTask`: towns that no training question names. Where a method does not bring a
format of its own, weights are stored in `weight_format`, so that at one width only the method differs.

    start       the model fine-tuned by a float LoRA, and merged: what formats, PTQ and QAT are given
    format      `start` rounded to nearest in another format
    PTQ         `start` quantized by a method, on training questions where it takes data
    QAT         `start` trained on for as many steps through the rounding (LSQ+), its linear layers alone; for comparison
                the same steps without the rounding ("trained on"), in float and then rounded
    adapter     the untuned model quantized, and something small trained beside the codes, where it stays
    merge       the same adapters, merged

The learning rates are the best of `RATES` at 2 bits, seed 0, on towns of the training half that did not train. At three times
the best rate LSQ's scales fall below 0, which `qlab.qat` refuses.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from qlab import formats
from qlab.adapters import add_adapters, bitfit, convert_qat_lora, loftq_init, merge
from qlab.formats import NF4, FloatCast, Format, IntAffine
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq import METHODS, quantize_model
from qlab.ptq.quantize import formats_of
from qlab.qat import convert, layers_of, prepare_qat
from qlab.train.answers import AnswerLogits, LoraRecipe, train_answers
from qlab.train.evaluate import batches, bootstrap, encode_items
from qlab.train.merge_tasks import MergeTask, TuningTask
from qlab.train.qat_sweep import training_memory
from qlab.train.tables import estimate_columns

FLOAT_BITS = 32
STEPS = 300
RATES = {"lsq": (1e-4, 3e-4, 1e-3), "qat-lora": (2e-3, 4e-3, 8e-3)}
BEST = {"lsq": 1e-3, "further": 1e-3, "qat-lora": 4e-3, "bitfit": 2e-2}


def weight_format(bits: int) -> IntAffine:
    """Integers with a float16 scale and zero point for each 32 weights of a row: bits + 1 a weight."""
    return IntAffine(
        bits, symmetric=False, granularity="group", group_size=32, float_zero_point=True, param_dtype=torch.float16
    )


def _wider(bits: int, granularity: str, group_size: int | None = None) -> IntAffine:
    fmt = weight_format(bits)
    return IntAffine(
        bits, symmetric=False, granularity=granularity, group_size=group_size, float_zero_point=True,
        param_dtype=fmt.param_dtype,
    )  # fmt: skip


FORMATS: dict[tuple[str, int], Format] = {
    ("bf16", 16): FloatCast("bf16"),
    **{("int, groups of 64", bits): _wider(bits, "group", 64) for bits in (4, 3, 2)},
    **{("int, channels", bits): _wider(bits, "channel") for bits in (4, 3, 2)},
    ("NF4", 4): NF4(),
    ("NF4, double quantization", 4): NF4(double_quant=True),
    ("FP4", 4): formats.FP4(),
    ("MXFP4", 4): formats.MXFP4(),
    ("NVFP4", 4): formats.NVFP4(),
    ("Q8_0", 8): formats.Q8_0(),
    ("Q4_0", 4): formats.Q4_0(),
    ("Q4_1", 4): formats.Q4_1(),
    **{("k-means, channels", b): formats.KMeans(b, "channel", param_dtype=torch.float16) for b in (4, 3, 2)},
    ("pairs of a codebook", 4): formats.ProductQuantizer(sub_dim=2, bits=8, shared=True, param_dtype=torch.float16),
    ("ternary", 2): formats.Ternary("twn", granularity="group", group_size=32, param_dtype=torch.float16),
    ("binary", 1): formats.Binary("group", group_size=32, param_dtype=torch.float16),
}
WIDTHS = {"rtn": (8, 4, 3, 2), "hqq": (4, 3, 2), "gptq": (8, 4, 3, 2), "awq": (4, 3, 2), "awq+gptq": (4, 3, 2)}
PTQ = [(method, bits) for method, widths in WIDTHS.items() for bits in widths]
W8A8 = {("rtn", 8): ActQuant(8), ("smoothquant", 8): None, ("llm.int8", 8): None}


@dataclass
class Made:
    """A model to be asked, and what it took. seconds: of the processor."""

    method: str
    family: str
    bits: int
    model: nn.Module
    training_seconds: float
    quantize_seconds: float = 0.0
    training_bytes: int = 0
    lr: float = 0.0


class Workshop:
    """One seed: its task, its start, and the models that are made from them. tuning: on towns of the training half."""

    def __init__(self, seed: int, steps: int = STEPS, name: str = "qlab-mini", tuning: bool = False):
        self.task = TuningTask(seed) if tuning else MergeTask(seed, name)
        self.steps, self.layers = steps, list(formats_of(self.task.model, weight_format(4), None)[0])
        encoded = encode_items(self.task.tokenizer, self.task.train[:64])
        ((_, self.ids, self.answer),) = batches(encoded, self.task.tokenizer.pad_token_id, 64)

    @functools.cached_property
    def start(self) -> Made:
        model = copy.deepcopy(self.task.model)
        made = self.trained("lora", "float", FLOAT_BITS, model, self.recipe(), lambda: self.adapt(model, "lora"))
        merge(made.model, "dequantize")
        return made

    def unfrozen_start(self) -> nn.Module:
        """A copy of `start` whose linear layers train, and nothing else."""
        model = copy.deepcopy(self.start.model).requires_grad_(False)
        for name in self.layers:
            model.get_submodule(name).requires_grad_(True)
        return model

    def recipe(self, lr: float = LoraRecipe.lr) -> LoraRecipe:
        return LoraRecipe(lr=lr, steps=self.steps)

    def adapt(self, model, kind: str, **settings) -> None:
        recipe = LoraRecipe()
        add_adapters(model, kind, recipe.r, recipe.lora_alpha, list(recipe.targets), **settings)

    def quantized(self, model, fmt: Format, method: str = "rtn", activations=None) -> float:
        """Round the linear layers of `model`, in place. Returns processor seconds."""
        data = self.task.calibration() if METHODS[method]().keep else None
        begin = time.process_time()
        quantize_model(model, fmt, method, data, activations=activations, progress=False)
        return time.process_time() - begin

    def trained(
        self, method: str, family: str, bits: int, model, recipe: LoraRecipe, prepare=lambda: None, groups=None, seed=0
    ) -> Made:
        """`prepare()`, which puts into `model` what trains, and the training. seed: added to the task's, draws the batches."""
        torch.manual_seed(self.task.seed)
        prepare()
        needed = self.training_bytes(model)
        begin = time.process_time()
        train_answers(model, self.task.tokenizer, self.task.train, recipe, self.task.seed + seed, groups=groups)
        return Made(method, family, bits, model, time.process_time() - begin, 0.0, needed, recipe.lr)

    def training_bytes(self, model) -> int:
        """`qat_sweep.training_memory` of a batch of 64 training questions."""
        labels = self.ids[:, 1:][self.answer[:, 1:]]
        with torch.autocast("cpu", torch.bfloat16):
            return training_memory(AnswerLogits(model), {"input_ids": self.ids, "answer": self.answer}, labels)


def start(shop: Workshop, bits: int) -> Iterator[Made]:
    """Before any training, and after that of a float LoRA."""
    yield Made("pretrained", "float", FLOAT_BITS, shop.task.model, 0.0)
    yield shop.start


def rounded(name: str, shop: Workshop, bits: int) -> Iterator[Made]:
    model = copy.deepcopy(shop.start.model)
    seconds = shop.quantized(model, FORMATS[name, bits])
    yield Made(name, "format", bits, model, shop.start.training_seconds, seconds)


def post_training(method: str, shop: Workshop, bits: int) -> Iterator[Made]:
    model = copy.deepcopy(shop.start.model)
    seconds = shop.quantized(model, weight_format(bits), method)
    yield Made(method, "PTQ", bits, model, shop.start.training_seconds, seconds)


def w8a8(method: str, shop: Workshop, bits: int) -> Iterator[Made]:
    """Weights of 8 bits, one scale per output, and 8-bit activations, one scale per token."""
    model = copy.deepcopy(shop.start.model)
    seconds = shop.quantized(model, IntAffine(bits), method, W8A8[method, bits])
    yield Made(f"{method}, activations too", "PTQ", bits, model, shop.start.training_seconds, seconds)


def further(shop: Workshop, bits: int, lr: float) -> Iterator[Made]:
    """As many steps more for all weights of the linear layers, nothing rounded; then rounded to nearest."""
    made = shop.trained("trained on", "QAT", FLOAT_BITS, shop.unfrozen_start(), shop.recipe(lr), seed=1000)
    made = replace(made, training_seconds=made.training_seconds + shop.start.training_seconds)
    yield made
    for width in (8, 4, 3, 2):
        model = copy.deepcopy(made.model)
        seconds = shop.quantized(model, weight_format(width))
        yield replace(made, method="trained on, rtn", bits=width, model=model, quantize_seconds=seconds)


def lsq(shop: Workshop, bits: int, lr: float) -> Iterator[Made]:
    """As many steps more, from `start`, with the rounding in every forward."""
    model = shop.unfrozen_start()
    prepare_qat(model, weight_format(bits), "lsq", train="layers")
    made = shop.trained("lsq", "QAT", bits, model, shop.recipe(lr), groups=learned_groups(model, lr), seed=1000)
    begin = time.process_time()
    convert(model)
    seconds = time.process_time() - begin
    yield replace(made, training_seconds=made.training_seconds + shop.start.training_seconds, quantize_seconds=seconds)


def learned_groups(model, lr: float) -> list[dict]:
    """Weights at `lr`, and grids as fast as them: AdamW moves a number by about its rate, a weight moves with scale · zero_point
    one for one, and a scale is as many times smaller than the weights as its rate."""
    layers = layers_of(model).values()
    scales = [layer.weight_quant.scale for layer in layers]
    step = float(torch.cat([scale.detach().flatten() for scale in scales]).mean())
    size = float(torch.cat([layer.weight.detach().flatten() for layer in layers]).abs().mean())
    return [
        {"params": [layer.weight for layer in layers], "lr": lr},
        {"params": scales, "lr": lr * step / size},
        {"params": [layer.weight_quant.zero_point for layer in layers], "lr": lr / step},
    ]


def qlora(shop: Workshop, bits: int, fmt: Format | None = None, name: str = "qlora", loftq: bool = False):
    """A LoRA on codes: unmerged; merged into float, stored in 16 bits; and that rounded again, to nearest and by GPTQ."""
    fmt, model = fmt or weight_format(bits), copy.deepcopy(shop.task.model)
    seconds = shop.quantized(model, fmt)

    def prepare():
        shop.adapt(model, "lora")
        if loftq:
            loftq_init(model, shop.task.model)

    made = shop.trained(name, "adapter", bits, model, shop.recipe(), prepare)
    yield replace(made, quantize_seconds=seconds)
    merged = copy.deepcopy(model)
    merge(merged, "dequantize")
    ways = {"requantized": (fmt, "rtn", bits)}
    if not loftq:
        ways |= {f"base of {bits} bits, merged to bf16": (FloatCast("bf16"), "rtn", 16)}
        ways |= {"merged, gptq": (fmt, "gptq", bits)}
    for way, (own, method, width) in ways.items():
        stored = copy.deepcopy(merged)
        again = shop.quantized(stored, own, method)
        yield replace(made, method=f"{name}, {way}", family="merge", bits=width, model=stored, quantize_seconds=again)


def qalora(shop: Workshop, bits: int) -> Iterator[Made]:
    """An adapter on sums over groups, beside the codes, and merged into their zero points."""
    model = copy.deepcopy(shop.task.model)
    seconds = shop.quantized(model, weight_format(bits))
    settings, recipe = MergeTask.settings["qalora"], replace(MergeTask.recipes["qalora"], steps=shop.steps)
    made = shop.trained("qa-lora", "adapter", bits, model, recipe, lambda: shop.adapt(model, "qalora", **settings))
    yield replace(made, quantize_seconds=seconds)
    merged = copy.deepcopy(model)
    begin = time.process_time()
    merge(merged, "zero-points")
    again = time.process_time() - begin
    yield replace(made, method="qa-lora, merged", family="merge", model=merged, quantize_seconds=again)


def qat_lora(shop: Workshop, bits: int, lr: float) -> Iterator[Made]:
    """A LoRA inside the rounding of W + ΔW, which is what is stored."""
    model, recipe = copy.deepcopy(shop.task.model), LoraRecipe()

    def prepare():
        shapes = {"r": recipe.r, "lora_alpha": recipe.lora_alpha, "target_modules": list(recipe.targets)}
        add_adapters(model, "qat", fmt=weight_format(bits), school="merged", **shapes)

    made = shop.trained("qat-lora, merged", "merge", bits, model, shop.recipe(lr), prepare)
    begin = time.process_time()
    convert_qat_lora(model)
    yield replace(made, quantize_seconds=time.process_time() - begin)


def biases(shop: Workshop, bits: int, lr: float) -> Iterator[Made]:
    """BitFit on codes: every linear layer gets a bias, and nothing else trains."""
    model = copy.deepcopy(shop.task.model)
    seconds = shop.quantized(model, weight_format(bits))
    made = shop.trained("bitfit", "adapter", bits, model, shop.recipe(lr), lambda: bitfit(model, new_biases=True))
    yield replace(made, quantize_seconds=seconds)


def tuning(shop: Workshop, bits: int, method: str, lr: float) -> Iterator[Made]:
    for made in TUNED[method](shop, bits, lr):
        yield replace(made, family="tuning")


TUNED = {"lsq": lsq, "qat-lora": qat_lora}
MAKERS: dict[str, Callable[..., Iterator[Made]]] = {
    "start": start,
    "further": further,
    "lsq": lsq,
    "qlora": qlora,
    "qlora NF4": functools.partial(qlora, fmt=NF4(double_quant=True), name="qlora NF4"),
    "loftq": functools.partial(qlora, name="loftq", loftq=True),
    "qa-lora": qalora,
    "qat-lora": qat_lora,
    "bitfit": biases,
    "tuning": tuning,
    **{f"format: {name}": functools.partial(rounded, name) for name, _ in FORMATS},
    **{f"ptq: {name}": functools.partial(post_training, name) for name, _ in PTQ},
    **{f"w8a8: {name}": functools.partial(w8a8, name) for name, _ in W8A8},
}


@functools.lru_cache(maxsize=5)  # whoever comes back to a seed finds its start trained
def workshop(seed: int, steps: int, name: str, tuning: bool) -> Workshop:
    return Workshop(seed, steps, name, tuning)


def measure(cell: dict) -> dict:
    """{"rows": one row of the table for each model that the cell's training gives}."""
    settings = {name: cell[name] for name in ("method", "lr") if name in cell}
    shop = workshop(cell["seed"], cell["steps"], cell["model"], cell["make"] == "tuning")
    return {"rows": [measured(shop, made) for made in MAKERS[cell["make"]](shop, cell["bits"], **settings)]}


def measured(shop: Workshop, made: Made) -> dict:
    """One row of the table: see `qlab.train.sweep` for the columns."""
    task, model = shop.task, made.model.eval()
    scores = task.scores(model)
    _, index = np.unique(task.groups, return_inverse=True)
    row = {"method": made.method, "family": made.family, "bits": made.bits, "seed": task.seed, "steps": shop.steps}
    row |= {"lr": f"{made.lr:g}" if made.lr else ""} | estimate_columns("exact_match", bootstrap(scores, task.groups))
    row |= task.measures(model)
    weights, decoded = model_bytes(model), largest_decoded(model, shop.layers)
    row |= {"bits_per_weight": f"{bits_per_weight(model, task.model, shop.layers):.4f}", "model_bytes": weights}
    row |= {"inference_bytes": weights + decoded, "training_bytes": made.training_bytes or ""}
    row |= {"quantize_seconds": f"{made.quantize_seconds:.2f}", "training_seconds": f"{made.training_seconds:.1f}"}
    row |= {"time_ratio": f"{time_ratio(model, task.model, shop.ids[:16]):.2f}"}
    row |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    return row | {"right": "".join(str(int(n)) for n in np.bincount(index, scores))}


def bits_per_weight(model, original, layers: list[str]) -> float:
    """Bits that the named layers take, everything counted (codes, constants, biases, adapters), over weights of `original`."""
    count = sum(original.get_submodule(name).weight.numel() for name in layers)
    return 8 * sum(model_bytes(model.get_submodule(name)) for name in layers) / count


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, every storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(storages.values())


def largest_decoded(model: nn.Module, layers: list[str]) -> int:
    """Bytes of the largest weight that a forward writes out in float32 from its codes: 0 for a model without codes."""
    quantized = [m for name in layers for m in model.get_submodule(name).modules() if isinstance(m, QuantLinear)]
    return max((4 * m.shape[0] * m.shape[1] for m in quantized), default=0)


@torch.no_grad()
def time_ratio(model, reference, ids: torch.Tensor, repeats: int = 15) -> float:
    """Processor time of a forward of `model` over that of `reference`: the median of pairs that follow each other."""

    def seconds(one) -> float:
        begin = time.process_time()
        one(input_ids=ids, use_cache=False)
        return time.process_time() - begin

    reference.eval()
    seconds(model), seconds(reference)
    return float(np.median([seconds(model) / seconds(reference) for _ in range(repeats)]))
