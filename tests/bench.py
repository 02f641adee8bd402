"""Speed and memory of formats and methods beside the libraries that have them too, as ratios measured in one run.

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
from hqq.core.quantize import Quantizer
from sklearn.cluster import KMeans as ClusterKMeans
from torchao.quantization import to_nf4
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from qlab.formats import NF4, IntAffine, KMeans
from qlab.models import guard_bitsandbytes
from qlab.ptq import gptq, hqq, quantize_model
from qlab.train.sweep import LanguageTask, weight_format

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


def compare(name: str, w: torch.Tensor, ours: Callable, peers: dict[str, Callable], rounds: int = ROUNDS) -> None:
    calls = {"qlab": ours} | peers
    memory = {who: peak_memory(call) / w.nbytes for who, call in calls.items()}  # also the warm-up
    seconds = {who: [] for who in calls}
    for _ in range(rounds):
        for who, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[who].append(time.perf_counter() - start)
    for who in calls:
        throughput = w.nbytes / statistics.median(seconds[who]) / 1e6
        ratio = statistics.median(peer / our for peer, our in zip(seconds[who], seconds["qlab"], strict=True))
        print(
            f"{name:24} {who:14} {throughput:8.1f} MB/s   time {ratio:6.2f} × qlab's   peak memory {memory[who]:5.2f} × input"
        )


def formats() -> None:
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    print(
        f"{SHAPE[0]}×{SHAPE[1]} float32, {threads} threads, median of {ROUNDS} rounds; MB/s counts the float32 side\n"
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


def methods() -> None:
    w = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    print("\n1024×4096 float32, median of 5 rounds\n")
    x = torch.randn(8192, 4096, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 4096)
    hessian = x.T @ x * (2 / len(x))
    group = IntAffine(4, symmetric=False, granularity="group", group_size=128)
    compare("GPTQ int4 g128", w, lambda: gptq(w, hessian, group), {}, rounds=5)

    float_zero = IntAffine(4, symmetric=False, granularity="group", group_size=64, float_zero_point=True)
    peer = {"hqq": lambda: Quantizer.quantize(w, nbits=4, group_size=64, axis=1, device="cpu")}
    compare("HQQ int4 g64", w, lambda: hqq(w, float_zero), peer, rounds=5)

    points = w.reshape(-1, 1).numpy()
    peer = {"scikit-learn": lambda: ClusterKMeans(16, n_init=1, random_state=0).fit(points)}
    compare("k-means, 16 levels", w, lambda: KMeans(4).quantize(w), peer, rounds=3)


def whole_model() -> None:
    task = LanguageTask()
    batches = task.calibration(seed=0)
    start = time.perf_counter()
    report = quantize_model(task.model, weight_format(4), "gptq", batches, progress=False)
    seconds, tokens = time.perf_counter() - start, sum(batch["input_ids"].numel() for batch in batches)
    print(f"\nGPTQ of qlab-mini, {len(report.layers)} layers, {tokens} tokens of calibration data: {seconds:.1f} s")


if __name__ == "__main__":
    formats()
    methods()
    whole_model()
