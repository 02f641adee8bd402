"""What a fine-tune's rows become: token ids, batches, a loss and scores. One class for each kind of data.

A task does the same for any model: `model` is what trains around the `backbone` that has the adapters; `encode` makes token ids of
rows, and refuses those that do not fit, by file and line; `collate` makes a batch of some; `loss` is the batch's, in nats; and
`evaluate` scores. `head` is what trains beside the adapters.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModel, PreTrainedTokenizerBase

from qlab.train.classify import Classifier
from qlab.train.evaluate import batches, encode_items
from qlab.train.finetune_data import Data
from qlab.train.tasks import Item

IGNORED = -100  # transformers' label for a token without a loss


class Answers:
    """A language model continues the prompt by the answer and its stop; the loss is on their tokens alone."""

    heads: tuple[str, ...] = ()  # modules that train in full, neither rounded nor adapted

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, labels=()):
        self.tokenizer, self.max_length, self.labels, self.cut = tokenizer, max_length, list(labels), 0
        self.pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

    def model(self, base):
        """The model to train, around what was loaded."""
        if base.get_output_embeddings() is None:
            raise ValueError(
                f'{type(base).__name__} is an encoder, which writes no text: it trains on rows of "text" and "label"'
            )
        return base

    def skeleton(self, config):
        """What the memory of a run is predicted from: the config, or where that does not say it all a model of random numbers."""
        return config

    def backbone(self, model):
        return model

    def head(self, model):
        return None

    def encode(self, data: Data) -> list[tuple[list[int], int]]:
        """(token ids, how many of them are the prompt's) of every row."""
        end = self.tokenizer.eos_token
        if end is None and any("stop" not in row for row in data.rows):
            raise ValueError(
                f'{data.path}: the tokenizer has no end of text, so every row needs a "stop" after its answer'
            )
        items = [Item(row["prompt"], row["answer"], row.get("stop", end), "", "") for row in data.rows]
        encoded = encode_items(self.tokenizer, items)
        for number, (ids, prompt) in enumerate(encoded):
            if prompt == 0:
                raise ValueError(f"{data.where(number)}: the tokenizer makes no token of the prompt")
            if len(ids) > self.max_length:
                raise ValueError(
                    f"{data.where(number)}: prompt, answer and stop are {len(ids)} tokens, and max_length is {self.max_length}: the "
                    "answer would be cut off. Shorten the row, or raise max_length"
                )
        return encoded

    def collate(self, rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
        """ids (rows, tokens), padded on the right where no causal model looks, and the same as labels where they count."""
        ((_, ids, answer),) = batches(rows, self.pad, len(rows))
        return {"input_ids": ids, "labels": ids.masked_fill(~answer, IGNORED)}

    def loss(self, outputs, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Mean over the tokens that count, or their sum over `num_items_in_batch`, those of the whole step."""
        logits = outputs.logits[:, :-1].float().flatten(0, 1)
        return _mean(logits, labels[:, 1:].flatten(), num_items_in_batch)

    @torch.no_grad()
    def evaluate(self, model, rows: list[tuple[list[int], int]], batch_size: int) -> dict[str, float]:
        """loss, nats per token, and the share of rows that greedy decoding would answer exactly (`qlab.train.evaluate`)."""
        device, total, count, right = next(model.parameters()).device, 0.0, 0, 0
        for _, ids, answer in batches(rows, self.pad, batch_size):
            logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
            wanted, counted = ids[:, 1:].to(device), answer[:, 1:].to(device)
            total += float(cross_entropy(logits[counted], wanted[counted], reduction="sum"))
            count += int(counted.sum())
            right += int((~((logits.argmax(-1) != wanted) & counted).any(1)).sum())
        return {"loss": total / count, "exact_match": right / len(rows)}


class Text(Answers):
    """A language model on running text: documents with an end of text after each, cut into blocks of max_length tokens."""

    def encode(self, data: Data) -> list[tuple[list[int], int]]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        documents = self.tokenizer([row["text"] for row in data.rows]).input_ids
        stream = [token for document in documents for token in [*document, *end]]
        blocks = [stream[start : start + self.max_length] for start in range(0, len(stream), self.max_length)]
        blocks = [(block, 1) for block in blocks if len(block) > 1]  # of a block's first token nothing is asked
        if not blocks:
            raise ValueError(f"{data.path} has {len(stream)} tokens: the loss needs at least 2")
        return blocks

    def evaluate(self, model, rows: list[tuple[list[int], int]], batch_size: int) -> dict[str, float]:
        """loss, nats per token, and perplexity."""
        loss = super().evaluate(model, rows, batch_size)["loss"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}


class Labels:
    """An encoder and a new head tell texts apart. Longer texts than max_length tokens are cut: `cut` counts them."""

    heads = ("classifier",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: list[str | int]):
        self.tokenizer, self.max_length, self.labels, self.cut = tokenizer, max_length, labels, 0

    def model(self, base) -> Classifier:
        if base.get_output_embeddings() is not None:
            raise ValueError(f'{type(base).__name__} is a language model: rows of "text" and "label" need an encoder')
        base.pooler = None  # reads the first token, and is not read by the mean
        return Classifier(base, len(self.labels)).to(base.device)

    def skeleton(self, config) -> Classifier:
        return self.model(AutoModel.from_config(config, dtype=config.dtype))

    def backbone(self, model: Classifier):
        return model.encoder

    def head(self, model: Classifier):
        return model.classifier

    def encode(self, data: Data) -> list[tuple[list[int], int]]:
        """(token ids, number of the label) of every row."""
        texts, numbers = [row["text"] for row in data.rows], {label: n for n, label in enumerate(self.labels)}
        whole = self.tokenizer(texts, truncation=False).input_ids
        self.cut += sum(len(ids) > self.max_length for ids in whole)
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length).input_ids
        return [(tokens, numbers[row["label"]]) for tokens, row in zip(ids, data.rows, strict=True)]

    def collate(self, rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
        batch = self.tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, return_tensors="pt")
        return dict(batch) | {"labels": torch.tensor([label for _, label in rows])}

    def loss(self, outputs: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        return _mean(outputs.float(), labels, num_items_in_batch)

    @torch.no_grad()
    def evaluate(self, model, rows: list[tuple[list[int], int]], batch_size: int) -> dict[str, float]:
        """loss, nats per text, and the share of texts that get their own label."""
        device, total, right = next(model.parameters()).device, 0.0, 0
        rows = sorted(rows, key=lambda row: len(row[0]))
        for start in range(0, len(rows), batch_size):
            batch = {name: tensor.to(device) for name, tensor in self.collate(rows[start : start + batch_size]).items()}
            labels = batch.pop("labels")
            logits = model(**batch).float()
            total += float(cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
        return {"loss": total / len(rows), "accuracy": right / len(rows)}


def _mean(logits: Tensor, labels: Tensor, count: Tensor | None) -> Tensor:
    """logits (n, classes), labels (n,): cross-entropy in nats."""
    if count is None:
        return cross_entropy(logits, labels, ignore_index=IGNORED)
    return cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / count


TASKS = {"answers": Answers, "text": Text, "labels": Labels}
