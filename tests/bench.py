"""Speed and memory of formats and methods beside the libraries that have them too, as ratios measured in one run.

    make bench

Every round times ours and each peer once, in turn, so that a machine whose speed drifts does not favour one; the ratio is
the median over rounds of peer time / our time: above 1, ours is faster. Peak memory is the largest resident size during
the call above the size before it, over the bytes of the float32 input (Linux only: it reads /proc).
"""

import copy
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from peft import LoraConfig, get_peft_model
from sklearn.cluster import KMeans as ClusterKMeans
from torch import nn
from torchao.quantization import to_nf4
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from qlab.adapters import add_adapters
from qlab.formats import NF4, IntAffine, KMeans
from qlab.models import guard_bitsandbytes, replace, trainable_parameters
from qlab.nn import QuantLinear
from qlab.ptq import gptq, hqq, quantize_model
from qlab.train.ptq_sweep import LanguageTask, weight_format

guard_bitsandbytes()
import bitsandbytes.functional as bnb  # noqa: E402 (after the guard, which quiets its import)
from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402

ROUNDS = 15
SHAPE = (4096, 4096)


def peak_memory(call: Callable) -> float:
    """Bytes by which `call` raises the resident size at its highest; NaN where the system cannot tell."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # memory kept back by the allocator would hide what the call needs
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


def four_bit(linear: nn.Linear, dtype: torch.dtype) -> Linear4bit:
    layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False)
    return layer.to("cpu")  # which is when it is quantized


def contenders(model: nn.Sequential, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same NF4 codes, the same A and B, in qlab and in PEFT over bitsandbytes."""
    names = [name for name, layer in model.named_children() if isinstance(layer, nn.Linear)]
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    replace(ours, names, lambda _, layer: QuantLinear.from_linear(layer, NF4(64)))
    add_adapters(ours, r=8, lora_alpha=16, target_modules=names)
    replace(theirs, names, lambda _, layer: four_bit(layer, dtype))
    for name in names:
        assert torch.equal(ours.get_submodule(name).base.packed, theirs.get_submodule(name).weight.data.view(-1))
    theirs.is_loaded_in_4bit = True  # transformers sets this; without it PEFT takes the layers for float ones
    theirs = get_peft_model(theirs, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    with torch.no_grad():
        for our, their in zip(trainable_parameters(ours), trainable_parameters(theirs), strict=True):
            their.copy_(our)
    unguarded = copy.deepcopy(theirs)
    for layer in unguarded.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = bnb.has_avx512bf16()
    return {"qlab": ours, "guarded": theirs, "unguarded": unguarded, "unguarded, evaluated": copy.deepcopy(unguarded)}


def lora_step(width: int, layers: int, tokens: int, dtype: torch.dtype, rounds: int = 7) -> None:
    """Forward, backward and AdamW. Loss: the mean square of the distance to random targets."""
    torch.manual_seed(0)
    linears = [(nn.Linear(width, width, bias=False, dtype=dtype), nn.GELU()) for _ in range(layers)]
    models = contenders(nn.Sequential(*(module for pair in linears for module in pair)), dtype)
    x, target = torch.randn(tokens, width, dtype=dtype), torch.randn(tokens, width)
    with torch.no_grad():  # where bitsandbytes is not guarded, this repacks its weights
        models["unguarded, evaluated"].eval()(x)
        models["unguarded, evaluated"].train()
    optimizers = {who: torch.optim.AdamW(trainable_parameters(model), lr=1e-3) for who, model in models.items()}
    losses, seconds = {who: [] for who in models}, {who: [] for who in models}

    def step(who: str) -> None:
        optimizers[who].zero_grad()
        loss = (models[who](x).float() - target).square().mean()
        loss.backward()
        optimizers[who].step()
        losses[who].append(loss.item())

    for who in models:
        step(who)  # the warm-up, in which AdamW makes its moments
    memory = {who: peak_memory(lambda who=who: step(who)) for who in models}
    for _ in range(rounds):
        for who in models:
            start = time.perf_counter()
            step(who)
            seconds[who].append(time.perf_counter() - start)
    print(f"\n{layers} layers {width}×{width}, {tokens} tokens, {dtype}")
    for who in models:
        ratio = statistics.median(peer / our for peer, our in zip(seconds[who], seconds["qlab"], strict=True))
        apart = max(abs(peer - our) for peer, our in zip(losses[who], losses["qlab"], strict=True))
        print(
            f"    {who:22}{statistics.median(seconds[who]) * 1e3:8.1f} ms   time {ratio:5.2f} × qlab's   peak memory "
            f"{memory[who] / memory['qlab']:5.2f} × qlab's ({memory[who] / 2**20:.0f} MiB)   losses {apart:.1e} apart"
        )


def lora_steps() -> None:
    print(
        "\nOne LoRA step over NF4: qlab beside PEFT + bitsandbytes, guarded and not; the last one ran once in eval mode first"
    )
    for width, layers in ((2048, 4), (4096, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (128, 2048):
                lora_step(width, layers, tokens, dtype)


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
    lora_steps()
    whole_model()
