"""The command line: arguments arrive, errors are one paragraph and a status, nothing heavy is imported for --help."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from qlab import cli
from qlab.adapters.merge_plan import HOW
from qlab.adapters.stored import FORMATS

merging = importlib.import_module(
    "qlab.adapters.merge_checkpoint"
)  # the module, also where the package exports its function


@pytest.fixture
def called(monkeypatch):
    calls = []
    monkeypatch.setattr(merging, "merge_checkpoint", lambda **settings: calls.append(settings))
    return calls


def test_every_argument_arrives(called):
    line = (
        "merge base adapter out --how requantize --dtype bfloat16 --base-quant nf4 --double-quant --block-size 128 "
        "--base-dtype float16 --skip-modules lm_head,score --dry-run --verify model"
    )
    assert cli.main(line.split()) == 0
    (given,) = called
    given.pop("progress")
    assert given == {
        "base": "base",
        "adapter": "adapter",
        "out": "out",
        "how": "requantize",
        "dtype": torch.bfloat16,
        "base_quant": "nf4",
        "double_quant": True,
        "block_size": 128,
        "base_dtype": torch.float16,
        "skip_modules": ["lm_head", "score"],
        "dry_run": True,
        "verify": "model",
    }


def test_what_is_left_out_is_not_said(called):
    """None, so that it contradicts neither qlab.json nor a base that is quantized on disk."""
    assert cli.main(["merge", "base", "adapter", "out"]) == 0
    (given,) = called
    assert given["how"] == "dequantize" and given["verify"] == "layers" and given["dry_run"] is False
    rest = ("dtype", "base_quant", "double_quant", "block_size", "base_dtype", "skip_modules")
    assert all(given[name] is None for name in rest)


def test_choices_are_those_of_the_package():
    merge = cli.parser()._subparsers._group_actions[0].choices["merge"]
    choices = {action.dest: action.choices for action in merge._actions}
    assert choices["how"] == HOW and choices["verify"] == merging.VERIFY
    assert choices["base_quant"] == (*FORMATS, "int8", "none")
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in cli.DTYPES)


@pytest.mark.parametrize("line", ["", "merge base adapter", "merge a b c --how add", "merge a b c --base-quant nf3"])
def test_wrong_arguments(line, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(line.split())
    assert "usage: qlab" in capsys.readouterr().err


def test_errors_are_one_paragraph(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["merge", str(tmp_path), str(tmp_path), str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("qlab: ") and "config.json" in printed.err and "Traceback" not in printed.err

    def noted(**_):
        error = ValueError("what")
        error.add_note("where")
        raise error

    monkeypatch.setattr(merging, "merge_checkpoint", noted)
    assert cli.main(["merge", "a", "b", "c"]) == 1
    assert capsys.readouterr().err == "qlab: what\nwhere\n"


def test_help_is_quick():
    code = "import sys; from qlab import cli; cli.parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "qlab.cli", "merge", "--help"], capture_output=True, text=True, check=True
    )
    assert "--base-quant" in done.stdout


FINETUNE = "finetune --model m --method qlora --data d.jsonl --out o"


@pytest.fixture
def trained(monkeypatch):
    """What `qlab.train.finetune` would have been called with."""
    from qlab.train import finetune

    calls = []
    record = {
        "steps": 7,
        "seconds": 3.2,
        "curve": [{"loss": 1.25}],
        "evaluations": [{"loss": 1.5, "exact_match": 0.25}],
    }

    def called(settings, **rest):
        calls.append((settings, rest))
        return finetune.Finetuned(None, None, record, Path(settings.out))

    monkeypatch.setattr(finetune, "finetune", called)
    return calls


def test_what_is_not_said_of_a_fine_tune_is_its_default(trained, capsys):
    from qlab.train.finetune import Settings

    assert cli.main(FINETUNE.split()) == 0
    assert trained == [(Settings("m", "qlora", "d.jsonl", "o"), {"resume": False, "progress": False})]
    assert capsys.readouterr().out == "o/adapter: loss 1.5, exact_match 0.25 after 7 steps and 3 s\n"


def test_every_argument_of_a_fine_tune_arrives(trained):
    from qlab.train.finetune import Settings

    line = (
        " --eval-data e.jsonl --bits 3 --group-size 64 --block-size 128 --no-double-quant --r 4 --lora-alpha 9 --lora-dropout 0.1 "
        "--targets q_proj,mlp.c_proj --lr 1e-3 --steps 5 --batch-size 2 --grad-accum 3 --max-length 99 --seed 6 --save-steps 10 "
        "--eval-steps 11 --dtype bfloat16 --compute bfloat16 --device cpu --bitsandbytes --activation-checkpointing --fsdp --resume"
    )
    assert cli.main((FINETUNE + line).split()) == 0
    ((given, rest),) = trained
    assert rest["resume"] is True
    expected = dict(
        model="m", method="qlora", data="d.jsonl", out="o", eval_data="e.jsonl", bits=3, group_size=64, block_size=128,
        double_quant=False, r=4, lora_alpha=9.0, lora_dropout=0.1, targets=("q_proj", "mlp.c_proj"), lr=1e-3, steps=5, epochs=None,
        batch_size=2, grad_accum=3, max_length=99, seed=6, save_steps=10, eval_steps=11, dtype="bfloat16", compute="bfloat16",
        device="cpu", bitsandbytes=True, activation_checkpointing=True, fsdp=True,
    )  # fmt: skip
    assert given == Settings(**expected) and expected.keys() == vars(Settings("m", "lora", "d", "o")).keys()
    assert cli.main((FINETUNE + " --targets .*mlp.*_proj --epochs 0.5").split()) == 0
    assert (trained[1][0].targets, trained[1][0].epochs) == (".*mlp.*_proj", 0.5)
    assert cli.main((FINETUNE + " --targets all-linear").split()) == 0
    assert trained[2][0].targets == "all-linear"


def test_the_help_says_the_defaults_of_the_package():
    from qlab.train.finetune import Settings
    from qlab.train.finetune_methods import METHODS

    assert tuple(METHODS) == cli.METHODS
    fine = cli.parser()._subparsers._group_actions[0].choices["finetune"]
    said = {a.dest: a.help.rpartition("(default: ")[2] for a in fine._actions if "(default: " in (a.help or "")}
    defaults = vars(Settings("m", "lora", "d", "o"))
    for name in ("group_size", "block_size", "r", "lora_alpha", "lora_dropout", "targets", "batch_size", "grad_accum", "seed",
                 "save_steps", "eval_steps", "dtype", "compute"):  # fmt: skip
        default = defaults[name]
        text = f"{default:g}" if isinstance(default, float) else str(default)
        assert said[name].startswith(f"{text})"), name


@pytest.mark.parametrize(
    "line", [" --method dora", " --steps 3 --epochs 1", " --steps many", " --device tpu", " --bit 4 --x"]
)
def test_wrong_arguments_of_a_fine_tune(line, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main((FINETUNE + line).split())
    assert "usage: qlab" in capsys.readouterr().err


def test_a_fine_tune_from_the_command_line(tmp_path, capsys, monkeypatch):
    """The process itself: what it prints, what it refuses, and that nothing else is on stderr."""
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n), "stop": "\n"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[0]) + "\n{}\n")
    monkeypatch.chdir(tmp_path)
    line = "finetune --model qlab-mini --method qlora --steps 2 --batch-size 2 --device cpu --out out --data"
    command = [sys.executable, "-m", "qlab.cli", *line.split(), "rows.jsonl"]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("out/adapter: loss ")
    assert json.loads((tmp_path / "out" / "record.json").read_text())["steps"] == 2
    assert cli.main([*line.split(), "bad.jsonl"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("qlab: bad.jsonl, line 2: has the fields none: a row is")
    assert cli.main([*line.split(), "rows.jsonl"]) == 1
    assert capsys.readouterr().err.startswith("qlab: out holds a finished run: --resume")


def test_a_checkpoint_that_is_skipped_is_a_line_on_stderr(trained, monkeypatch, capsys):
    from qlab.train import finetune

    called = finetune.finetune

    def warns(*arguments, **rest):
        warnings.warn("the checkpoint x is skipped", stacklevel=1)
        return called(*arguments, **rest)

    monkeypatch.setattr(finetune, "finetune", warns)
    assert cli.main(FINETUNE.split()) == 0
    assert capsys.readouterr().err == "qlab: the checkpoint x is skipped\n"


def test_an_interrupted_fine_tune_says_how_it_goes_on(monkeypatch, capsys):
    from qlab.train import finetune

    def interrupted(*_, **__):
        raise KeyboardInterrupt("interrupted at step 5 of 8; --resume goes on from step 5")

    monkeypatch.setattr(finetune, "finetune", interrupted)
    assert cli.main(FINETUNE.split()) == 130
    assert capsys.readouterr().err == "qlab: interrupted at step 5 of 8; --resume goes on from step 5\n"
