"""Pretrain qlab-mini: `python -m qlab.train.pretrain` reproduces data/qlab-mini (see its model card).

Batch number n is a pure function of (seed, n) and the model has no dropout, so a run killed and started again goes
on from its last complete checkpoint along the same loss curve, to the last bit on the same machine and threads.
The learning rate warms up, stays constant, then falls linearly to zero (Hu et al., "MiniCPM", arXiv 2404.06395,
section 4): as long as the fall has not begun, --steps can be changed and the run continued.
"""

import argparse
import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from qlab.train.corpus import DATA, END, PAD, Corpus, train_tokenizer


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes in elements, `length` in tokens, `steps`, `warmup` and `checkpoint_every` in optimizer steps."""

    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    vocab_size: int = 1536
    towns: int | None = None
    rows: int = 16
    length: int = 256
    steps: int = 6_000
    warmup: int = 200
    decay: float = 0.25
    lr: float = 3e-3
    weight_decay: float = 0.01
    seed: int = 0
    bf16: bool = True
    compile: bool = False
    checkpoint_every: int = 250
    device: str = "cpu"


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, constant, linear fall over the last part."""
    falling = max(1, round(config.decay * config.steps))
    return config.lr * min(1.0, (step + 1) / config.warmup, (config.steps - step) / falling)


def build_model(config: PretrainConfig, tokenizer) -> torch.nn.Module:
    """A LlamaForCausalLM with tied embeddings and random weights drawn from config.seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    end = tokenizer.convert_tokens_to_ids(END)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        )
    )


def save_checkpoint(folder: Path, step: int, config: PretrainConfig, model, optimizer) -> None:
    """Write folder/step-<step> under a temporary name, then rename: a checkpoint that has its name is complete."""
    final = folder / f"step-{step:07d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parameters = dict(model.named_parameters())
    moments = {
        f"{name}/{key}": value.reshape(1) if value.dim() == 0 else value
        for name, p in parameters.items()
        for key, value in optimizer.state[p].items()
    }
    save_file({name: p.detach() for name, p in parameters.items()}, partial / "model.safetensors")
    save_file(moments, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, "config": asdict(config)}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in sorted(folder.glob("step-???????"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, config: PretrainConfig, model, optimizer) -> int:
    """Restore the newest complete checkpoint of `folder`; return its step, 0 where there is none."""
    complete = sorted(folder.glob("step-???????"))
    if not complete:
        return 0
    state = json.loads((complete[-1] / "state.json").read_text())
    free = ("steps", "decay", "compile", "checkpoint_every", "device")
    changed = {
        key: (value, getattr(config, key))
        for key, value in state["config"].items()
        if key not in free and getattr(config, key) != value
    }
    if changed:
        raise ValueError(
            f"{complete[-1]} was written with other settings (old, new): {changed}. Use the old ones, or another --out."
        )
    weights = load_file(complete[-1] / "model.safetensors")
    moments = load_file(complete[-1] / "optimizer.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
            step = moments[f"{name}/step"].reshape(())
            optimizer.state[p] = {"step": step} | {
                key: moments[f"{name}/{key}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")
            }
    return state["step"]


def read_losses(path: Path, steps: int) -> list[str]:
    """The lines of a loss log up to step `steps` (what came after the checkpoint is trained again)."""
    return path.read_text().splitlines()[: steps + 1] if steps and path.is_file() else ["step,loss,learning_rate"]


def pretrain(config: PretrainConfig, out: Path, tokenizer=None, stop_at: int | None = None, progress: bool = True):
    """Train, or continue, in `out` (checkpoints/, losses.csv) and save the finished Hugging Face folder there.

    stop_at: leave after this step as a kill would (tests). Returns (model, tokenizer).
    """
    corpus = Corpus(config.towns)
    tokenizer = tokenizer or train_tokenizer(corpus, config.vocab_size, config.seed)
    model = build_model(config, tokenizer).to(config.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.98), fused=True, weight_decay=config.weight_decay
    )
    start = load_checkpoint(out / "checkpoints", config, model, optimizer)
    out.mkdir(parents=True, exist_ok=True)
    losses = read_losses(out / "losses.csv", start)

    def loss_of(ids):
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
            logits = model(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if config.compile else loss_of

    def batch(n):
        return corpus.batch(tokenizer, config.seed, n, config.rows, config.length)

    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=config.steps, initial=start, disable=not progress, mininterval=10) as bar,
    ):
        following = pool.submit(batch, start)
        for step in range(start, config.steps):
            ids = following.result().to(config.device)
            following = pool.submit(batch, step + 1)
            optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            loss = step_loss(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(f"{step + 1},{loss.item():.6f},{learning_rate(config, step):.3e}")
            bar.update()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                (out / "losses.csv").write_text("\n".join(losses) + "\n")
                save_checkpoint(out / "checkpoints", step + 1, config, model, optimizer)
            if step + 1 == stop_at:
                return model, tokenizer
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "pretrain.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    return model, tokenizer


def mean_losses(path: Path, every: int) -> list[dict[str, float]]:
    """The loss log averaged over blocks of `every` steps: rows of step and loss (nats per token)."""
    with path.open(newline="") as file:
        values = [float(row["loss"]) for row in csv.DictReader(file)]
    return [
        {"step": end, "loss": round(sum(values[end - every : end]) / every, 4)}
        for end in range(every, len(values) + 1, every)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DATA.parent / "build" / "qlab-mini")
    for name, default in asdict(PretrainConfig()).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(flag, type=int if default is None else type(default), default=default)
    args = vars(parser.parse_args())
    out = args.pop("out")
    pretrain(PretrainConfig(**args), out)


if __name__ == "__main__":
    main()
