import dataclasses
import json
import shutil

import pytest
import torch

from qlab.train.corpus import Corpus, train_tokenizer
from qlab.train.pretrain import PretrainConfig, build_model, learning_rate, load_checkpoint, mean_losses, pretrain

TINY = PretrainConfig(
    hidden_size=32,
    intermediate_size=32,
    layers=1,
    heads=2,
    kv_heads=1,
    vocab_size=400,
    towns=20,
    rows=2,
    length=32,
    steps=8,
    warmup=2,
    checkpoint_every=3,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Corpus(20), TINY.vocab_size, documents=100)


@pytest.fixture(scope="module")
def whole_run(tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    pretrain(TINY, out, tokenizer, progress=False)
    return out


def weights(out):
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stop_at", [3, 5, 7])
def test_a_killed_run_resumes_to_the_same_losses_and_weights(stop_at, tokenizer, whole_run, tmp_path):
    pretrain(TINY, tmp_path, tokenizer, stop_at=stop_at, progress=False)
    assert not (tmp_path / "model.safetensors").exists()
    pretrain(TINY, tmp_path, tokenizer, progress=False)
    assert (tmp_path / "losses.csv").read_text() == (whole_run / "losses.csv").read_text()
    assert weights(tmp_path) == weights(whole_run)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tokenizer, whole_run, tmp_path, monkeypatch):
    pretrain(TINY, tmp_path, tokenizer, stop_at=3, progress=False)

    def killed(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qlab.train.pretrain.save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(TINY, tmp_path, tokenizer, progress=False)
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-???????")] == ["step-0000003"]
    pretrain(TINY, tmp_path, tokenizer, progress=False)
    assert weights(tmp_path) == weights(whole_run)


def test_other_settings_are_refused(tokenizer, tmp_path):
    pretrain(TINY, tmp_path, tokenizer, stop_at=3, progress=False)
    with pytest.raises(ValueError, match=r"lr.*0\.003.*0\.01"):
        pretrain(dataclasses.replace(TINY, lr=0.01), tmp_path, tokenizer, progress=False)


def test_the_stable_phase_does_not_depend_on_the_number_of_steps(tokenizer, whole_run, tmp_path):
    longer = dataclasses.replace(TINY, steps=12)
    pretrain(longer, tmp_path, tokenizer, stop_at=6, progress=False)
    pretrain(TINY, tmp_path, tokenizer, progress=False)
    assert weights(tmp_path) == weights(whole_run)


def test_the_optimizer_state_comes_back(tokenizer, tmp_path):
    pretrain(TINY, tmp_path, tokenizer, stop_at=3, progress=False)
    model = build_model(TINY, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert load_checkpoint(tmp_path / "checkpoints", TINY, model, optimizer) == 3
    states = [optimizer.state[p] for p in model.parameters()]
    assert all(s["step"].item() == 3 and s["exp_avg_sq"].sum() > 0 for s in states)
    assert load_checkpoint(tmp_path / "nothing", TINY, model, optimizer) == 0


def test_nothing_is_pickled_and_transformers_reads_the_folder(whole_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    suffixes = {p.suffix for p in whole_run.rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json", ".csv"}
    model = AutoModelForCausalLM.from_pretrained(whole_run)
    assert type(model) is LlamaForCausalLM and model.lm_head.weight is model.model.embed_tokens.weight
    ids = AutoTokenizer.from_pretrained(whole_run)("12+34=", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, 7, TINY.vocab_size)
    assert json.loads((whole_run / "pretrain.json").read_text()) == dataclasses.asdict(TINY)


def test_learning_rate_by_hand():
    config = dataclasses.replace(TINY, steps=100, warmup=10, decay=0.2, lr=1.0)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == learning_rate(config, 79) == 1.0
    assert learning_rate(config, 90) == pytest.approx(0.5)
    assert learning_rate(config, 99) == pytest.approx(0.05)


def test_mean_losses(whole_run, tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text("step,loss,learning_rate\n1,4.0,0\n2,2.0,0\n3,1.0,0\n4,2.0,0\n5,9.0,0\n")
    assert mean_losses(path, 2) == [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 1.5}]
    shutil.copy(whole_run / "losses.csv", path)
    assert len(mean_losses(path, 1)) == TINY.steps
