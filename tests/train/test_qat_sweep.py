"""The table of PTQ against QAT: every row is there, equally trained and measured as stored, and can be compared in pairs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qlab.models import load
from qlab.nn import QuantLinear
from qlab.qat import first_step, layers_of
from qlab.train import qat_sweep
from qlab.train.classify import ClassifyRecipe, padded
from qlab.train.qat_sweep import (
    BITS,
    ENTRIES,
    POST,
    IntentTask,
    compare,
    prepared,
    read_table,
    select,
    sweep,
    training_memory,
)

RECIPE = ClassifyRecipe(lr=1e-3, steps=2, batch_size=4)


def tiny(*args):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    _, tokenizer = load("all-MiniLM-L6-v2")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)), tokenizer


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr(qat_sweep, "load", tiny)
    return IntentTask(0, train=160, test=96)


def test_every_row_is_there_and_says_what_was_measured(task, monkeypatch):
    measured, trained, train = [], [], qat_sweep.train_classifier

    def scores(model):
        measured.append(model)
        return IntentTask.scores(task, model)

    def spy(model, tokenizer, items, recipe, seed, **more):
        trained.append((seed, recipe, [group["lr"] for group in more["groups"]]))
        return train(model, tokenizer, items, recipe, seed, **more)

    task.scores = scores
    monkeypatch.setattr(qat_sweep, "train_classifier", spy)
    embeddings = copy.deepcopy(task.model.encoder.embeddings.state_dict())
    rows = list(sweep(task, recipe=RECIPE))
    named = [(row["method"], row["bits"], row["steps"]) for row in rows]
    post = [
        (method, bits, 2) for bits in BITS for method in [*POST, "lsq, untrained"] if bits in POST.get(method, BITS)
    ]
    qat = [(name, bits, 4) for name, entry in ENTRIES.items() for bits in BITS if bits in entry.bits]
    assert named == [("float", 32, 2), *post, ("float", 32, 4), *(("rtn", b, 4) for b in BITS), *qat]
    assert all(row.keys() == rows[0].keys() for row in rows), "one header serves them all"

    assert {seed for seed, *_ in trained[1:]} == {1000} and trained[0][0] == 0, "other batches, the same for all"
    assert all(recipe is RECIPE and lrs[0] == RECIPE.lr for _, recipe, lrs in trained)
    groups = [len(lrs) for *_, lrs in trained]  # learned steps have a learning rate of their own, frozen ones none
    assert groups == [1, 1, 2, 2, 2, 2, 1, 1, 2]
    assert [lrs[1] for *_, lrs in trained[2:6]] == [qat_sweep.grid_lr(RECIPE.lr, bits) for bits in BITS]
    for row, model in zip(rows, measured, strict=True):
        layer = model.encoder.encoder.layer[0].intermediate.dense
        assert type(layer) is (nn.Linear if row["method"] == "float" else QuantLinear)
        assert row["method"] == "float" or repr(layer.format) == repr(qat_sweep.weight_format(row["bits"]))
        assert type(model.classifier) is nn.Linear and model.encoder.pooler is None
        assert all(torch.equal(embeddings[k], v) for k, v in model.encoder.embeddings.state_dict().items())
        assert (getattr(layer, "act_quant", None) is not None) == (row["method"] == "lsq, 8-bit activations")
        right = np.array(row["right"].split(), dtype=int)
        assert (
            len(right) == 48
            and right.max() <= 2
            and float(row["accuracy"]) == pytest.approx(right.sum() / 96, abs=1e-5)
        )
    assert all(float(row["memory_mib"]) > 0 for row in rows if row["method"] in ("float", *ENTRIES))


def test_the_head_starts_from_the_seed_and_training_sentences_are_drawn_by_it(monkeypatch):
    monkeypatch.setattr(qat_sweep, "load", tiny)
    first, again, other = (IntentTask(seed, train=160, test=96) for seed in (0, 0, 1))
    assert torch.equal(first.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)
    assert first.train == again.train != other.train and first.test == other.test
    assert not {item.wording for item in first.train} & set(first.wordings)
    batches = first.calibration(64)
    texts = first.tokenizer([item.text for item in first.train[32:64]], padding=True, return_tensors="pt")
    assert len(batches) == 2 and torch.equal(batches[1]["input_ids"], texts["input_ids"])


def test_steps_move_as_fast_as_weights():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for bits in BITS:
        step = first_step(w, qat_sweep.weight_format(bits)).mean()
        assert qat_sweep.grid_lr(0.5, bits) / step == pytest.approx(0.5 / w.abs().mean())


def test_training_memory_by_hand():
    """x (5, 3) → Linear(3, 4) → mean loss: weights and bias, what the backward pass needs, and three times what trains."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)))

    model, x, labels = Model(), torch.randn(5, 3), torch.randint(2, (5,))
    weights = 12 + 8
    kept = 15 + 20 + 5 * 2  # x; relu's output (its input is not kept); the log-probabilities
    small = 5 * 8 + 4  # labels, and a number
    found = training_memory(model, {"x": x}, labels) - 4 * (weights + 3 * weights + kept)
    assert 0 <= found <= small + 8
    model.first.requires_grad_(False)
    assert training_memory(model, {"x": x}, labels) < 4 * (weights + 3 * 8 + kept) + small + 8
    assert model.training


def test_training_through_the_rounding_keeps_the_rounded_weights_beside_the_real_ones(task):
    batch, labels = padded(task.tokenizer, task.train[:8])
    ste = prepared(task.model, ENTRIES["ste"], 2)
    first = ("query", "key", "value")  # the frozen embeddings want no gradient, so these weights are not needed for one
    weights = sum(4 * layer.weight.numel() for name, layer in layers_of(ste).items() if not name.endswith(first))
    more = training_memory(ste, batch, labels) - training_memory(task.model, batch, labels)
    assert more == weights


def test_rows_are_compared_in_pairs(tmp_path):
    def row(seed, method, bits, steps, right):
        same = {"accuracy": np.mean(right) / 10, "seconds": "", "right": " ".join(map(str, right))}
        return {"seed": seed, "method": method, "bits": bits, "steps": steps} | same

    rows = [row(0, "rtn", 2, 8, [1, 2, 3]), row(0, "lsq", 2, 16, [2, 3, 4]), row(1, "lsq", 2, 16, [9, 9, 9])]
    rows += [row(1, "rtn", 2, 8, [8, 8, 8]), row(0, "rtn", 2, 16, [0, 0, 0]), row(2, "rtn", 2, 8, [0, 0, 0])]
    qat_sweep.write_table(tmp_path / "qat.csv", rows)
    table = read_table(tmp_path / "qat.csv")
    lsq, rtn = select(table, "lsq", 2, again=True), select(table, "rtn", 2, again=False)
    assert lsq.keys() == {0, 1} and rtn.keys() == {0, 1, 2} and select(table, "rtn", 2, again=True).keys() == {0}
    gain = compare(rtn, lsq)
    assert gain == pytest.approx((0.1, 0.1, 0.1)), "each wording gains one of ten in both seeds: there is no spread"
    assert table[0]["accuracy"] == 0.2 and table[0]["seconds"] == ""


def test_a_late_stop_leaves_the_seeds_that_are_whole(tmp_path, monkeypatch):
    def sweep(task, bits, recipe):
        yield {"seed": task, "bits": 2, "steps": recipe.steps}
        if task == 2:
            raise KeyboardInterrupt
        yield {"seed": task, "bits": 4, "steps": recipe.steps}

    out = tmp_path / "tables" / "qat.csv"
    monkeypatch.setattr(qat_sweep, "sweep", sweep)
    monkeypatch.setattr(qat_sweep, "IntentTask", lambda seed: seed)
    monkeypatch.setattr("sys.argv", ["qat_sweep", "--out", str(out), "--steps", "7"])
    with pytest.raises(KeyboardInterrupt):
        qat_sweep.main()
    assert out.read_text().split() == ["seed,bits,steps", "0,2,7", "0,4,7", "1,2,7", "1,4,7"]


def test_the_shipped_table_is_whole_and_says_what_the_notebook_says():
    table = read_table()
    seeds = {row["seed"] for row in table}
    assert len(seeds) >= 3
    for seed in seeds:
        found = {(r["method"], r["bits"]) for r in table if r["seed"] == seed}
        assert found >= {(name, bits) for name, entry in ENTRIES.items() for bits in entry.bits}
        assert found >= {(method, bits) for method, widths in POST.items() for bits in widths}
    control, start = (select(table, "float", 32, again) for again in (True, False))
    assert abs(compare(control, select(table, "lsq", 8, True)).value) < 0.03, "at 8 bits it hardly matters"
    lost, won = (
        compare(start, select(table, "rtn", 2, False)),
        compare(select(table, "rtn", 2, False), select(table, "lsq", 2, True)),
    )
    assert lost.high < -0.5 and won.value > -lost.value / 2, "half of what rounding to 2 bits loses comes back"
    for row in table:
        assert row["right"].sum() / 480 == pytest.approx(row["accuracy"], abs=1e-5)
        assert row["bits_per_weight"] >= row["bits"]
