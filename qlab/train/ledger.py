"""The memory of a fine-tuning run, in bytes: predicted before it starts, from a config alone, and measured after.

    total = weights + constants + adapter + gradients + optimizer + activations

| row | what is in it |
|---|---|
| weights | codes, or the numbers themselves; embeddings, norms, head, biases and buffers too |
| constants | what decodes the codes: scales, zero points, absmax, look-up tables of bitsandbytes |
| adapter | everything that trains: A and B, or biases; a head, a learned grid |
| gradients | of what trains, in its dtype |
| optimizer | two averages of what trains (AdamW) and the step counts |
| activations | the most that forward and backward hold at any time beside the rows above |

`predict` runs the real code on tensors without memory (torch's FakeTensorMode): the model is built from its config, quantized,
given adapters, and a step is taken, so every dtype cast, saved tensor and recomputation is that of the run. The first five rows
are then counted storage by storage, and the last is the largest sum of the storages that are alive at the same time. Korthikanti
et al. 2022, arXiv:2205.05198, section 4, counts the same by hand for a GPT: s·b·h·(34 + 5·a·s/h) bytes a layer in 16 bits,
without recomputation and without a fused attention. What a kernel allocates inside is in neither.

`measure` does the same with a real model: on a CPU storage by storage, on a GPU the last row is the allocator's peak.
"""

import argparse
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlab.adapters.bases import holds_codes
from qlab.formats import Format
from qlab.models import trainable_parameters
from qlab.nn import QuantLinear
from qlab.nn.base import FrozenBuffers
from qlab.nn.weights import bitsandbytes_kind, quant_state, row_absmax
from qlab.train.unreal import (
    DEPTH,
    LLAMA_2,
    METHODS,
    base_format,
    build,
    config_of,
    has_equal_layers,
    named,
    prepared,
    refuse_prepared,
    shallow,
    training_loss,
    without_memory,
)  # fmt: skip

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROWS = ("weights", "constants", "adapter", "gradients", "optimizer", "activations")
MIB, GIB = 2**20, 2**30
EIGHT_BIT_SIZE, EIGHT_BIT_BLOCK = 4096, 256  # bitsandbytes: fewer numbers keep float32 averages; one absmax for a block


@dataclass(frozen=True)
class Ledger:
    """Bytes by row. A row that was not measured is not there.

    >>> ledger = Ledger({"weights": 6 * 2**30, "optimizer": 2**30})
    >>> ledger.total / 2**30, ledger.fits(8)
    (7.0, '7.00 GiB: fits in 8 GiB, 1.00 GiB is left')
    """

    rows: dict[str, int]
    title: str = ""

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    def difference(self, other: "Ledger") -> dict[str, float]:
        """Row → by how many percent of `other` this one differs from it, for the rows of both and "total" of those."""
        both = [row for row in self.rows if row in other.rows]
        mine, theirs = dict(self.rows), dict(other.rows)
        for rows in (mine, theirs):
            rows["total"] = sum(rows[row] for row in both)
        return {row: _percent(mine[row], theirs[row]) for row in (*both, "total")}

    def compare(self, other: "Ledger", names: tuple[str, str] = ("predicted", "measured")) -> str:
        """Both as a table, row by row, with the difference in percent of `other`."""
        lines = [f"{'':12} {names[0]:>14} {names[1]:>14} {'difference':>11}"]
        for row, percent in self.difference(other).items():
            mine, theirs = self.rows.get(row), other.rows.get(row)
            if row == "total":
                mine, theirs = (sum(x.rows[r] for r in self.rows if r in other.rows) for x in (self, other))
            lines.append(f"{row:12} {mine:14,} {theirs:14,} {percent:+10.2f}%")
        return "\n".join(lines)

    def fits(self, memory: float) -> str:
        """One line: does it fit in `memory` GiB? What is no tensor (a CUDA context, fragments) is for the reader to leave room for."""
        need = self.total / GIB
        if need <= memory:
            return f"{need:.2f} GiB: fits in {memory:g} GiB, {memory - need:.2f} GiB is left"
        return f"{need:.2f} GiB: does not fit in {memory:g} GiB, {need - memory:.2f} GiB is missing"

    def __str__(self) -> str:
        unit, name = (GIB, "GiB") if self.total >= GIB else (MIB, "MiB")
        lines = [self.title] * bool(self.title) + [f"{'':12} {name:>10} {'share':>7}"]
        items = [*self.rows.items(), ("total", self.total)]
        return "\n".join([*lines, *(f"{row:12} {n / unit:10.3f} {n / max(self.total, 1):7.1%}" for row, n in items)])


def _percent(mine: int, theirs: int) -> float:
    if theirs == 0:
        return 0.0 if mine == 0 else float("inf")
    return 100 * (mine - theirs) / theirs


def predict(
    model: "nn.Module | PretrainedConfig | str | Path",
    method: str = "qlora",
    *,
    bits: int | None = 4,
    group_size: int = 32,
    block_size: int = 64,
    double_quant: bool = True,
    format: Format | None = None,
    backend: str = "qlab",
    r: int = 8,
    target_modules: str | Iterable[str] = "all-linear",
    exclude_modules: str | Iterable[str] = (),
    head: str | Iterable[str] = (),
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    optimizer: str = "adamw_torch",
    batch_size: int = 1,
    tokens: int = 512,
    gradient_checkpointing: bool = False,
    **settings,
) -> Ledger:
    """The memory that a run will take. Nothing of the model's size is allocated.

    Parameters
    ----------
    model : the base as it is before the run: a model; a config of transformers; "7B", "13B" or "70B" (Llama 2's shapes); a folder,
        or a Hub id whose config is at hand, as in `qlab.models.load`. Only shapes and dtypes are read.
    method : "lora" | "qlora" | "qalora" | "qat-lora" | "bitfit".
    bits, block_size, double_quant, group_size : of the base, as in `qlab finetune`. qlora and bitfit at 4 bits: NF4; otherwise, and
        for qalora and qat-lora, IntAffine in groups with float zero points; lora, and bits=None: none. format: another one.
    backend : "qlab" | "bitsandbytes": its layers keep their look-up tables, 64 + 1024 bytes each.
    r, target_modules, exclude_modules, settings : as in `add_adapters`, or `bitfit` (new_biases is True here); how qat-lora
        rounds is `rounding`, its method there.
    head : modules (ends of names) that train in full, neither quantized nor adapted.
    dtype : of all that is not quantized. None: the model's own, or the config's, or float32. autocast: Trainer's bf16=True
        is torch.bfloat16; None: computed in the model's dtype.
    optimizer : "adamw_torch" | "adamw_8bit" (bitsandbytes) | "sgd", also by Trainer's other names for them.
    batch_size, tokens : rows and columns of a batch, padded, so with an attention mask.

    Raises ValueError for unknown names, a model with adapters or codes already, and formats that do not fit its shapes; what
    `add_adapters`, `bitfit` and `locate` raise.
    """
    _check_names(method, backend, optimizer)
    fmt = format or base_format(method, bits, group_size, block_size, double_quant)
    source = model if isinstance(model, nn.Module) else config_of(model)
    refuse_prepared(source)
    with without_memory() as fake:

        def tuned(source) -> nn.Module:
            targets = r, target_modules, exclude_modules, named(head)
            return prepared(build(source, dtype, fake), method, fmt, *targets, **settings)

        def activations(net: nn.Module) -> int:
            return _activations(net, batch_size, tokens, autocast, gradient_checkpointing)

        net = tuned(source)
        rows, trained = _held(net), trainable_parameters(net)
        rows["gradients"], rows["optimizer"] = sum(p.nbytes for p in trained), OPTIMIZERS[optimizer](trained)
        rows["constants"] += _tables(net) if backend == "bitsandbytes" else 0
        if has_equal_layers(source, target_modules):
            few, more = (activations(tuned(shallow(source, depth))) for depth in (DEPTH, DEPTH + 1))
            rows["activations"] = few + (source.num_hidden_layers - DEPTH) * (more - few)
        else:
            rows["activations"] = activations(net)
    name = model if isinstance(model, str) else type(net).__name__
    parts = [name, method, *([str(fmt)] if fmt else []), f"{batch_size} × {tokens} tokens", optimizer]
    return Ledger(rows, ", ".join(parts))


def measure(
    model: nn.Module, optimizer=None, step: Callable[[], Tensor] | None = None, title: str = "measured"
) -> Ledger:
    """What a model holds now, by row; every storage is counted once.

    optimizer : its state, after a step; None: no such row.
    step : returns the loss of a batch, with its graph: a backward pass is made from it, for the activations. Gradients and random
        generators are afterwards as they were. None: no such row; gradients only where there are some.

    On a GPU the activations are the allocator's peak, rounded up to its blocks, with what the kernels take beside.
    """
    rows, trained = _held(model), trainable_parameters(model)
    if optimizer is not None:
        rows["optimizer"] = _bytes(t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor))
    training, before = model.training, [None if p.grad is None else p.grad.clone() for p in trained]
    try:
        if step is not None:
            model.train()
            with torch.random.fork_rng():
                rows["activations"] = _peak(trained, step)
        if grads := [p.grad for p in trained if p.grad is not None]:
            rows["gradients"] = _bytes(grads)
    finally:
        model.train(training)
        for parameter, grad in zip(trained, before, strict=True):
            parameter.grad = grad
    return Ledger({row: rows[row] for row in ROWS if row in rows}, title)


def _check_names(method: str, backend: str, optimizer: str) -> None:
    known = {
        "method": (method, METHODS),
        "backend": (backend, ("qlab", "bitsandbytes")),
        "optimizer": (optimizer, OPTIMIZERS),
    }
    for argument, (value, names) in known.items():
        if value not in names:
            raise ValueError(f"{argument} is one of {', '.join(map(repr, names))}, got {value!r}")


def _bytes(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Of the distinct storages that are not in `seen`, which takes them up."""
    seen, total = set() if seen is None else seen, 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def _held(model: nn.Module) -> dict[str, int]:
    """weights, constants and adapter."""
    seen: set[int] = set()
    adapter = _bytes(trainable_parameters(model), seen)
    constants = _bytes(_constants(model), seen)
    weights = _bytes((*model.parameters(), *model.buffers()), seen)
    return {"weights": weights, "constants": constants, "adapter": adapter}


def _constants(model: nn.Module) -> Iterator[Tensor]:
    """What decodes the codes of every layer."""
    for module in model.modules():
        if isinstance(module, FrozenBuffers):  # QuantLinear, ActQuant, FakeQuant
            yield from (buffer for name, buffer in module.named_buffers(recurse=False) if name != "packed")
        elif bitsandbytes_kind(module) and holds_codes(module):
            if bitsandbytes_kind(module) == "Linear8bitLt":
                yield row_absmax(module)
                continue
            state = quant_state(module)
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)


def _tables(model: nn.Module) -> int:
    """bitsandbytes' levels of every 4-bit layer, 16 numbers, and 256 with double quantization."""
    layers = [
        layer for layer in model.modules() if isinstance(layer, QuantLinear) and hasattr(layer.format, "double_quant")
    ]
    return sum(4 * 16 + 4 * 256 * layer.format.double_quant for layer in layers)


def _adamw(trained: list[nn.Parameter]) -> int:
    """Two averages in the parameter's dtype, and a float32 step count, for each parameter."""
    return sum(2 * p.nbytes + 4 for p in trained)


def _adamw_8bit(trained: list[nn.Parameter]) -> int:
    """Dettmers et al. 2021, arXiv:2110.02861: bytes, a float32 absmax for each block of 256, and two tables for all."""
    large = [p.numel() for p in trained if p.numel() >= EIGHT_BIT_SIZE]
    small = sum(p.numel() for p in trained) - sum(large)
    return 2 * sum(n + 4 * -(-n // EIGHT_BIT_BLOCK) for n in large) + 2 * 4 * small + 2 * 4 * 256 * bool(large)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], int]] = {
    "adamw_torch": _adamw, "adamw_torch_fused": _adamw, "adamw_8bit": _adamw_8bit, "adamw_bnb_8bit": _adamw_8bit,
    "sgd": lambda trained: 0,
}  # fmt: skip


class _Alive(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed: `peak` bytes at the most."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            key = storage._cdata
            if key not in given and key not in self.alive:  # else a view, or written in place
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key).atexit = False
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def _peak(trained: list[nn.Parameter], step: Callable[[], Tensor]) -> int:
    """The most that the loss and its backward pass hold beside what was there, gradients in place."""
    if not trained:
        raise ValueError("no parameter requires a gradient, so no step can be measured: add_adapters or bitfit first")
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    device = trained[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        torch.autograd.backward(step())
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Alive() as alive:
        torch.autograd.backward(step())
    return alive.peak


def _activations(
    net: nn.Module, batch_size: int, tokens: int, autocast: torch.dtype | None, gradient_checkpointing: bool
) -> int:
    net.train()
    if gradient_checkpointing:
        inner = next((m for m in net.modules() if hasattr(m, "activation_checkpointing_enable")), None)
        if inner is None:
            raise ValueError(f"{type(net).__name__} holds no transformers model: it has no gradient checkpointing")
        inner.activation_checkpointing_enable({"use_reentrant": False})

    def step() -> Tensor:
        with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
            return training_loss(net, batch_size, tokens)

    return _peak(trainable_parameters(net), step)


def device_memory() -> tuple[float, str]:
    """GiB of the first GPU, or of the machine's memory where there is none, and its name."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1] / GIB, torch.cuda.get_device_name()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, "this machine's memory"


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict the memory of fine-tuning runs from configs alone.")
    parser.add_argument("models", nargs="*", default=list(LLAMA_2), help="7B, 13B, 70B, a folder or a Hub id")
    parser.add_argument("--method", choices=METHODS, default="qlora")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw_torch")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--memory", type=float, help="of the device, in GiB; default: of this one")
    args = vars(parser.parse_args())
    models, memory = args.pop("models"), args.pop("memory") or device_memory()[0]
    for name in models:
        ledger = predict(name, args["method"], **{key: value for key, value in args.items() if key != "method"})
        print(ledger, ledger.fits(memory), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
