"""The bitsandbytes guard: keep Linear4bit weights in the layout they were quantized in.

On a CPU with AVX512_BF16, bitsandbytes 0.50's `Linear4bit.forward` repacks its weight in place the first time
it runs in eval mode on an input without gradient. After that, with no exception anywhere: `dequantize_4bit`
returns garbage, so a merge after an evaluation destroys the layer; back in train mode no gradient flows
through the layer; and the block scales have been rounded to bfloat16. Sizes that 32 or the block do not
divide raise instead.

Layers ask `bitsandbytes.nn.modules.has_avx512bf16()` once, when they are built. The guard makes that answer
False for the process, and switches the per-layer flag off on layers that were built before it.
"""

import importlib.util
import logging
from dataclasses import dataclass

from torch import nn

from qlab.nn.weights import is_repacked


@dataclass(frozen=True)
class GuardState:
    """What the guard found and did."""

    installed: bool  # bitsandbytes can be imported
    cpu_repacks: bool  # this CPU has AVX512_BF16, so unguarded layers would repack
    layers: int  # Linear4bit layers of the given model whose own flag was switched off just now

    def __str__(self):
        if not self.installed:
            return "bitsandbytes is not installed: nothing to guard"
        reason = "this CPU has AVX512_BF16, so without it 4-bit weights would be repacked in place"
        return f"on ({reason if self.cpu_repacks else 'not needed on this CPU, which lacks AVX512_BF16'})"


def _never_repack():
    return False


def _is_not_kernels_notice(record):
    return "kernels-community" not in record.getMessage()


def guard_bitsandbytes(model: nn.Module | None = None) -> GuardState:
    """Stop bitsandbytes from repacking 4-bit weights: in this process, and in the layers that `model` has.

    Idempotent. Call it before 4-bit layers are built, or pass the model they are in before its first forward.

    Raises RuntimeError, naming the layers, when layers of `model` were already repacked: their block scales
    have been rounded to bfloat16, so the original weights cannot be restored and the model has to be loaded
    again.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return GuardState(installed=False, cpu_repacks=False, layers=0)
    # Importing it advises to install `kernels`, which fetches code from the Hub at run time: leave that out.
    notices = logging.getLogger("bitsandbytes.backends.cpu.ops")
    if _is_not_kernels_notice not in notices.filters:
        notices.addFilter(_is_not_kernels_notice)
    import bitsandbytes

    bitsandbytes.nn.modules.has_avx512bf16 = _never_repack
    switched = 0 if model is None else _guard_layers(model, bitsandbytes.nn.Linear4bit)
    return GuardState(True, bool(bitsandbytes.functional.has_avx512bf16()), switched)


def _guard_layers(model, linear4bit):
    layers = {name: module for name, module in model.named_modules() if isinstance(module, linear4bit)}
    repacked = [name for name, module in layers.items() if is_repacked(module)]
    if repacked:
        raise RuntimeError(
            f"an eval forward without the guard has already repacked {len(repacked)} Linear4bit layer(s): "
            f"{', '.join(repacked[:5])}{', …' if len(repacked) > 5 else ''}. Their block scales are rounded "
            "to bfloat16 and cannot be restored. Call qlab.models.guard_bitsandbytes() first, then load or "
            "quantize the model again"
        )
    switched = [module for module in layers.values() if module.support_avx512bf16_for_cpu]
    for module in switched:
        module.support_avx512bf16_for_cpu = False
    return len(switched)
