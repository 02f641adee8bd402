"""Every method on every kind of model: it trains, writes what reloads in the same bits, goes on where it was stopped, and refuses
what does not belong together."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qlab.adapters import QALoRALinear, load_adapter, merge
from qlab.formats import IntAffine
from qlab.models import load
from qlab.models.sources import MINI_FOLDER
from qlab.nn.config import format_from_config
from qlab.ptq import quantize_model
from qlab.train import checkpoints, finetune_trainer
from qlab.train.finetune import Settings, finetune, load_finetuned
from qlab.train.finetune_methods import METHODS
from qlab.train.finetune_settings import Settings as Same

ROWS = [{"prompt": f"Question: {n} and {n}?\nAnswer:", "answer": f" {2 * n}"} for n in range(24)]
TEXTS = [{"text": f"call {n}" if n % 2 else f"cancel {n}", "label": "call" if n % 2 else "cancel"} for n in range(24)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random-weight models with qlab-mini's tokenizer, and data."""
    home = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    tokenizer = load("qlab-mini")[1]
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 64}
    models = {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, num_key_value_heads=2, tie_word_embeddings=True)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=64)),
        "bert": BertModel(BertConfig(**sizes, **heads)),
    }
    for name, model in models.items():
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    jsonl(home / "rows.jsonl", ROWS), jsonl(home / "test.jsonl", ROWS[:6])
    jsonl(home / "texts.jsonl", TEXTS), jsonl(home / "texts_test.jsonl", TEXTS[:7])
    return home


def settings(folders, out, model="qlab-mini", method="qlora", **changes):
    kind = "texts" if model == "bert" else "rows"
    name = "qlab-mini" if model == "qlab-mini" else str(folders / model)
    same = dict(
        model=name,
        method=method,
        data=folders / f"{kind}.jsonl",
        out=out,
        steps=4,
        batch_size=4,
        save_steps=2,
        device="cpu",
    )
    return Settings(**same | changes)


def logits(model, ids=None):
    ids = torch.arange(2, 22).reshape(2, 10) if ids is None else ids
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("model", ["qlab-mini", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_model_and_reloads_in_the_same_bits(folders, tmp_path, model, method):
    eval_data = folders / ("texts_test.jsonl" if model == "bert" else "test.jsonl")
    result = finetune(settings(folders, tmp_path / "out", model, method, eval_data=eval_data, eval_steps=3))
    record = result.record
    assert record == json.loads((tmp_path / "out" / "record.json").read_text())
    assert [row["step"] for row in record["curve"]] == [1, 2, 3, 4] and [
        row["step"] for row in record["evaluations"]
    ] == [3, 4]
    assert ("accuracy" if model == "bert" else "exact_match") in record["evaluations"][0]
    trained = {name: p for name, p in result.model.named_parameters() if p.requires_grad}
    assert record["trainable"] == sum(p.numel() for p in trained.values()) > 0
    assert any(name.startswith("classifier.") for name in trained) == (model == "bert")
    for row in ("weights", "constants", "adapter", "gradients", "optimizer"):
        assert record["memory"]["predicted"][row] == pytest.approx(record["memory"]["measured"][row], rel=0.1), row
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "record.json", "run.json"]
    again = load_finetuned(tmp_path / "out")
    assert torch.equal(logits(again.model), logits(result.model))
    assert not again.model.training and again.record == record
    start = load(result.record["settings"]["model"])[0] if model != "bert" else None
    assert start is None or not torch.allclose(logits(start), logits(result.model), atol=1e-4)


def test_a_peft_user_opens_the_adapter(folders, tmp_path):
    result = finetune(settings(folders, tmp_path / "out", method="lora", steps=6, lr=2e-2))
    base = AutoModelForCausalLM.from_pretrained(MINI_FOLDER)
    assert not torch.allclose(logits(base), logits(result.model), atol=1e-2)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert torch.allclose(logits(opened), logits(result.model), atol=1e-4)


def test_what_qat_lora_trained_is_its_adapter_merged_and_rounded_as_qlab_json_says(folders, tmp_path):
    result = finetune(settings(folders, tmp_path / "out", method="qat-lora", steps=6, lr=2e-2, bits=3))
    model, _ = load("qlab-mini")
    load_adapter(model, tmp_path / "out" / "adapter")
    merge(model, "dequantize")
    through = json.loads((tmp_path / "out" / "adapter" / "qlab.json").read_text())["trained_through"]
    fmt = format_from_config(through["format"])
    assert repr(fmt) == repr(IntAffine(3, symmetric=False, granularity="group", group_size=32, float_zero_point=True))
    assert not torch.allclose(logits(model), logits(result.model), atol=1e-2), "not rounded yet"
    quantize_model(model, fmt, progress=False)
    assert torch.allclose(logits(model), logits(result.model), atol=1e-4)


def test_qalora_merges_into_zero_points(folders, tmp_path):
    result = finetune(settings(folders, tmp_path / "out", method="qalora", steps=6))
    before = logits(result.model)
    layers = [m for m in result.model.modules() if isinstance(m, QALoRALinear)]
    assert {(layer.pooling, layer.group_size) for layer in layers} == {("mean", 32)}
    merge(result.model, "zero-points")
    assert torch.allclose(logits(result.model), before, atol=1e-4)


def test_the_base_is_rounded_as_the_settings_say(folders, tmp_path):
    for changes, expected in (
        ({}, "NF4(block 64, double_quant)"),
        ({"double_quant": False, "block_size": 128}, "NF4(block 128)"),
        ({"bits": 3, "group_size": 64}, "IntAffine(bits=3, asymmetric, group 64, float zero_point)"),
    ):
        result = finetune(settings(folders, tmp_path / str(len(expected)), steps=1, **changes))
        formats = {repr(m.format) for m in result.model.modules() if type(m).__name__ == "QuantLinear"}
        assert formats == {expected}


def test_bitsandbytes_makes_the_same_base(folders, tmp_path):
    ours, theirs = (finetune(settings(folders, tmp_path / str(b), bitsandbytes=b, steps=3)) for b in (False, True))
    kinds = {type(m.base).__name__ for m in theirs.model.modules() if hasattr(m, "lora_A")}
    assert kinds == {"Linear4bit"}
    losses = [[row["loss"] for row in r.record["curve"]] for r in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert torch.equal(logits(load_finetuned(tmp_path / "True").model), logits(theirs.model))


def test_bfloat16_is_how_it_computes_and_not_what_it_trains(folders, tmp_path):
    half, whole = (finetune(settings(folders, tmp_path / c, compute=c, steps=2)) for c in ("bfloat16", "float32"))
    assert {p.dtype for p in half.model.parameters() if p.requires_grad} == {torch.float32}
    losses = [r.record["curve"][-1]["loss"] for r in (half, whole)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_gradients_of_small_batches_add_up_to_that_of_the_large_one(folders, tmp_path):
    one = finetune(settings(folders, tmp_path / "one", batch_size=8, steps=3))
    many = finetune(settings(folders, tmp_path / "many", batch_size=2, grad_accum=4, steps=3))
    first, second = ([row["loss"] for row in r.record["curve"]] for r in (one, many))
    assert first == pytest.approx(second, rel=1e-4)


def test_the_seed_draws_the_run(folders, tmp_path):
    sums = [
        finetune(settings(folders, tmp_path / f"{n}", seed=seed, lora_dropout=0.1)).record["adapter_sha256"]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert sums[0] == sums[1] != sums[2]


def test_text_trains_and_evaluates_by_perplexity(folders, tmp_path):
    (tmp_path / "a.txt").write_text("The river runs north. " * 60, encoding="utf-8")
    path = tmp_path / "a.txt"
    result = finetune(settings(folders, tmp_path / "out", data=path, eval_data=path, max_length=16, steps=8, lr=1e-2))
    (score,) = result.record["evaluations"]
    assert score["loss"] < 0.8 * result.record["curve"][0]["loss"]
    assert score["perplexity"] == pytest.approx(torch.tensor(score["loss"]).exp().item(), rel=1e-5)


def test_progress_is_a_bar_on_stderr_and_nothing_is_said_without(folders, tmp_path, capsys):
    finetune(settings(folders, tmp_path / "quiet"))
    assert capsys.readouterr() == ("", "")
    finetune(settings(folders, tmp_path / "out", eval_data=folders / "test.jsonl"), progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and "predicted memory: LlamaForCausalLM, qlora" in printed.err
    assert "4/4" in printed.err and "exact_match=" in printed.err and "loss=" in printed.err


# --- refusals before a model is loaded, and after


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"method": "dora"}, "method is one of lora, qlora, qalora, qat-lora, bitfit, got 'dora'"),
        ({"method": "lora", "bits": 4}, "lora rounds nothing: leave bits=4 out"),
        ({"bits": 9}, "bits is 1 to 8, got 9"),
        ({"steps": 0}, "steps is a whole number of at least 1, got 0"),
        ({"steps": 2, "epochs": 1}, "both say how long to train"),
        ({"steps": None, "epochs": -1}, "epochs is above 0, got -1"),
        ({"lr": float("nan")}, "lr is above 0, got nan"),
        ({"batch_size": 2.5}, "batch_size is a whole number of at least 1, got 2.5"),
        ({"seed": -1}, "seed is a whole number from 0"),
        ({"lora_dropout": 1}, r"lora_dropout is in \[0, 1\), got 1"),
        ({"compute": "float16"}, "compute is float32 or bfloat16, got 'float16'"),
        ({"device": "cuda:1"}, "device is cpu or cuda .*CUDA_VISIBLE_DEVICES.*, got 'cuda:1'"),
    ],
)
def test_settings_that_cannot_be(folders, tmp_path, changes, reason):
    with pytest.raises(ValueError, match=reason):
        finetune(settings(folders, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists() and Same is Settings


@pytest.mark.parametrize(
    "changes, reason",
    [
        (
            {"model": "bert", "data": "rows.jsonl"},
            'BertModel is an encoder, which writes no text: it trains on rows of "text"',
        ),
        ({"data": "texts.jsonl"}, "LlamaForCausalLM is a language model: rows of .*need an encoder"),
        ({"max_length": 10_000}, "max_length=10000, and qlab-mini reads at most 512 tokens"),
        ({"targets": ("q_porj",)}, "target_modules has 'q_porj'.*Close: q_proj"),
        ({"method": "qalora", "group_size": 48}, "48"),
        ({"bitsandbytes": True, "block_size": 128}, "blocks of 64: block_size=128 needs bitsandbytes=False"),
        ({"method": "qat-lora", "lora_dropout": 0.1}, "school='merged' has no A·x to drop inputs from"),
    ],
)
def test_a_model_that_does_not_fit(folders, tmp_path, changes, reason):
    changes = changes | ({"data": folders / changes["data"]} if "data" in changes else {})
    with pytest.raises(ValueError, match=reason):
        finetune(settings(folders, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_a_number_ends_the_run(folders, tmp_path):
    with pytest.raises(ValueError, match=r"at step \d+: the training has diverged. Lower the learning rate \(1e\+30\)"):
        finetune(settings(folders, tmp_path / "out", lr=1e30, steps=8))
    assert not (tmp_path / "out" / "record.json").exists()


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    return finetune(settings(folders, out))


def test_folders_that_hold_something(folders, tmp_path, finished):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds something else \(letter.txt"):
        finetune(settings(folders, tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        finetune(settings(folders, tmp_path / "letter.txt"), resume=True)
    with pytest.raises(ValueError, match="holds a finished run: --resume"):
        finetune(settings(folders, finished.folder))
    again = finetune(settings(folders, finished.folder), resume=True)
    assert again.record == finished.record and torch.equal(logits(again.model), logits(finished.model))
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        load_finetuned(tmp_path)


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """Eight steps that nothing disturbs."""
    return finetune(settings(folders, tmp_path_factory.mktemp("alone") / "out", steps=8))


class Killed(Exception):
    """In place of the kill: nothing that the run would catch."""


@pytest.fixture
def unfinished(folders, tmp_path, monkeypatch):
    """A run that ended in its sixth step of eight, one whole checkpoint behind it."""
    step, seen = finetune_trainer.FinetuneTrainer.training_step, []

    def ends(self, *args):
        seen.append(1)
        if len(seen) == 6:
            raise Killed
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_trainer.FinetuneTrainer, "training_step", ends)
        with pytest.raises(Killed):
            finetune(settings(folders, tmp_path / "out", steps=8))
    return tmp_path / "out"


def test_a_resumed_run_says_what_differs(folders, unfinished, tmp_path):
    same = settings(folders, unfinished, steps=8)
    with pytest.raises(ValueError, match="holds an unfinished run: --resume goes on with it"):
        finetune(same)
    for name, value, then in (
        ("lr", 1e-3, "0.002"),
        ("steps", 9, "8"),
        ("seed", 1, "0"),
        ("method", "lora", "'qlora'"),
    ):
        with pytest.raises(
            ValueError, match=rf"run\.json: the run that is to go on had another {name} \({then} then, "
        ):
            finetune(
                dataclasses.replace(same, **{name: value}, **({"lr": 2e-3} if name == "method" else {})), resume=True
            )
    other = jsonl(tmp_path / "other.jsonl", ROWS[1:])
    with pytest.raises(ValueError, match="had another data_sha256"):
        finetune(dataclasses.replace(same, data=other), resume=True)
    moved = shutil.copy(folders / "rows.jsonl", tmp_path / "moved.jsonl")
    assert finetune(dataclasses.replace(same, data=moved), resume=True).record["steps"] == 8


def test_a_resumed_run_on_another_base_is_refused(folders, tmp_path, unfinished):
    run = json.loads((unfinished / "run.json").read_text())
    name = next(iter(run["base"]["checksums"]))
    run["base"]["checksums"][name] = "0" * 64
    (unfinished / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"run\.json: the run that is to go on had another base: give it what it had"):
        finetune(settings(folders, unfinished, steps=8), resume=True)


@pytest.mark.parametrize(
    "file", ["trained.safetensors", "optimizer.safetensors", "state.json", "rng-0.json", "trainer_state.json"]
)
def test_a_damaged_checkpoint_is_skipped_and_the_result_is_the_same(folders, alone, unfinished, file):
    (checkpoint,) = (unfinished / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000004"
    assert {path.name for path in checkpoint.iterdir()} == {
        "trained.safetensors", "optimizer.safetensors", "state.json", "rng-0.json", "trainer_state.json", "complete.json",
    }  # fmt: skip
    content = (checkpoint / file).read_bytes()
    changed = b"1" if content[-20:-19] == b"0" else b"0"
    (checkpoint / file).write_bytes(content[:-20] + changed + content[-19:])
    (unfinished / "checkpoints" / "step-00000006.partial").mkdir()
    with pytest.warns(UserWarning) as warned:
        resumed = finetune(settings(folders, unfinished, steps=8), resume=True)
    said = [str(w.message) for w in warned if "is skipped" in str(w.message)]
    assert "step-00000006.partial is skipped: it has no complete.json" in said[0]
    assert f"step-00000004 is skipped: {file}" in said[1] and "cut off or was changed" in said[1]
    assert resumed.record["adapter_sha256"] == alone.record["adapter_sha256"]
    assert resumed.record["curve"] == alone.record["curve"]


def test_a_checkpoint_holds_what_trains_and_no_pickle(folders, unfinished):
    (checkpoint,) = (unfinished / "checkpoints").iterdir()
    trained = load_file(checkpoint / "trained.safetensors")
    assert trained and all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in trained)
    assert (
        sum(path.stat().st_size for path in checkpoint.iterdir())
        < 1_000_000
        < (MINI_FOLDER / "model.safetensors").stat().st_size
    )


def test_ctrl_c_ends_the_step_and_leaves_a_checkpoint(folders, tmp_path, monkeypatch, alone):
    step = finetune_trainer.FinetuneTrainer.training_step

    def pressed(self, *args):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(finetune_trainer.FinetuneTrainer, "training_step", pressed)
        with pytest.raises(KeyboardInterrupt, match="interrupted at step 5 of 8; --resume goes on from step 5"):
            finetune(settings(folders, tmp_path / "out", steps=8, save_steps=100))
    assert signal.getsignal(signal.SIGINT) is before
    resumed = finetune(settings(folders, tmp_path / "out", steps=8, save_steps=100), resume=True)
    assert resumed.record["adapter_sha256"] == alone.record["adapter_sha256"]


# --- adapters that are not what was written


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished.folder, tmp_path / "copy")


def test_a_cut_off_adapter_is_refused(copied):
    path = copied / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*cut off"):
        load_finetuned(copied)


def test_a_changed_adapter_is_refused(copied):
    path = copied / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t + 1e-3 for name, t in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has SHA-256 .* cut off or was changed"):
        load_finetuned(copied)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "qlab.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / "adapter" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        load_finetuned(copied)


def edited(copied, **changes):
    record = json.loads((copied / "record.json").read_text())
    record["settings"] |= changes
    (copied / "record.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"block_size": 128}, r"qlab\.json: the adapter was trained on a base with block_size=64, this one has 128"),
        ({"bits": 3}, r"qlab\.json: the adapter was trained on a base with format='nf4'"),
        ({"r": 4}, r"what was saved is not what trains here: .*lora_A is \(8, 256\) in the file, and \(4, 256\)"),
        ({"model": "qwen2"}, r"qlab\.json is of another base: this one has no linear layer 'model\.layers\.2"),
    ],
)
def test_an_adapter_of_another_base_is_refused(folders, copied, changes, reason):
    edited(copied, **{name: str(folders / value) if name == "model" else value for name, value in changes.items()})
    with pytest.raises(ValueError, match=reason):
        load_finetuned(copied)


def test_a_base_of_other_weights_is_refused(folders, tmp_path):
    finetune(settings(folders, tmp_path / "out", "qwen2", steps=1))
    torch.manual_seed(1)
    other = Qwen2ForCausalLM(Qwen2ForCausalLM.from_pretrained(folders / "qwen2").config)
    other.save_pretrained(tmp_path / "other")
    load("qlab-mini")[1].save_pretrained(tmp_path / "other")
    edited(tmp_path / "out", model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="the base is not the one that the adapter was trained on"):
        load_finetuned(tmp_path / "out")


@pytest.mark.parametrize("method, name", [("qalora", "trained.safetensors"), ("lora", "head.safetensors")])
def test_other_files_are_checked_too(folders, tmp_path, method, name):
    finetune(settings(folders, tmp_path / "out", "bert", method, steps=1))
    path = tmp_path / "out" / "adapter" / name
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match=rf"{name}.* cut off or was changed"):
        load_finetuned(tmp_path / "out")
    path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        load_finetuned(tmp_path / "out")


@pytest.mark.parametrize("moment", ["the adapter gets its name", "the record is written"])
def test_a_run_counts_as_finished_when_everything_is_there(folders, tmp_path, monkeypatch, finished, moment):
    out, rename, write = tmp_path / "out", Path.rename, checkpoints.write_json

    def renames(self, target):
        if Path(target) == out / "adapter":
            raise Killed
        return rename(self, target)

    def writes(path, content):
        if path == out / "record.json":
            raise Killed
        return write(path, content)

    with monkeypatch.context() as patch:
        if moment == "the record is written":
            patch.setattr(checkpoints, "write_json", writes)
        else:
            patch.setattr(Path, "rename", renames)
        with pytest.raises(Killed):
            finetune(settings(folders, out))
    assert (out / "adapter").exists() == (moment == "the record is written")
    assert not (out / "record.json").exists() and checkpoints.latest(out / "checkpoints")[0] == 4
    resumed = finetune(settings(folders, out), resume=True)
    assert resumed.record["adapter_sha256"] == finished.record["adapter_sha256"]
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "record.json", "run.json"]
