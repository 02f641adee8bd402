"""The table of every method: a row says what its model is and cost, a sweep goes on where it stopped, the shipped table is whole."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from qlab.adapters import LoRALinear, adapters_of
from qlab.formats import IntAffine
from qlab.nn import QuantLinear
from qlab.train import sweep, sweep_methods
from qlab.train.merge_tasks import MergeTask
from qlab.train.sweep_methods import BEST, FORMATS, MAKERS, RATES, Made, Workshop, weight_format

WIDTHS = (8, 4, 3, 2)


class SmallTask(MergeTask):
    def __init__(self, seed, name="qlab-mini"):
        super().__init__(seed, name, test_towns=3)
        self.prose = self.prose[:2]


@pytest.fixture(scope="module")
def shop():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_methods, "MergeTask", SmallTask)
        patch.setattr(sweep_methods, "LoraRecipe", _Few)
        small = Workshop(0, steps=2)
        small.start  # noqa: B018 (trained here, while the recipe is a short one)
        yield small


class _Few(sweep_methods.LoraRecipe):
    def __init__(self, **settings):
        super().__init__(**{"batch_size": 4} | settings)


def rows_of(make: str, bits: int) -> list[tuple[str, int]]:
    """(method, bits) of the rows that a cell gives."""
    kind, _, name = make.partition(": ")
    if kind in ("format", "ptq"):
        return [(name, bits)]
    if kind == "w8a8":
        return [(f"{name}, activations too", bits)]
    merged = [(f"{make}, base of {bits} bits, merged to bf16", 16), (f"{make}, merged, gptq", bits)]
    return {
        "start": [("pretrained", 32), ("lora", 32)],
        "further": [("trained on", 32), *(("trained on, rtn", width) for width in WIDTHS)],
        "lsq": [("lsq", bits)],
        "qlora": [("qlora", bits), ("qlora, requantized", bits), *merged],
        "qlora NF4": [("qlora NF4", bits), ("qlora NF4, requantized", bits), *merged],
        "loftq": [("loftq", bits), ("loftq, requantized", bits)],
        "qa-lora": [("qa-lora", bits), ("qa-lora, merged", bits)],
        "qat-lora": [("qat-lora, merged", bits)],
        "bitfit": [("bitfit", bits)],
    }[make]


def adapter_bits(shop) -> float:
    """Bits a weight of a float32 LoRA on every linear layer of the model."""
    shapes = [shop.task.model.get_submodule(name).weight.shape for name in shop.layers]
    return 32 * sum(8 * (out + width) for out, width in shapes) / sum(out * width for out, width in shapes)


def made_of(shop, make, bits):
    settings = {"lr": BEST[make]} if make in BEST else {}
    return list(MAKERS[make](shop, bits, **settings))


@pytest.mark.parametrize(
    "make, bits",
    {
        pair[0]: pair for pair in (("start", 32), *sweep.TRAINED, *sweep.MORE) if not pair[0].startswith("format")
    }.values(),
)
def test_what_is_trained_gives_its_rows(shop, make, bits):
    before = {name: tensor.clone() for name, tensor in shop.start.model.state_dict().items()}
    made = made_of(shop, make, bits)
    assert [(m.method, m.bits) for m in made] == rows_of(make, bits)
    rows = [sweep_methods.measured(shop, m) for m in made]
    assert all(row.keys() == rows[0].keys() for row in rows), "one header serves them all"
    assert all(m.training_seconds > 0 and m.training_bytes > 2**20 for m in made if m.method != "pretrained")
    assert all(torch.equal(before[name], tensor) for name, tensor in shop.start.model.state_dict().items())
    beside = {"qlora": adapter_bits(shop), "loftq": adapter_bits(shop), "qa-lora": None, "bitfit": None}
    for m, row in zip(made, rows, strict=True):
        linear = [m.model.get_submodule(name) for name in shop.layers]
        if m.bits == 32:
            assert all(type(layer) is nn.Linear for layer in linear) and row["bits_per_weight"] == "32.0000"
        elif m.bits == 16:
            assert row["bits_per_weight"] == "16.0000"
        elif m.method in beside:
            expected = beside[m.method] or float(row["bits_per_weight"]) - bits - 1
            assert float(row["bits_per_weight"]) == pytest.approx(bits + 1 + expected, abs=0.03) and expected > 0
        elif "NF4" not in m.method:
            assert all(
                type(layer) is QuantLinear and repr(layer.format) == repr(weight_format(m.bits)) for layer in linear
            )
            assert float(row["bits_per_weight"]) == m.bits + 1
        assert (len(adapters_of(m.model)) == len(linear)) == (m.method in ("qlora", "qlora NF4", "loftq", "qa-lora"))


def test_qat_and_its_control_start_from_the_same_model_and_see_the_same_batches(shop, monkeypatch):
    seen = []

    def spy(self, method, family, bits, model, recipe, prepare=lambda: None, groups=None, seed=0):
        trains = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("proj.weight")}
        weights = [model.get_submodule(name).weight for name in shop.layers]
        seen.append((len(trains), len([p for p in model.parameters() if p.requires_grad]), recipe.lr, seed))
        starts = [shop.start.model.get_submodule(name).weight for name in shop.layers]
        assert all(torch.equal(w, s) for w, s in zip(weights, starts, strict=True))
        return Made(method, family, bits, model, 1.0, lr=recipe.lr)

    monkeypatch.setattr(Workshop, "trained", spy)
    made_of(shop, "lsq", 3), made_of(shop, "further", 32)
    layers = len(shop.layers)
    assert seen == [(layers, 3 * layers, BEST["lsq"], 1000), (layers, layers, BEST["further"], 1000)]
    assert BEST["lsq"] == BEST["further"]


def test_merging_zero_points_leaves_the_codes_and_the_answers(shop):
    unmerged, merged = (m.model for m in made_of(shop, "qa-lora", 4))
    for name in shop.layers:
        assert torch.equal(unmerged.get_submodule(name).base.packed, merged.get_submodule(name).packed)
    with torch.no_grad():
        a, b = (model(input_ids=shop.ids[:4]).logits for model in (unmerged, merged))
    assert (a - b).abs().max() < 0.02 * a.abs().max()


def test_loftq_starts_nearer_to_the_weights_than_rounding(shop, monkeypatch):
    monkeypatch.setattr(sweep_methods, "train_answers", lambda model, *settings, **more: model.eval())
    untrained, plain = (next(MAKERS[make](shop, 2)).model for make in ("loftq", "qlora"))
    for name in shop.layers[:3]:
        w = shop.task.model.get_submodule(name).weight
        far = [(m.get_submodule(name).dequantized_weight() - w).norm() for m in (untrained, plain)]
        assert far[0] < far[1] and type(untrained.get_submodule(name)) is LoRALinear


@pytest.mark.parametrize(
    "make, bits",
    [("format: NF4", 4), ("format: binary", 1), ("ptq: gptq", 3), ("ptq: rtn", 8), ("w8a8: smoothquant", 8)],
)
def test_what_is_rounded_starts_from_the_tuned_model(shop, make, bits):
    (made,) = made_of(shop, make, bits)
    assert [(made.method, made.bits)] == rows_of(make, bits)
    row = sweep_methods.measured(shop, made)
    assert made.training_seconds == shop.start.training_seconds and row["training_bytes"] == "" and row["lr"] == ""
    layer = made.model.get_submodule(shop.layers[0])
    tuned = shop.start.model.get_submodule(shop.layers[0]).weight
    if make in ("format: NF4", "ptq: rtn"):
        fmt = FORMATS["NF4", 4] if "NF4" in make else weight_format(bits)
        assert torch.equal(layer.qtensor.packed, fmt.quantize(tuned).packed)
    assert (layer.act_quant is not None) == make.startswith("w8a8")
    expected = {"format: NF4": 4.5, "format: binary": 1.5, "ptq: gptq": 4, "ptq: rtn": 9}
    assert float(row["bits_per_weight"]) == expected.get(make, pytest.approx(8.225, abs=0.01))


def test_a_row_is_what_the_scores_say(shop, monkeypatch):
    scores = np.zeros(24, dtype=bool)
    scores[[0, 1, 5, 8, 23]] = True  # the first town: 3 of 8, the second 1, the third 1, in the order they are asked in
    monkeypatch.setattr(shop.task, "scores", lambda model: scores)
    row = sweep_methods.measured(shop, Made("a", "PTQ", 4, shop.task.model, 1.25, 0.5, 7, 1e-3))
    order = np.argsort([name for name in dict.fromkeys(shop.task.groups)])
    assert [int(n) for n in row["right"]] == [[3, 1, 1][n] for n in order]
    assert row["exact_match"] == f"{5 / 24:.5f}" and float(row["exact_match_low"]) <= 5 / 24
    assert (row["quantize_seconds"], row["training_seconds"], row["training_bytes"], row["lr"]) == (
        "0.50",
        "1.2",
        7,
        "0.001",
    )
    assert row["inference_bytes"] == row["model_bytes"] and row["seed"] == 0 and row["steps"] == 2


def test_bytes_by_hand():
    linear = nn.Linear(64, 8, bias=False)
    model = nn.ModuleDict({"a": QuantLinear(weight_format(4).quantize(linear.weight)), "b": nn.Linear(3, 5)})
    model["tied"] = nn.Linear(3, 5, bias=False)
    model["tied"].weight = model["b"].weight
    codes, constants = 64 * 8 // 2, 2 * 2 * 8 * 2
    assert sweep_methods.model_bytes(model) == codes + constants + 4 * (15 + 5)
    assert sweep_methods.bits_per_weight(model, nn.ModuleDict({"a": linear}), ["a"]) == 5
    assert sweep_methods.largest_decoded(model, ["a", "b"]) == 4 * 64 * 8
    assert sweep_methods.largest_decoded(model, ["b"]) == 0
    adapted = nn.ModuleDict({"a": LoRALinear(model["a"], r=2, lora_alpha=4)})
    assert sweep_methods.bits_per_weight(adapted, nn.ModuleDict({"a": linear}), ["a"]) == 5 + 32 * 2 * (64 + 8) / 512
    assert sweep_methods.largest_decoded(adapted, ["a"]) == 4 * 64 * 8


def test_grids_move_as_fast_as_weights(shop):
    model = shop.unfrozen_start()
    sweep_methods.prepare_qat(model, IntAffine(2, symmetric=False, float_zero_point=True, granularity="channel"), "lsq")
    weights, scales, zeros = sweep_methods.learned_groups(model, 0.5)
    mean = float(torch.cat([s.detach().flatten() for s in scales["params"]]).mean())
    size = float(torch.cat([w.detach().flatten() for w in weights["params"]]).abs().mean())
    assert (
        weights["lr"] == 0.5
        and scales["lr"] / mean == pytest.approx(0.5 / size)
        and zeros["lr"] * mean == pytest.approx(0.5)
    )
    assert len(weights["params"]) == len(scales["params"]) == len(zeros["params"]) == len(shop.layers)


def test_towns_are_those_of_the_task_and_pairs_are_paired(monkeypatch):
    assert sweep.towns(1) == sorted(set(MergeTask(1).groups)) and len(sweep.towns(1)) == sweep.TOWNS
    names = {0: ["a", "b"], 1: ["b", "c"]}
    monkeypatch.setattr(sweep, "towns", names.get)
    first = {seed: {"right": np.array(right)} for seed, right in ((0, [0, 8]), (1, [8, 4]), (2, [9, 9]))}
    second = {seed: {"right": row["right"] + (1 if seed < 2 else 0)} for seed, row in first.items()}
    gain = sweep.difference({s: first[s] for s in (0, 1)}, second)
    assert gain == pytest.approx((1 / 8, 1 / 8, 1 / 8)), (
        "each town gains one of eight in both seeds: there is no spread"
    )
    found = sweep.estimate({s: first[s] for s in (0, 1)})
    assert found.value == 20 / 32 and found.low < 20 / 32 < found.high


def test_cells_differ_and_lead_to_every_method():
    cells = sweep.cells(more=True)
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
    assert all(cell["make"] in MAKERS for cell in cells)
    made = {cell["make"] for cell in cells}
    assert made == set(MAKERS), "no maker is left out"
    assert all(cell.get("lr") == BEST.get(cell["make"]) for cell in cells if cell["make"] != "tuning")
    assert {cell["seed"] for cell in sweep.cells(seeds=(5,)) if cell["make"] == "lsq"} == {5}


def test_a_killed_sweep_goes_on_and_the_table_is_whole_or_as_it_was(tmp_path, monkeypatch):
    calls = []

    def stub(cell):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(cell)
        return {"rows": [{"method": cell["make"], "seed": cell["seed"]}, {"method": "again", "seed": cell["seed"]}]}

    few = sweep.cells()[:7]
    monkeypatch.setattr(sweep, "cells", lambda seeds, steps, model, more: few)
    monkeypatch.setattr(sweep, "measure", stub)
    out = tmp_path / "tables" / "methods.csv"
    monkeypatch.setattr("sys.argv", ["sweep", "--cells", str(tmp_path / "cells"), "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        sweep.main()
    assert not out.exists() and calls == few[:4]
    calls = []
    monkeypatch.setattr(sweep, "measure", lambda cell: calls.append(cell) or {"rows": [{"method": "late", "seed": 9}]})
    sweep.main()
    assert calls == few[4:] and len(out.read_text().splitlines()) == 1 + 2 * 4 + 3


@pytest.fixture(scope="module")
def table():
    return sweep.read_table()


def test_the_shipped_table_has_every_cell_and_nothing_else(table):
    expected = []
    for cell in sweep.cells():
        if cell["make"] == "tuning":
            rows = [(*row, "tuning") for row in rows_of(cell["method"], cell["bits"])]
        else:
            rows = [(*row, "") for row in rows_of(cell["make"], cell["bits"])]
        expected += [(*row, cell["seed"], cell["steps"], cell.get("lr")) for row in rows]
    found = [
        (
            row["method"],
            row["bits"],
            "tuning" if row["family"] == "tuning" else "",
            row["seed"],
            row["steps"],
            row["lr"],
        )
        for row in table
    ]
    own = [row[:5] for row in found]
    assert [row[:5] for row in expected] == own, "cells and rows, one by one"
    assert all(want[5] in (None, got[5]) for want, got in zip(expected, found, strict=True))
    for method, bits in {(row["method"], row["bits"]) for row in table if row["family"] != "tuning"}:
        assert sweep.select(table, method, bits).keys() == set(sweep.SEEDS)


def test_the_shipped_rows_agree_with_themselves(table):
    for row in table:
        if row["family"] != "tuning":
            assert len(row["right"]) == sweep.TOWNS and row["right"].max() <= sweep.EACH
            assert row["right"].sum() / (sweep.TOWNS * sweep.EACH) == pytest.approx(row["exact_match"], abs=1e-5)
        assert row["exact_match_low"] <= row["exact_match"] <= row["exact_match_high"]
        assert row["bits_per_weight"] >= row["bits"] or row["method"] == "ternary"
        assert row["inference_bytes"] >= row["model_bytes"] and row["time_ratio"] > 0 and row["threads"] == 1
    for cell in {(row["method"], row["bits"], row["steps"]) for row in table}:
        same = [row for row in table if (row["method"], row["bits"], row["steps"]) == cell]
        sizes = {row["bits_per_weight"] for row in same}
        assert max(sizes) - min(sizes) < 0.02 if "awq" in cell[0] else len(sizes) == 1, (
            "AWQ may need no scale for an input"
        )


def test_the_rates_are_the_best_on_towns_that_are_not_the_tests(table):
    for make, rates in RATES.items():
        method = "qat-lora, merged" if make == "qat-lora" else make
        found = {r["lr"]: r["exact_match"] for r in table if (r["method"], r["family"]) == (method, "tuning")}
        assert found.keys() == set(rates) and max(found, key=found.get) == BEST[make]


def test_what_the_table_must_say(table):
    def mean(method, bits):
        return np.mean([row["exact_match"] for row in sweep.select(table, method, bits).values()])

    assert mean("pretrained", 32) < 0.05 < 0.9 < mean("lora", 32)
    for bits in (8, 4):
        assert abs(mean("gptq", bits) - mean("lora", 32)) < 0.1
    assert mean("rtn", 2) < mean("lsq", 2), "training through the rounding wins at 2 bits"
    for bits in {bits for make, bits in sweep.TRAINED if make == "qa-lora"}:
        assert mean("qa-lora, merged", bits) == pytest.approx(mean("qa-lora", bits), abs=0.01), "the merge is exact"
    for bits in {bits for make, bits in sweep.TRAINED if make == "qlora"}:
        bf16 = f"qlora, base of {bits} bits, merged to bf16"
        assert mean(bf16, 16) == pytest.approx(mean("qlora", bits), abs=0.01)


def test_a_few_cells_measured_again_are_the_shipped_ones(table, monkeypatch):
    """The same steps on another processor round sums otherwise, so answers may differ; what is stored may not."""
    monkeypatch.setattr(
        sweep_methods, "MergeTask", MergeTask
    )  # not the small one of `shop`, which lives as long as the module
    again = Workshop(0, steps=sweep.SHORT_STEPS)
    pretrained = sweep_methods.measured(again, next(MAKERS["start"](again, 32)))
    (shipped,) = [r for r in table if (r["method"], r["steps"]) == ("pretrained", sweep.SHORT_STEPS)]
    assert float(pretrained["prose_perplexity"]) == pytest.approx(shipped["prose_perplexity"], rel=1e-3)
    assert float(pretrained["exact_match"]) == pytest.approx(shipped["exact_match"], abs=0.002)
    assert pretrained["model_bytes"] == shipped["model_bytes"]
    for make, bits in sweep.CHEAP[1:]:
        again.__dict__["start"] = Made(
            "lora", "float", 32, again.task.model, 0.0
        )  # what is stored has no need of training
        row = sweep_methods.measured(again, next(MAKERS[make](again, bits)))
        (shipped,) = [
            r for r in table if (r["method"], r["bits"], r["steps"]) == (row["method"], bits, sweep.SHORT_STEPS)
        ]
        assert (
            float(row["bits_per_weight"]) == shipped["bits_per_weight"] and row["model_bytes"] == shipped["model_bytes"]
        )
