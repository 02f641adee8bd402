"""The table of QAT + LoRA: every training is measured as it is stored, and its merges; a sweep that stops can go on."""

import copy
import csv
import math

import numpy as np
import pytest
import torch
from torch import nn

from qlab.adapters import LoRALinear, QATLoRALinear, adapters_of, add_adapters, convert_qat_lora
from qlab.nn import QuantLinear
from qlab.qat import QATLinear
from qlab.train import merge_tasks, qat_lora_sweep
from qlab.train.answers import LoraRecipe
from qlab.train.qat_lora_sweep import (
    GRID,
    PTQ,
    RATES,
    SCHOOLS,
    SEEDS,
    as_classifier,
    bits_per_weight,
    cells,
    change,
    each,
    factor_format,
    measured,
    rate,
    rate_cells,
    read_table,
    select,
    trained,
    with_gains,
)
from qlab.train.qat_sweep import compare

RECIPE = LoraRecipe(lr=5e-3, steps=3, batch_size=4, bf16=False)


class Small(merge_tasks.MergeTask):
    recipes = {"lora": RECIPE}

    def __init__(self, *args):
        super().__init__(0, test_towns=3)
        self.prose, self.asked = self.prose[:2], []

    def scores(self, model):
        """Some right and some wrong, by what the model is."""
        logits = model(torch.arange(24)[:, None]).logits[:, 0].sum(-1)
        self.asked.append((copy.deepcopy(model), (logits > logits.median()).numpy()))
        return self.asked[-1][1]


@pytest.fixture(scope="module")
def task():
    return Small()


def cell(method, bits=3, **more):
    return {"task": "questions", "seed": 0, "method": method, "bits": bits, "lr": 5e-3, "steps": 3} | more


@pytest.fixture
def measure(task, monkeypatch):
    """measured, on the small task, with what was converted and what came of it."""
    seen, convert = [], convert_qat_lora

    def spy(model):
        with torch.no_grad():
            logits = model(torch.arange(9)[None]).logits
            report = convert(model)
            seen.append((logits, model(torch.arange(9)[None]).logits))
        return report

    monkeypatch.setattr(qat_lora_sweep, "task_of", lambda *args: task)
    monkeypatch.setattr(qat_lora_sweep, "convert_qat_lora", spy)
    monkeypatch.setitem(merge_tasks.TASKS, "questions", Small)
    task.asked.clear()
    return lambda *args, **more: (measured(cell(*args, **more))["rows"], seen)


@pytest.mark.parametrize("method", [*SCHOOLS, "lora", "qlora"])
def test_a_row_is_what_the_scores_say_of_what_is_stored(measure, task, method):
    widths = [4, 3] if method == "lora" else 3
    rows, converted = measure(method, widths)
    merges = [(ptq, bits) for bits in ([4, 3] if method == "lora" else [3]) for ptq in PTQ]
    expected = [("as trained", 32 if method == "lora" else 3), *([] if method == "merged" else merges)]
    assert [(row["stored"], row["bits"]) for row in rows] == expected
    assert all(list(row) == list(rows[0]) for row in rows), "one header serves them all"
    assert len(converted) == (method in SCHOOLS) and all(torch.equal(*both) for both in converted)
    for row, (model, scores) in zip(rows, task.asked, strict=True):
        right = np.array(row["right"].split(), dtype=int)
        names = sorted(set(task.groups))
        assert right.tolist() == [sum(s for s, g in zip(scores, task.groups, strict=True) if g == n) for n in names]
        assert float(row["score"]) == pytest.approx(right.sum() / 24, abs=1e-5) and 0 < right.sum() < 24
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        if row["stored"] in PTQ or method == "merged":
            assert type(layer) is QuantLinear and repr(layer.format) == repr(merge_tasks.base_format(row["bits"]))
            assert row["bits_per_weight"] == f"{row['bits'] + 2}.000"
        else:
            assert type(layer) is LoRALinear
            assert type(layer.base) is (nn.Linear if method in ("lora", "factors") else QuantLinear)
            assert float(row["bits_per_weight"]) > (32 if method in ("lora", "factors") else 5)
        costs = row["seconds"] != "" and float(row["memory_mib"]) > 0
        assert costs == (row["stored"] == "as trained")


def test_one_lora_is_merged_for_every_width(measure, task):
    measure("lora", [4, 3])
    (float_model, _), *rounded = task.asked
    target = float_model.get_submodule("model.layers.0.mlp.up_proj").dequantized_weight()
    for model, _ in rounded:
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        error = (layer.dequantized_weight() - target).norm() / target.norm()
        assert 0.02 < error < 0.4, "each is a rounding of the same W + ΔW"


def test_the_base_school_is_qlora(task):
    ours, _ = trained(task, "base", 3, RECIPE)
    qlora, _ = trained(task, "qlora", 3, RECIPE)
    for a, b in zip(adapters_of(ours).values(), adapters_of(qlora).values(), strict=True):
        assert torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B) and b.lora_B.any()
        assert type(a.base) is QATLinear and type(b.base) is QuantLinear
    assert bits_per_weight(ours) == bits_per_weight(qlora)


def test_seed_and_recipe_decide_the_training(task):
    first, again = (trained(task, "merged", 3, RECIPE)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    _, cost = trained(task, "merged", 3, RECIPE)
    assert float(cost["seconds"]) > 0 and not adapters_of(task.model), "the task's model stays as it was"


def small_model(school=None, bits=3):
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 32, bias=False))
    fmt = factor_format(bits) if school == "factors" else merge_tasks.base_format(bits)
    settings = {} if school is None else {"kind": "qat", "school": school, "fmt": fmt}
    add_adapters(model, r=2, lora_alpha=2, **settings)
    return model


def test_bits_per_weight_by_hand():
    weights, factors = 64 * 32 + 32 * 32, 2 * (64 + 32) + 2 * (32 + 32)
    assert bits_per_weight(small_model("merged")) == 3 + 2
    assert bits_per_weight(small_model("base")) == 3 + 2 + 32 * factors / weights
    assert bits_per_weight(small_model()) == 32 + 32 * factors / weights
    rows = (2 + 32) + (2 + 32)  # of A and of B, each with a float32 scale and zero point
    codes = sum(8 * math.ceil(3 * n / 8) for n in (2 * 64, 32 * 2, 2 * 32, 32 * 2))
    assert bits_per_weight(small_model("factors")) == pytest.approx(32 + (codes + 64 * rows) / weights)


@pytest.mark.parametrize("school", [None, *SCHOOLS])
def test_codes_move_with_the_change(school):
    model = small_model(school)
    weights = {name: torch.nn.Linear(1, 1) for name in adapters_of(model)}
    for name, layer in adapters_of(model).items():
        base = layer.base.weight
        weights[name].weight = nn.Parameter(base.detach().clone())

    class Task:
        pass

    Task.model = nn.Sequential(*weights.values())
    found = []
    for size in (0.0, 1e-5, 0.3, 3.0):
        for layer in adapters_of(model).values():
            layer.lora_B.data = size * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(1))
        row = change(Task, model, 3)
        found.append((float(row["codes_moved"]), float(row["delta_over_weight"])))
    shares, sizes = zip(*found, strict=True)
    assert shares[0] == 0 and sizes[0] == 0 and shares[1] < 0.01 < 0.1 < shares[2] < shares[3] < 1
    assert sizes[1] < sizes[2] < sizes[3]
    layer = adapters_of(model)["0"]
    q = merge_tasks.base_format(3).quantize(Task.model[0].weight.detach())
    start = q.dequantize() if school == "base" else Task.model[0].weight
    if school != "factors":
        ratios = [float((layer.scaling * layer.lora_B @ layer.lora_A).norm() / start.norm())]
        layer = adapters_of(model)["1"]
        w = Task.model[1].weight.detach()
        start = merge_tasks.base_format(3).quantize(w).dequantize() if school == "base" else w
        ratios.append(float((layer.scaling * layer.lora_B @ layer.lora_A).norm() / start.norm()))
        assert sizes[-1] == pytest.approx(np.median(ratios), rel=1e-3)


def test_a_row_of_a_learning_rate(task, monkeypatch):
    monkeypatch.setattr(qat_lora_sweep, "task_of", lambda *args, tuning: task if tuning else None)
    monkeypatch.setitem(merge_tasks.TASKS, "questions", Small)
    row = rate(cell("merged"))
    assert {key: row[key] for key in cell("merged")} == cell("merged")
    assert 0 < float(row["codes_moved"]) < 1 and 0 < float(row["loss"]) and float(row["prose_perplexity"]) > 1
    model, inputs, labels = as_classifier(task, task.model, 5)
    assert len(inputs["input_ids"]) == 5 and model(**inputs).shape[0] == len(labels)
    text = "".join(task.tokenizer.batch_decode(labels))
    assert all(item.answer in text for item in task.train[:5])


def test_what_tunes_a_rate_is_not_what_is_measured():
    tuning, final = qat_lora_sweep.task_of("questions", 0, True), qat_lora_sweep.task_of("questions", 0)
    assert type(tuning) is merge_tasks.TuningTask and type(final) is merge_tasks.MergeTask
    assert not set(tuning.groups) & set(final.groups)


def test_the_encoder_trains_and_is_measured(monkeypatch):
    small = merge_tasks.IntentTask(0, train=64, test=96)
    monkeypatch.setattr(qat_lora_sweep, "task_of", lambda *args, **kwargs: small)
    run = {"task": "intents", "seed": 0, "method": "base", "bits": 3, "lr": 3e-3, "steps": 2}
    rows = measured(run)["rows"]
    assert [row["stored"] for row in rows] == ["as trained", *PTQ]
    assert all(len(row["right"].split()) == 48 for row in rows)
    row = rate(run | {"method": "merged"})
    assert row["prose_perplexity"] == "" and 0 < float(row["loss"]) < 5
    model, _ = trained(small, "merged", 3, qat_lora_sweep.recipe_of(run))
    assert all(type(layer) is QATLoRALinear for layer in adapters_of(model).values())
    assert type(model.classifier) is nn.Linear and model.classifier.weight.requires_grad


def row_of(method, stored, right, seed=0, bits=3):
    return {"task": "questions", "seed": seed, "method": method, "bits": bits, "stored": stored, "right": right}


def test_gains_are_paired_with_the_rounded_lora_of_the_same_seed_and_width():
    rows = [row_of("lora", "as trained", "8 8", bits=32), row_of("lora", "rtn", "1 3"), row_of("lora", "gptq", "2 2")]
    rows += [row_of("merged", "as trained", "5 7"), row_of("lora", "rtn", "0 0", seed=1)]
    rows += [row_of("merged", "as trained", "8 8", bits=2)]
    found = with_gains(rows)
    assert found[3]["gain_rtn"] == found[3]["gain_rtn_low"] == found[3]["gain_rtn_high"] == "0.50000"
    assert found[3]["gain_gptq"] == "0.50000" and found[3]["gain_gptq_low"] == "0.37500"
    assert found[0]["gain_rtn"] == "" == found[5]["gain_gptq"] and found[1]["gain_rtn"] == "0.00000"
    assert all(list(row)[-1] == "right" for row in found) and [row["right"] for row in found] == [
        row["right"] for row in rows
    ]


def test_an_interrupted_sweep_leaves_the_old_table_and_goes_on(tmp_path, monkeypatch):
    asked, stop = [], True

    def stub(cell):
        if stop and len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(cell)
        bits = cell["bits"][0] if cell["method"] == "lora" else cell["bits"]
        return {"rows": [row_of(cell["method"], "rtn", "1 2", cell["seed"], bits)]}

    out = tmp_path / "table.csv"
    out.write_text("old")
    monkeypatch.setattr(qat_lora_sweep, "measured", stub)
    options = ["--cells", str(tmp_path / "cells"), "--out", str(out), "--steps", "7", "--tasks", "questions"]
    monkeypatch.setattr("sys.argv", ["qat_lora_sweep", *options])
    with pytest.raises(KeyboardInterrupt):
        qat_lora_sweep.main()
    assert out.read_text() == "old" and len(list((tmp_path / "cells").glob("*.json"))) == 4
    stop = False
    qat_lora_sweep.main()
    assert asked == cells("questions", 7) and {one["steps"] for one in asked} == {7}
    with out.open() as file:
        assert len(list(csv.DictReader(file))) == len(asked)


def test_tuning_writes_its_own_table(tmp_path, monkeypatch):
    out = tmp_path / "lr.csv"
    monkeypatch.setattr(qat_lora_sweep, "rate", lambda cell: cell | {"score": "0.5"})
    monkeypatch.setattr("sys.argv", ["x", "--tune", "--cells", str(tmp_path), "--out", str(out), "--steps", "2"])
    qat_lora_sweep.main()
    rows = read_table(out)
    assert [(r["task"], r["bits"], r["method"], r["lr"]) for r in rows] == [
        (c["task"], c["bits"], c["method"], c["lr"]) for c in rate_cells(2)
    ]
    assert "table" not in rows[0] and rows[0]["score"] == 0.5 and rows[0]["steps"] == 2


def test_rows_are_selected_by_what_they_are(tmp_path):
    rows = with_gains(
        [row_of("lora", "rtn", "1 2", seed) for seed in SEEDS] + [row_of("merged", "as trained", "5 6", 1)]
    )
    qat_lora_sweep.write_table(tmp_path / "t.csv", rows)
    table = read_table(tmp_path / "t.csv")
    lora, merged = select(table, "questions", "lora", 3, "rtn"), select(table, "questions", "merged", 3)
    assert lora.keys() == set(SEEDS) and merged.keys() == {1} and merged[1]["right"].tolist() == [5, 6]
    assert compare(lora, merged, each(merged[1])).value == 0.5


def stored_rows(method):
    return ["as trained"] if method == "merged" else ["as trained", *PTQ]


def test_the_shipped_table_has_all_cells():
    rows = read_table()
    found = {(r["task"], r["seed"], r["method"], r["bits"], r["stored"]) for r in rows}
    expected = set()
    for one in (one for task in ("questions", "intents") for one in cells(task)):
        same = one["task"], one["seed"], one["method"]
        if one["method"] == "lora":
            expected |= {(*same, 32, "as trained")} | {(*same, b, ptq) for b in one["bits"] for ptq in PTQ}
        else:
            expected |= {(*same, one["bits"], stored) for stored in stored_rows(one["method"])}
    assert found == expected and len(rows) == len(expected)
    for row in rows:
        assert row["right"].mean() / each(row) == pytest.approx(row["score"], abs=1e-5)
        assert row["score_low"] <= row["score"] <= row["score_high"]
        base = select(rows, row["task"], "lora", row["bits"], "gptq").get(row["seed"])
        if base:
            assert row["gain_gptq"] == pytest.approx(row["score"] - base["score"], abs=2e-5)
        if row["stored"] in PTQ or row["method"] == "merged":
            assert row["bits_per_weight"] == row["bits"] + 2, "compared at equal storage"


def test_the_shipped_rates_are_the_best_and_inside_the_grid():
    rows = read_table(qat_lora_sweep.LR_TABLE)
    assert [(r["task"], r["bits"], r["method"], r["lr"]) for r in rows] == [
        (c["task"], c["bits"], c["method"], c["lr"]) for c in rate_cells()
    ]
    for (task, bits, method), rates in GRID.items():
        scores = {r["lr"]: r["score"] for r in rows if (r["task"], r["bits"], r["method"]) == (task, bits, method)}
        chosen = RATES[task][method][bits]
        tried = {r["lr"] for r in rows if r["method"] == method}
        assert set(scores) == set(rates) and chosen == max(scores, key=scores.get)
        assert min(tried) < chosen < max(tried)
