"""What the merge tables are measured on: questions to qlab-mini, and intents of requests to a real encoder.

Each task has one seed, and says how its model is rounded and trained, what it is asked, and on what layers are calibrated.
"""

import copy
import random

import numpy as np
import torch

from qlab.adapters import add_adapters
from qlab.formats import IntAffine
from qlab.models import load
from qlab.ptq import quantize_model
from qlab.train import tasks
from qlab.train.answers import LoraRecipe, train_answers
from qlab.train.classify import Classifier, ClassifyRecipe, classified, padded, train_classifier
from qlab.train.evaluate import exact, perplexity
from qlab.train.intents import INTENTS, requests


def base_format(bits: int) -> IntAffine:
    """What the base is rounded to, before training and where a merge rounds again."""
    return IntAffine(bits, symmetric=False, granularity="group", group_size=32, float_zero_point=True)


class MergeTask:
    """Questions about towns that no training question names, to a language model. `groups` are the towns."""

    recipes = {"lora": LoraRecipe(), "qalora": LoraRecipe(lr=8e-2)}
    settings = {"lora": {}, "qalora": {"pooling": "mean"}}

    def __init__(self, seed: int, name: str = "qlab-mini", test_towns: int = 250):
        self.seed = seed
        self.model, self.tokenizer = load(name)
        self.train, self.test = tasks.question_task(seed, test_towns=test_towns)
        self.groups = [item.entity for item in self.test]
        self.prose = tasks.held_out_prose(60)

    def quantize(self, model, bits: int, method: str = "rtn"):
        """Round every layer that has an adapter, in place. Returns the report of `quantize_model`."""
        data = self.calibration() if method == "gptq" else None
        return quantize_model(model, base_format(bits), method, data, progress=False)

    def tuned(self, bits: int, kind: str, recipe, **settings):
        """The task's model rounded to `bits`, with trained adapters of `kind`. settings: of the adapter (pooling)."""
        model = copy.deepcopy(self.model)
        self.quantize(model, bits)
        torch.manual_seed(self.seed)
        self.adapt(model, kind, recipe, settings)
        return model

    def adapt(self, model, kind: str, recipe: LoraRecipe, settings: dict) -> None:
        targets = list(recipe.targets)
        add_adapters(model, kind, r=recipe.r, lora_alpha=recipe.lora_alpha, target_modules=targets, **settings)
        train_answers(model, self.tokenizer, self.train, recipe, self.seed)

    def scores(self, model) -> np.ndarray:
        """Which of the questions are answered exactly: (questions,) bool."""
        return exact(model, self.tokenizer, self.test)

    def measures(self, model) -> dict[str, str]:
        """What is measured beside the scores."""
        return {"prose_perplexity": f"{perplexity(model, self.tokenizer, self.prose).value:.4f}"}

    def calibration(self, questions: int = 256) -> list:
        """Training questions with their answers, in batches of 16."""
        texts = [item.prompt + item.answer for item in self.train[:questions]]
        parts = [texts[start : start + 16] for start in range(0, len(texts), 16)]
        return [dict(self.tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


class TuningTask(MergeTask):
    """Asks about towns of the training half, and trains on the others of it."""

    def __init__(self, seed: int = 0, towns: int = 100):
        super().__init__(seed)
        names = sorted({item.entity for item in self.train})
        held_out = set(random.Random("learning rates").sample(names, towns))
        self.test = [item for item in self.train if item.entity in held_out]
        self.train = [item for item in self.train if item.entity not in held_out]
        self.groups = [item.entity for item in self.test]


class IntentTask(MergeTask):
    """Intents of requests in wordings that no training request has, to an encoder. `groups` are the wordings.

    The head is new, trains in full beside the adapters, and is not rounded. The rates were the best of a few at 3 bits (LoRA: 1e-3,
    3e-3, 6e-3; QA-LoRA, sum: 1e-3, 3e-3; mean: 1e-2, 3e-2, 1e-1) on training wordings that did not train: the test wordings
    had no part in the choice.
    """

    recipes = {"lora": ClassifyRecipe(lr=3e-3), "qalora": ClassifyRecipe(lr=1e-3)}
    settings = {"lora": {}, "qalora": {"pooling": "sum"}}
    r, lora_alpha = 8, 16

    def __init__(self, seed: int, name: str = "all-MiniLM-L6-v2", train: int = 3000, test: int = 480):
        self.seed = seed
        encoder, self.tokenizer = load(name)
        encoder.pooler = None  # reads the first token, and is not read by the mean
        torch.manual_seed(seed)
        self.model = Classifier(encoder, len(INTENTS))
        self.train, self.test = requests("train", train, seed), requests("test", test, seed)
        self.groups, seen = [item.wording for item in self.test], {item.text for item in self.train}
        others = requests("train", train + 3 * test, seed + 50)
        self.fresh = [item for item in others if item.text not in seen][
            :test
        ]  # new sentences in the wordings of training

    def quantize(self, model, bits: int, method: str = "rtn"):
        data = self.calibration() if method == "gptq" else None
        return quantize_model(model, base_format(bits), method, data, select=_not_the_head, progress=False)

    def adapt(self, model, kind: str, recipe: ClassifyRecipe, settings: dict) -> None:
        add_adapters(model, kind, self.r, self.lora_alpha, exclude_modules=["classifier"], **settings)
        model.classifier.requires_grad_(True)
        train_classifier(model, self.tokenizer, self.train, recipe, self.seed)

    def scores(self, model) -> np.ndarray:
        """Which of the requests get their own intent: (requests,) bool."""
        return classified(model, self.tokenizer, self.test)

    def measures(self, model) -> dict[str, str]:
        return {}

    def calibration(self, questions: int = 256) -> list:
        """Training requests, in batches of 32."""
        items = self.train[:questions]
        return [padded(self.tokenizer, items[start : start + 32])[0] for start in range(0, len(items), 32)]


def _not_the_head(name: str, layer) -> bool:
    return name != "classifier"


TASKS = {"questions": MergeTask, "intents": IntentTask}
