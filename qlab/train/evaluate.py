"""Exact match, perplexity, and how sure of them one can be: `python -m qlab.train.evaluate`.

An answer counts when greedy decoding would write it, and its stop, and nothing else. That needs no decoding: the
prompt and the right answer go through the model once, and the answer is exact when every one of its tokens is the
arg-max given the tokens before it. (If one is not, greedy decoding leaves the answer there; if all are, it cannot.)

Intervals are bootstrap percentiles over entities, for one entity's facts are not independent (Efron & Tibshirani,
"An Introduction to the Bootstrap", 1993, chapter 13); two models are compared on the same entities, in pairs.
"""

import argparse
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from qlab.models import load
from qlab.train import tasks
from qlab.train.tasks import Item


class Estimate(NamedTuple):
    """A mean and the ends of its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def encode_items(tokenizer, items: Sequence[Item]) -> list[tuple[list[int], int]]:
    """(token ids of prompt + answer + stop, number of prompt tokens) of every item."""
    prompts = tokenizer([i.prompt for i in items]).input_ids
    answers = tokenizer([i.answer + i.stop for i in items], add_special_tokens=False).input_ids
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def batches(sequences: Sequence[tuple[list[int], int]], pad: int, size: int):
    """Yield (indices, ids (rows, tokens), mask of answer tokens (rows, tokens)), sequences of like length together.

    Padding stands on the right, where no causal model looks.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        width = max(len(sequences[i][0]) for i in indices)
        ids = torch.full((len(indices), width), pad)
        answer = torch.zeros(len(indices), width, dtype=torch.bool)
        for row, i in enumerate(indices):
            tokens, prompt_length = sequences[i]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            answer[row, prompt_length : len(tokens)] = True
        yield indices, ids, answer


@torch.no_grad()
def exact(model, tokenizer, items: Sequence[Item], batch_size: int = 256) -> np.ndarray:
    """Which items greedy decoding answers exactly: bool, (len(items),)."""
    if not items:
        raise ValueError("no items to score")
    model.eval()
    device = next(model.parameters()).device
    right = np.zeros(len(items), dtype=bool)
    for indices, ids, answer in batches(encode_items(tokenizer, items), tokenizer.pad_token_id, batch_size):
        guess = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        wrong = (guess != ids[:, 1:]) & answer[:, 1:]
        right[indices] = ~wrong.any(1).numpy()
    return right


def bootstrap(values: np.ndarray, groups: Sequence, samples: int = 1000, seed: int = 0) -> Estimate:
    """Mean of `values` (n,) with a 95% interval, whole `groups` (n labels, such as entities) drawn with replacement."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) != len(groups) or not len(values):
        raise ValueError(
            f"values {values.shape} and {len(groups)} groups: one value for each group label, at least one"
        )
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    totals, counts = np.bincount(index, values), np.bincount(index)
    draws = np.random.default_rng(seed).integers(len(totals), size=(samples, len(totals)))
    means = totals[draws].sum(1) / counts[draws].sum(1)
    return Estimate(float(values.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975))))


def paired_difference(first: np.ndarray, second: np.ndarray, groups: Sequence, **kwargs) -> Estimate:
    """Mean of second − first on the same items, with its interval: 0 outside it means a difference is there."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values: both models must answer the same items")
    return bootstrap(np.asarray(second, dtype=float) - np.asarray(first, dtype=float), groups, **kwargs)


@torch.no_grad()
def perplexity(model, tokenizer, texts: Sequence[str], batch_size: int = 64) -> Estimate:
    """exp of the mean loss per token (natural log) of whole texts, the interval by bootstrap over texts."""
    model.eval()
    device = next(model.parameters()).device
    encoded = [(tokens, 1) for tokens in tokenizer(list(texts)).input_ids]
    losses, owners = [], []
    for indices, ids, counted in batches(encoded, tokenizer.pad_token_id, batch_size):
        logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float().cpu()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(loss[counted[:, 1:]])
        owners.append(torch.tensor(indices)[:, None].expand_as(loss)[counted[:, 1:]])
    estimate = bootstrap(torch.cat(losses).numpy(), torch.cat(owners).numpy())
    return Estimate(*(float(np.exp(x)) for x in estimate))


def exact_match(model, tokenizer, items: Sequence[Item], **kwargs) -> Estimate:
    """Share of items answered exactly, its interval by bootstrap over entities."""
    return bootstrap(exact(model, tokenizer, items, **kwargs), [i.entity for i in items])


@torch.no_grad()
def embed(encoder, tokenizer, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """Sentence embeddings as the sentence-transformers models make them: the mean of the last hidden states over tokens,
    divided by its length. (texts, hidden) float32."""
    encoder.eval()
    device, embeddings = next(encoder.parameters()).device, []
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        batch = tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(device)
        hidden, counted = encoder(**batch).last_hidden_state.float(), batch["attention_mask"].unsqueeze(-1)
        mean = (hidden * counted).sum(1) / counted.sum(1)
        embeddings.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
    return torch.cat(embeddings)


def report(model, tokenizer, towns: int = 60) -> dict[str, Estimate]:
    """The default sample: cloze on `towns` evenly spaced towns and 200 held-out sums and real facts, prose perplexity."""
    atlas = tasks.atlas_cloze()
    per_town = len({i.relation for i in atlas})
    stride = max(1, len(atlas) // per_town // towns)
    sample = [i for n, i in enumerate(atlas) if (n // per_town) % stride == 0]
    return {
        "atlas": exact_match(model, tokenizer, sample),
        "world": exact_match(model, tokenizer, tasks.world_cloze()[::4]),
        "sums": exact_match(model, tokenizer, tasks.sum_items(100)),
        "prose perplexity": perplexity(model, tokenizer, tasks.held_out_prose(50)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match and perplexity of a qlab-mini model folder.")
    parser.add_argument("--model", default="qlab-mini", help="what qlab.models.load takes")
    parser.add_argument("--towns", type=int, default=60, help="towns in the sample; 1200 are all")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = report(*load(args.model), args.towns)
    print(json.dumps(result) if args.json else "\n".join(f"{key:17} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
