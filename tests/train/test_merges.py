"""The merge table: every merge of every adapter is measured, and put back exactly before the next."""

import csv

import numpy as np
import pytest

from qlab.train import merges
from qlab.train.finetune import LoraRecipe


class Small(merges.MergeTask):
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
    assert merges.base_format(3).bits == 3 and merges.base_format(3).float_zero_point


def test_calibration_is_training_questions(task):
    batches = task.calibration(40)
    assert [len(batch["input_ids"]) for batch in batches] == [16, 16, 8]
    text = task.tokenizer.decode(batches[0]["input_ids"][0], skip_special_tokens=True)
    assert task.train[0].prompt in text and task.train[0].answer in text
    assert not {item.entity for item in task.train} & set(task.groups)


def test_gain_is_paired():
    class Stub:
        groups, tokenizer, prose, model = ["a", "a", "b", "b"], None, None, None

    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merges, "perplexity", lambda *args: type("E", (), {"value": 2.0}))
        rows.append(merges._measured(Stub(), None, np.array([1, 0, 1, 1]), np.array([1, 1, 1, 1])))
    assert rows[0]["exact_match"] == "0.75000" and rows[0]["gain"] == "-0.25000"


def test_the_shipped_table_is_whole_and_says_what_each_merge_must():
    rows = list(csv.DictReader(merges.TABLE.open(encoding="utf-8")))
    found = {(int(r["bits"]), int(r["seed"]), r["adapter"], r["merge"]): float(r["exact_match"]) for r in rows}
    expected = {"lora": ["unmerged", *merges.MERGES], "qalora": ["unmerged", *merges.ZERO_POINTS]}
    for bits in merges.BITS:
        for seed in range(3):
            for kind, names in expected.items():
                assert {key[3] for key in found if key[:3] == (bits, seed, kind)} == set(names)
            unmerged = {kind: found[bits, seed, kind, "unmerged"] for kind in expected}
            assert found[bits, seed, "lora", "dequantize"] == pytest.approx(unmerged["lora"], abs=0.002)
            assert found[bits, seed, "qalora", "zero-points float32"] == pytest.approx(unmerged["qalora"], abs=0.002)
