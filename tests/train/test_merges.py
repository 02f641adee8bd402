"""The merge table: every merge of every adapter is measured, and put back exactly before the next."""

import csv

import numpy as np
import pytest
import torch

from qlab.train import merge_tasks, merges
from qlab.train.answers import LoraRecipe
from qlab.train.classify import ClassifyRecipe


class Small(merge_tasks.MergeTask):
    def __init__(self):
        super().__init__(0, test_towns=3)
        self.prose, self.asked = self.prose[:2], []

    def scores(self, model):
        self.asked.append(super().scores(model))
        return self.asked[-1]


@pytest.fixture(scope="module")
def task():
    return Small()


@pytest.mark.parametrize("kind, names", [("lora", merges.MERGES), ("qalora", merges.ZERO_POINTS)])
def test_every_merge_has_a_row(task, kind, names):
    rows = list(merges.merges(task, 4, kind, LoraRecipe(steps=2, batch_size=4)))
    assert [row["merge"] for row in rows] == ["unmerged", *names]
    assert all(row.keys() == rows[0].keys() for row in rows), "one header serves them all"
    by_name = {row["merge"]: row for row in rows}
    exact = "zero-points float32" if kind == "qalora" else "dequantize"
    perplexities = [float(by_name[name]["prose_perplexity"]) for name in (exact, "unmerged")]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-3)
    assert float(by_name[exact]["delta_kept"]) == pytest.approx(1, abs=0.01)
    assert by_name["requantize"]["bits_per_weight"] == "6.000" and by_name["dequantize"]["bits_per_weight"] == "32.000"
    if kind == "qalora":
        assert by_name["zero-points float16"]["bits_per_weight"] == "5.500"
        assert by_name["zero-points uint8"]["bits_per_weight"] == "5.250"
    assert task.asked[-1].shape == (24,) and len(task.groups) == 24


def test_both_adapters_stand_on_the_same_base():
    assert merge_tasks.base_format(3).bits == 3 and merge_tasks.base_format(3).float_zero_point


def test_calibration_is_training_questions(task):
    batches = task.calibration(40)
    assert [len(batch["input_ids"]) for batch in batches] == [16, 16, 8]
    text = task.tokenizer.decode(batches[0]["input_ids"][0], skip_special_tokens=True)
    assert task.train[0].prompt in text and task.train[0].answer in text
    assert not {item.entity for item in task.train} & set(task.groups)


def test_gain_is_paired():
    class Stub:
        groups = ["a", "a", "b", "b"]

        def measures(self, model):
            return {}

    row = merges._measured(Stub(), None, np.array([1, 0, 1, 1]), np.array([1, 1, 1, 1]))
    assert row["exact_match"] == "0.75000" and row["gain"] == "-0.25000"


@pytest.fixture(scope="module")
def intents():
    return merge_tasks.IntentTask(0, train=64, test=16)


def test_requests_share_no_wording_with_the_training(intents):
    assert not {item.wording for item in intents.train} & set(intents.groups)
    batches = intents.calibration(48)
    assert [len(batch["input_ids"]) for batch in batches] == [32, 16]


@pytest.mark.parametrize("kind", ["lora", "qalora"])
def test_the_encoder_trains_adapters_and_its_head_and_merges(intents, kind):
    rows = {row["merge"]: row for row in merges.merges(intents, 4, kind, ClassifyRecipe(steps=4, batch_size=4))}
    assert list(rows) == ["unmerged", *(merges.ZERO_POINTS if kind == "qalora" else merges.MERGES)]
    exact = "zero-points float32" if kind == "qalora" else "dequantize"
    assert rows[exact]["exact_match"] == rows["unmerged"]["exact_match"]
    assert float(rows[exact]["delta_kept"]) == pytest.approx(1, abs=0.01) and "prose_perplexity" not in rows[exact]


def test_a_smaller_delta_lies_between_all_of_it_and_none(intents):
    rows = list(merges.shrunk(intents, 4, ClassifyRecipe(steps=4, batch_size=4), shares=(1.0, 0.5)))
    assert [(row["merge"], row["delta_share"]) for row in rows] == [
        ("unmerged", "1.00"), ("unmerged", "0.50"), ("requantize", "")
    ]  # fmt: skip
    assert all(0 <= float(row[which]) <= 1 for row in rows for which in ("unseen_wordings", "trained_wordings"))
    assert intents.fresh and not {item.text for item in intents.fresh} & {item.text for item in intents.train}
    assert {item.wording for item in intents.fresh} & {item.wording for item in intents.train}


def test_the_head_is_not_rounded_and_trains(intents):
    model = intents.tuned(4, "lora", ClassifyRecipe(steps=4, batch_size=4))
    assert isinstance(model.classifier, torch.nn.Linear) and model.classifier.weight.requires_grad
    assert not torch.equal(model.classifier.weight, intents.model.classifier.weight)
    assert not model.encoder.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize("task", merges.TABLES)
def test_the_shipped_tables_are_whole_and_say_what_each_merge_must(task):
    rows = list(csv.DictReader(merges.TABLES[task].open(encoding="utf-8")))
    found = {(int(r["bits"]), int(r["seed"]), r["adapter"], r["merge"]): float(r["exact_match"]) for r in rows}
    expected = {"lora": ["unmerged", *merges.MERGES], "qalora": ["unmerged", *merges.ZERO_POINTS]}
    for bits in merges.BITS:
        for seed in range(3):
            for kind, names in expected.items():
                assert {key[3] for key in found if key[:3] == (bits, seed, kind)} == set(names)
            unmerged = {kind: found[bits, seed, kind, "unmerged"] for kind in expected}
            assert found[bits, seed, "lora", "dequantize"] == pytest.approx(unmerged["lora"], abs=0.0025)
            assert found[bits, seed, "qalora", "zero-points float32"] == pytest.approx(unmerged["qalora"], abs=0.0025)
