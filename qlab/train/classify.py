"""An encoder learns to tell intents apart: one short loop for full training, adapters and QAT alike.

    encoder, tokenizer = load("all-MiniLM-L6-v2")
    model = Classifier(encoder, len(INTENTS))
    train_classifier(model, tokenizer, requests("train", 3000))
    right = classified(model, tokenizer, requests("test", 960))

What trains is what requires a gradient: `prepare_qat` and `add_adapters` before, and the loop stays the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qlab.models import trainable_parameters
from qlab.train.intents import Request


@dataclass(frozen=True)
class ClassifyRecipe:
    """`steps` optimizer steps (AdamW, the learning rate rising to `lr` and falling to 0) of `batch_size` sentences."""

    lr: float = 3e-4
    steps: int = 100
    batch_size: int = 32


class Classifier(nn.Module):
    """An encoder and a linear head on the mean of its last hidden states.

    The mean is what sentence-transformers models were trained to make: a linear head on all-MiniLM-L6-v2 as it is tells 82% of
    the test sentences apart by it, and 72% by the pooler of transformers' BertForSequenceClassification, which reads the first
    token.
    """

    def __init__(self, encoder: nn.Module, labels: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs) -> Tensor:
        """input_ids, attention_mask: (sentences, tokens). Returns logits (sentences, labels)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        counted = attention_mask.unsqueeze(-1)
        return self.classifier((hidden * counted).sum(1) / counted.sum(1))


def padded(tokenizer, items: Sequence[Request]) -> tuple[dict[str, Tensor], Tensor]:
    """({input_ids, attention_mask, …}: (items, tokens), labels (items,)), padded to the longest."""
    batch = tokenizer([item.text for item in items], padding=True, truncation=True, return_tensors="pt")
    return dict(batch), torch.tensor([item.label for item in items])


def train_classifier(
    model,
    tokenizer,
    items: Sequence[Request],
    recipe: ClassifyRecipe = ClassifyRecipe(),
    seed: int = 0,
    *,
    groups: list[dict] | None = None,
    after_step: Callable[[], None] | None = None,
    progress: bool = False,
) -> list[float]:
    """Train whatever of `model` requires a gradient, in place; it ends in eval mode. Returns the loss (nats) of every step.

    groups : an optimizer's parameter groups with learning rates of their own (`qlab.qat.parameter_groups`).
    after_step : called after every optimizer step. The seed draws the batches, and dropout through torch's generator.
    """
    optimizer = torch.optim.AdamW(groups or trainable_parameters(model), lr=recipe.lr, weight_decay=0.0)
    highest = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, recipe.steps, pct_start=0.1)
    device, losses = next(model.parameters()).device, []
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    for _ in tqdm(range(recipe.steps), disable=not progress, leave=False):
        drawn = torch.randint(len(items), (recipe.batch_size,), generator=generator).tolist()
        batch, labels = padded(tokenizer, [items[i] for i in drawn])
        logits = model(**{name: ids.to(device) for name, ids in batch.items()})
        loss = torch.nn.functional.cross_entropy(logits.float(), labels.to(device))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if after_step:
            after_step()
        losses.append(loss.item())
    model.eval()
    return losses


def by_length(items: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
    """Indices of items in batches of like length: less padding."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].text))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.no_grad()
def classified(model, tokenizer, items: Sequence[Request], batch_size: int = 64) -> np.ndarray:
    """Which items get their own label: bool, (items,)."""
    if not items:
        raise ValueError("no items to score")
    model.eval()
    device, right = next(model.parameters()).device, np.zeros(len(items), dtype=bool)
    for indices in by_length(items, batch_size):
        batch, labels = padded(tokenizer, [items[i] for i in indices])
        guess = model(**{name: ids.to(device) for name, ids in batch.items()}).argmax(-1).cpu()
        right[indices] = (guess == labels).numpy()
    return right
