"""The classification loop: it learns, is drawn by its seed, trains what requires a gradient, and counts right answers."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from qlab.train.classify import Classifier, ClassifyRecipe, by_length, classified, train_classifier
from qlab.train.intents import INTENTS, requests


class Words:
    """A tokenizer of whole words, numbered by their letters."""

    def __call__(self, texts, **kwargs):
        ids = [[1 + sum(map(ord, word)) % 90 for word in text.split()] for text in texts]
        width = max(map(len, ids))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        return {"input_ids": padded, "attention_mask": (padded > 0).long()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=100, **sizes), add_pooling_layer=False)
    return Classifier(encoder, len(INTENTS)).eval()


def test_the_mean_leaves_padding_out(model):
    ids, more = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0]])
    alone = model(ids, torch.ones_like(ids))
    assert torch.allclose(model(more, (more > 0).long()), alone, atol=1e-6) and alone.shape == (1, 16)


def test_it_learns_and_the_seed_draws_the_run(model):
    items = requests("train", 64)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = ClassifyRecipe(lr=5e-3, steps=60, batch_size=16)
    losses = train_classifier(model, Words(), items, recipe)
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10]) and not model.training
    assert classified(model, Words(), items).mean() > 0.5
    model.load_state_dict(start)
    assert train_classifier(model, Words(), items, recipe) == losses
    model.load_state_dict(start)
    assert train_classifier(model, Words(), items, recipe, seed=1) != losses


def test_only_what_requires_a_gradient_moves_and_groups_have_their_rates(model):
    model.encoder.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps, groups = (
        [],
        [{"params": [model.classifier.weight], "lr": 1e-2}, {"params": [model.classifier.bias], "lr": 0.0}],
    )
    train_classifier(
        model, Words(), requests("train", 32), ClassifyRecipe(steps=3, batch_size=4), groups=groups,
        after_step=lambda: steps.append(1),
    )  # fmt: skip
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["classifier.weight"] and len(steps) == 3


def test_right_answers_are_in_the_order_of_the_items(model):
    items = requests("test", 32)
    with torch.no_grad():
        one_by_one = [model(**Words()([item.text])).argmax().item() == item.label for item in items]
    assert classified(model, Words(), items, batch_size=5).tolist() == one_by_one
    assert sorted(i for part in by_length(items, 5) for i in part) == list(range(32))
    with pytest.raises(ValueError, match="no items"):
        classified(model, Words(), [])
