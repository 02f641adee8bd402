"""`make bench-merge`: memory and time of `qlab merge` on a checkpoint of several gigabytes, beside PEFT's on the same files.

A sharded bfloat16 checkpoint with layers of 4096 and an adapter on all its linear layers, both random, are written to a
temporary folder; each merge is a process of its own, with the same number of threads. Peak memory is RssAnon of
/proc/PID/status, asked for every 20 ms: what the process holds itself, without the files it reads, which the kernel can drop.
Throughput: bytes of the base over wall time, from the start of Python to its end; CPU s is what that cost on all cores,
which other work on the machine changes less.

What is compared: original with PEFT's merge of a float base; dequantize with the same model made by transformers and PEFT
(load in 4 bit, dequantize(), merge); requantize with PEFT's merge of a base in 4 bit, which is that.
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from qlab.models.shards import INDEX, ShardWriter

HIDDEN, INTERMEDIATE, VOCABULARY, RANK = 4096, 11008, 32000, 16
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, out, how = sys.argv[1:]
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
settings = {} if how == "original" else {"quantization_config": four_bit}
from qlab.models import guard_bitsandbytes
guard_bitsandbytes()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **settings)
if how == "dequantize":
    model = model.dequantize(torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def linears(layers):
    """name → (out, in) of every linear layer."""
    sizes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    sizes |= {
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    return {f"model.layers.{i}.{name}": size for i in range(layers) for name, size in sizes.items()}


def random(shape, generator, size):
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, size, generator=generator)


def make_base(folder, layers):
    """A Llama-like model, two layers to a file."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    shapes = {f"{name}.weight": shape for name, shape in linears(layers).items()}
    norms = [f"model.layers.{i}.{name}_layernorm.weight" for i in range(layers) for name in ("input", "post_attention")]
    shapes |= {name: (HIDDEN,) for name in [*norms, "model.norm.weight"]}
    shapes |= {name: (VOCABULARY, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    files = {}
    for name, shape in shapes.items():
        found = re.search(r"layers\.(\d+)", name)
        files.setdefault(f"model-{int(found[1]) // 2 if found else layers:05}.safetensors", {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    for file, own in files.items():
        with ShardWriter(folder / file, {name: (torch.bfloat16, shape) for name, shape in own.items()}) as writer:
            for name, shape in own.items():
                writer.write(
                    name, random(shape, generator, 0.02) if len(shape) == 2 else torch.ones(shape, dtype=torch.bfloat16)
                )
    weight_map = {name: file for file, own in files.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def make_adapter(folder, layers):
    """On every linear layer, with ‖Δ‖ about a tenth of ‖W‖."""
    from safetensors.torch import save_file

    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, (out_features, in_features) in linears(layers).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = random((RANK, in_features), generator, 0.02).float()
        tensors[f"base_model.model.{name}.lora_B.weight"] = random((out_features, RANK), generator, 0.0125).float()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({n.rpartition(".")[2] for n in linears(1)}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))


def measured(command, out):
    """(seconds, seconds of processor time, peak RssAnon in bytes) of a command; what it wrote is removed."""
    before, spent = time.perf_counter(), processor_time()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - before
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(map(str, command[:4]))} … failed:\n{output.read()[-3000:]}")
    if out.exists():
        shutil.rmtree(out)
    return seconds, processor_time() - spent, peak


def processor_time():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def anonymous(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=10, help="decoder layers: 0.41 GB each, and 0.52 GB of embeddings"
    )
    parser.add_argument("--folder", help="where the temporary files go; three times the base is needed")
    parser.add_argument("--only", default="", help="regular expression for the names of the merges to run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        base, adapter, out = (Path(root) / name for name in ("base", "adapter", "out"))
        total = make_base(base, given.layers)
        make_adapter(adapter, given.layers)
        largest = 2 * max(VOCABULARY * HIDDEN, INTERMEDIATE * HIDDEN)
        print(
            f"base {total / 1e9:.2f} GB in {len(list(base.glob('*.safetensors')))} files; largest tensor {largest / 1e9:.2f} GB "
            f"(embeddings), largest merged {2 * INTERMEDIATE * HIDDEN / 1e9:.2f} GB; {torch.get_num_threads()} thread(s)\n"
            f"{'merge':44} {'seconds':>8} {'CPU s':>7} {'MB/s':>6} {'peak RssAnon, GB':>17}"
        )
        qlab = [sys.executable, "-m", "qlab.cli", "merge", base, adapter, out]
        peft = [sys.executable, "-c", PEFT, base, adapter, out]
        nf4 = ["--base-quant", "nf4"]
        commands = {
            "qlab, the plan and the prediction alone": [*qlab, *nf4, "--dry-run"],
            "qlab original": [*qlab, "--how", "original"],
            "qlab original, not verified": [*qlab, "--how", "original", "--verify", "none"],
            "PEFT on the float base": [*peft, "original"],
            "qlab dequantize, nf4": [*qlab, *nf4],
            "qlab dequantize, nf4, not verified": [*qlab, *nf4, "--verify", "none"],
            "transformers dequantize() of nf4, then PEFT": [*peft, "dequantize"],
            "qlab requantize, nf4": [*qlab, *nf4, "--how", "requantize"],
            "PEFT on the base in nf4": [*peft, "requantize"],
        }
        for name, command in commands.items():
            if re.search(given.only, name):
                seconds, busy, peak = measured(command, out)
                print(
                    f"{name:44} {seconds:8.1f} {busy:7.1f} {total / 1e6 / seconds:6.0f} {peak / 1e9:17.2f}", flush=True
                )


if __name__ == "__main__":
    main()
