"""The learning-rate sweep: towns are kept apart, the shipped table is whole, and the recipes are what it says."""

import csv

import numpy as np
import pytest

from qlab.train import merges
from qlab.train.merge_tasks import MergeTask, TuningTask


def test_validation_towns_train_nothing_and_are_no_test_towns():
    task, plain = TuningTask(towns=5), MergeTask(0, test_towns=None)
    asked, trained = set(task.groups), {item.entity for item in task.train}
    assert len(asked) == 5 and not asked & trained
    assert asked | trained == {item.entity for item in plain.train}
    assert not (asked | trained) & set(plain.groups)
    assert [item.entity for item in task.test] == task.groups


def test_one_row_for_each_rate(monkeypatch):
    monkeypatch.setattr(merges, "RATES", {("lora", ""): (1e-3,), ("qalora", "mean"): (1e-2, 2e-2)})
    rows = list(merges.learning_rates(TuningTask(towns=1), 4, steps=2))
    assert [(row["adapter"], row["pooling"], row["lr"]) for row in rows] == [
        ("lora", "", 1e-3), ("qalora", "mean", 1e-2), ("qalora", "mean", 2e-2)
    ]  # fmt: skip
    sizes = [float(row["delta_over_weight"]) for row in rows]
    assert 0 < sizes[0] and 0 < sizes[1] < sizes[2]
    assert all(row["steps"] == 2 and 0 <= float(row["exact_match"]) <= 1 for row in rows)


def test_the_shipped_sweep_is_whole_and_chose_the_recipe_of_qalora():
    rows = list(csv.DictReader(merges.LR_TABLE.open(encoding="utf-8")))
    found = {(int(r["bits"]), r["adapter"], r["pooling"], float(r["lr"])): float(r["exact_match"]) for r in rows}
    assert found.keys() == {(b, *key, lr) for b in (4, 3) for key, rates in merges.RATES.items() for lr in rates}
    mean = {
        key: np.mean([found[b, "qalora", *key] for b in (4, 3)])
        for key in ((p, lr) for _, a, p, lr in found if a == "qalora")
    }
    best = max(mean, key=mean.get)
    assert best == (MergeTask.settings["qalora"]["pooling"], pytest.approx(MergeTask.recipes["qalora"].lr))
