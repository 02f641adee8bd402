"""The command line: arguments arrive, errors are one paragraph and a status, nothing heavy is imported for --help."""

import importlib
import subprocess
import sys

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
