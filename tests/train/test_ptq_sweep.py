"""The table of post-training methods: its questions and data are apart, and the shipped rows can be measured again."""

import copy
import csv

import numpy as np
import pytest
import torch

from qlab.train import ptq_sweep
from qlab.train.card import damage_sample
from qlab.train.corpus import Corpus
from qlab.train.evaluate import embed


@pytest.fixture(scope="module")
def language():
    return ptq_sweep.LanguageTask()


@pytest.fixture(scope="module")
def table():
    return ptq_sweep.read_table()


def row_of(table, model, method, bits, seed=0):
    (row,) = [
        row for row in table
        if (row["model"], row["method"], row["bits"], row["seed"]) == (model, method, str(bits), str(seed))
    ]  # fmt: skip
    return row


@pytest.mark.parametrize("kinds", [None, ptq_sweep.KINDS])
def test_calibration_never_names_a_town_that_is_asked_for(language, kinds):
    batches = ptq_sweep.calibration(language.tokenizer, 0, 40, kinds=kinds)
    assert [len(batch["input_ids"]) for batch in batches] == [16, 16, 8]
    texts = [text for batch in batches for text in language.tokenizer.batch_decode(batch["input_ids"])]
    asked = {item.entity for item in damage_sample()}
    assert len(asked) == 300 and any(row["name"] in text for row in Corpus().towns for text in texts)
    assert not [name for name in asked for text in texts if f" {name} " in text or f" {name}." in text]
    again, other = (ptq_sweep.calibration(language.tokenizer, seed, 40, kinds=kinds) for seed in (0, 1))
    assert torch.equal(again[0]["input_ids"], batches[0]["input_ids"])
    assert not torch.equal(other[0]["input_ids"][:, :8], batches[0]["input_ids"][:, :8])


def test_calibration_leaves_out_what_it_is_told_to(language):
    first = language.tokenizer.batch_decode(ptq_sweep.calibration(language.tokenizer, 0, 1)[0]["input_ids"])[0]
    document = first.removeprefix(language.tokenizer.bos_token or "<|endoftext|>")
    (batch,) = ptq_sweep.calibration(language.tokenizer, 0, 1, {document})
    assert language.tokenizer.batch_decode(batch["input_ids"])[0] != first


def test_a_row_is_what_the_scores_say(language):
    entry = ptq_sweep.WEIGHT_ONLY["rtn"]
    row, scores = ptq_sweep.measure(language, "rtn", entry, ptq_sweep.weight_format(2), 0, None)
    assert row["score"] == f"{scores.mean():.5f}" and row["gain"] == "0.00000" and row["bits_per_weight"] == "2.500"
    assert float(row["score_low"]) <= scores.mean() <= float(row["score_high"])
    row, better = ptq_sweep.measure(language, "rtn", entry, ptq_sweep.weight_format(4), 0, scores)
    assert float(row["gain"]) == pytest.approx(better.mean() - scores.mean(), abs=1e-5)
    assert float(row["gain_low"]) > 0.5


def test_every_method_of_the_package_is_in_the_table(table):
    from qlab.ptq import METHODS

    measured = {entry.method for entry in [*ptq_sweep.WEIGHT_ONLY.values(), *ptq_sweep.W8A8.values()]}
    assert measured >= {make for name, make in METHODS.items() if name != "xnor"}, "signs are notebook 05's"
    for model in ptq_sweep.TASKS:
        for bits in ptq_sweep.BITS:
            assert {row["method"] for row in table if row["model"] == model and row["bits"] == str(bits)} >= set(
                ptq_sweep.WEIGHT_ONLY
            )
        assert {row["method"] for row in table if row["quantized"] == "w8a8" and row["model"] == model} == set(
            ptq_sweep.W8A8
        )
    for row in table:
        assert float(row["score_low"]) <= float(row["score"]) <= float(row["score_high"])
        assert float(row["gain_low"]) <= float(row["gain"]) <= float(row["gain_high"])


@pytest.mark.parametrize("method, bits", [("rtn", 3), ("gptq", 3), ("awq", 2), ("hqq", 2)])
def test_shipped_rows_of_qlab_mini_are_measured_again(language, table, method, bits):
    """A point more or less: another processor rounds sums otherwise, and a code on the edge may flip."""
    row, _ = ptq_sweep.measure(language, method, ptq_sweep.WEIGHT_ONLY[method], ptq_sweep.weight_format(bits), 0, None)
    shipped = row_of(table, "qlab-mini", method, bits)
    assert row["bits_per_weight"] == shipped["bits_per_weight"]
    assert float(row["score"]) == pytest.approx(float(shipped["score"]), abs=0.01)


def test_shipped_rows_of_the_encoder_are_measured_again(table):
    task = ptq_sweep.EmbeddingTask()
    row, _ = ptq_sweep.measure(task, "rtn", ptq_sweep.WEIGHT_ONLY["rtn"], ptq_sweep.weight_format(3), 0, None)
    assert float(row["score"]) == pytest.approx(float(row_of(table, "all-MiniLM-L6-v2", "rtn", 3)["score"]), abs=1e-3)


def test_embeddings_do_not_depend_on_the_batch():
    from qlab.models import load

    encoder, tokenizer = load("all-MiniLM-L6-v2")
    texts = ["The capital of France is Paris.", "Figs.", "A longer sentence about an old bottle and a new chair."]
    together, alone = embed(encoder, tokenizer, texts), torch.cat([embed(encoder, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))


def test_an_interrupted_sweep_leaves_the_old_table(tmp_path, monkeypatch):
    class Stub:
        groups, model = [0, 1], torch.nn.Linear(64, 2)

        def calibration(self, seed, texts=0):
            return [torch.randn(4, 64)]

        def scores(self, model):
            if self.fails:
                raise KeyboardInterrupt
            return np.array([0.25, 0.5])

    out = tmp_path / "tables" / "ptq.csv"
    monkeypatch.setattr(ptq_sweep, "TASKS", {"stub": lambda: copy.copy(stub)})
    monkeypatch.setattr("sys.argv", ["sweep", "--out", str(out), "--bits", "4", "--seeds", "1"])
    stub = Stub()
    stub.fails = False
    ptq_sweep.main()
    before = out.read_text()
    assert len(list(csv.DictReader(before.splitlines()))) == len(ptq_sweep.WEIGHT_ONLY) + len(ptq_sweep.W8A8)
    stub.fails = True
    with pytest.raises(KeyboardInterrupt):
        ptq_sweep.main()
    assert out.read_text() == before and [path.name for path in out.parent.iterdir()] == ["ptq.csv"]
