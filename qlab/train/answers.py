"""LoRA on the question task, in one short loop: what the base model's figures in its card were made with.

`python -m qlab.train.answers` prints exact match on the test entities before and after, for several seeds.
LoRA: Hu et al., arXiv 2106.09685, section 4.1; the adapters are PEFT's.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from qlab.models import load, trainable_parameters
from qlab.train import tasks
from qlab.train.evaluate import batches, encode_items, exact_match
from qlab.train.tasks import Item


@dataclass(frozen=True)
class LoraRecipe:
    """r and lora_alpha as in the paper; `batch_size` in questions, `steps` in optimizer steps."""

    r: int = 8
    lora_alpha: int = 16
    lr: float = 2e-3
    steps: int = 300
    batch_size: int = 64
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    bf16: bool = True


def answer_loss(model, ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats per token) over the answer tokens of ids (rows, tokens), marked by `answer`."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[answer[:, 1:]].float(), ids[:, 1:][answer[:, 1:]])


def train_lora(
    model, tokenizer, items: Sequence[Item], recipe: LoraRecipe = LoraRecipe(), seed: int = 0, progress: bool = False
):
    """Wrap `model` in LoRA adapters and train them on `items`; returns the PeftModel (the base is not changed)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(
        model,
        LoraConfig(
            r=recipe.r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=0.0,
            target_modules=list(recipe.targets),
            task_type="CAUSAL_LM",
        ),
    )
    return train_answers(model, tokenizer, items, recipe, seed, progress)


class AnswerLogits(torch.nn.Module):
    """A language model as a classifier of answer tokens, so that one cross-entropy fits both tasks."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """input_ids, answer (which tokens are answers): (rows, tokens). Returns logits (answer tokens, vocabulary)."""
        return self.model(input_ids=input_ids, use_cache=False).logits[:, :-1][answer[:, 1:]]


def train_answers(
    model,
    tokenizer,
    items: Sequence[Item],
    recipe: LoraRecipe,
    seed: int = 0,
    progress: bool = False,
    groups: list[dict] | None = None,
):
    """Train whatever of `model` requires a gradient on the answers of `items`; returns the model, in eval mode.

    Of the recipe lr, steps, batch_size and bf16 are read. The seed draws the batches. groups : an optimizer's parameter groups with
    learning rates of their own (`qlab.qat.parameter_groups`).
    """
    optimizer = torch.optim.AdamW(groups or trainable_parameters(model), lr=recipe.lr, weight_decay=0.0)
    highest = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, recipe.steps, pct_start=0.1)
    encoded = encode_items(tokenizer, items)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in tqdm(range(recipe.steps), disable=not progress, mininterval=5):
        drawn = torch.randint(len(encoded), (recipe.batch_size,), generator=generator).tolist()
        ((_, ids, answer),) = batches([encoded[i] for i in drawn], tokenizer.pad_token_id, recipe.batch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            loss = answer_loss(model, ids.to(device), answer.to(device))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA on the question task: exact match on the test entities.")
    parser.add_argument("--model", default="qlab-mini", help="what qlab.models.load takes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=LoraRecipe.steps)
    parser.add_argument("--lr", type=float, default=LoraRecipe.lr)
    parser.add_argument("--r", type=int, default=LoraRecipe.r)
    parser.add_argument("--train-towns", type=int, default=None, help="all of the training half by default")
    parser.add_argument("--test-towns", type=int, default=250)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    recipe = LoraRecipe(r=args.r, lora_alpha=2 * args.r, lr=args.lr, steps=args.steps)
    rows = []
    for seed in range(args.seeds):
        model, tokenizer = load(args.model)
        train, test = tasks.question_task(seed, args.train_towns, args.test_towns)
        before = exact_match(model, tokenizer, test)
        model = train_lora(model, tokenizer, train, recipe, seed, progress=not args.json)
        rows.append(
            {
                "seed": seed,
                "before": before,
                "after": exact_match(model, tokenizer, test),
                "train": exact_match(model, tokenizer, train[:500]),
            }
        )
        if not args.json:
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
