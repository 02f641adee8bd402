"""Speed and memory of the formats beside bitsandbytes and torchao, as ratios measured in one run.

    make bench

Every round times ours and each peer once, in turn, so that a machine whose speed drifts does not favour one; the ratio is
the median over rounds of peer time / our time: above 1, ours is faster. Peak memory is the largest resident size during
the call above the size before it, over the bytes of the float32 input (Linux only: it reads /proc).
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torchao.quantization import to_nf4
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from qlab.formats import NF4, IntAffine
from qlab.models import guard_bitsandbytes

guard_bitsandbytes()
import bitsandbytes.functional as bnb  # noqa: E402 (after the guard, which quiets its import)

ROUNDS = 15
SHAPE = (4096, 4096)


def peak_memory(call: Callable) -> float:
    """Bytes by which `call` raises the resident size at its highest; NaN where the system cannot tell."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return float("nan")
    clear.write_text("5")  # the peak starts anew from the present size

    def kilobytes(field: str) -> int:
        return int(status.read_text().split(field)[1].split()[0])

    before = kilobytes("VmRSS:")
    result = call()
    peak = kilobytes("VmHWM:")
    del result
    return (peak - before) * 1024


def compare(name: str, w: torch.Tensor, ours: Callable, peers: dict[str, Callable]) -> None:
    calls = {"qlab": ours} | peers
    memory = {who: peak_memory(call) / w.nbytes for who, call in calls.items()}  # also the warm-up
    seconds = {who: [] for who in calls}
    for _ in range(ROUNDS):
        for who, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[who].append(time.perf_counter() - start)
    for who in calls:
        throughput = w.nbytes / statistics.median(seconds[who]) / 1e9
        ratio = statistics.median(peer / our for peer, our in zip(seconds[who], seconds["qlab"], strict=True))
        print(
            f"{name:24} {who:14} {throughput:7.2f} GB/s   time {ratio:6.2f} × qlab's   peak memory {memory[who]:5.2f} × input"
        )


def main() -> None:
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    print(
        f"{SHAPE[0]}×{SHAPE[1]} float32, {threads} threads, median of {ROUNDS} rounds; GB/s counts the float32 side\n"
    )

    block, group = 64, 128
    nf4 = NF4(block)
    q = nf4.quantize(w)
    packed, state = bnb.quantize_4bit(w, blocksize=block, quant_type="nf4")
    ao = to_nf4(w, block)
    compare(
        "NF4 quantize",
        w,
        lambda: nf4.quantize(w),
        {
            "bitsandbytes": lambda: bnb.quantize_4bit(w, blocksize=block, quant_type="nf4"),
            "torchao": lambda: to_nf4(w, block),
        },
    )
    compare(
        "NF4 dequantize",
        w,
        q.dequantize,
        {"bitsandbytes": lambda: bnb.dequantize_4bit(packed, state), "torchao": ao.get_original_weight},
    )

    int4 = IntAffine(4, symmetric=False, granularity="group", group_size=group)
    qi = int4.quantize(w)
    size, limits = (1, group), (torch.uint8, 0, 15)

    def torchao_quantize():
        scale, zero_point = choose_qparams_affine(w, MappingType.ASYMMETRIC, size, *limits)
        return quantize_affine(w, size, scale, zero_point, *limits), scale, zero_point

    codes, scale, zero_point = torchao_quantize()
    compare("int4 g128 quantize", w, lambda: int4.quantize(w), {"torchao, unpacked": torchao_quantize})
    compare(
        "int4 g128 dequantize",
        w,
        qi.dequantize,
        {"torchao, unpacked": lambda: dequantize_affine(codes, size, scale, zero_point, *limits)},
    )


if __name__ == "__main__":
    main()
