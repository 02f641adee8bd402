"""Formats written down as JSON and read back."""

import json

import pytest
import torch

import qlab.formats
from qlab.formats import FP4, NF4, FloatCast, Format, IntAffine
from qlab.nn import format_config, format_from_config

FORMATS = [
    IntAffine(bits=3, symmetric=False, granularity="group", group_size=4, param_dtype=torch.float16),
    IntAffine(bits=4, granularity="head", heads=2, head_axis=1, narrow=False),
    IntAffine(bits=4, symmetric=False, float_zero_point=True),
    NF4(block_size=32, double_quant=True),
    FP4(),
    FloatCast("bf16"),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_a_format_read_back_gives_the_same_codes(fmt):
    config = json.loads(json.dumps(format_config(fmt)))
    again = format_from_config(config)
    assert type(again) is type(fmt) and repr(again) == repr(fmt) and format_config(again) == config
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.quantize(w).packed, fmt.quantize(w).packed)


def test_every_argument_is_written_down():
    assert format_config(FORMATS[0]) == {
        "type": "IntAffine", "bits": 3, "symmetric": False, "granularity": "group", "group_size": 4, "heads": None,
        "head_axis": 0, "narrow": True, "float_zero_point": False, "param_dtype": "float16",
    }  # fmt: skip


class Unknown(Format):
    def __init__(self, codebook):
        self.codebook = codebook


def test_formats_that_cannot_be_written_down(monkeypatch):
    with pytest.raises(TypeError, match="Unknown is not exported"):
        format_config(Unknown("a"))
    with pytest.raises(TypeError, match="NF4 is not exported"):
        format_config(type("NF4", (NF4,), {})())
    monkeypatch.setattr(qlab.formats, "Unknown", Unknown, raising=False)
    assert format_from_config(format_config(Unknown("a"))).codebook == "a"
    with pytest.raises(TypeError, match="Unknown.codebook is a Tensor"):
        format_config(Unknown(torch.ones(2)))
    forgetful = Unknown("a")
    del forgetful.codebook
    with pytest.raises(TypeError, match="does not keep its argument 'codebook'"):
        format_config(forgetful)


@pytest.mark.parametrize("name", ["Nope", "Format", "pack", "QTensor", None, 3])
def test_only_formats_are_made(name):
    with pytest.raises(ValueError, match="no format is named"):
        format_from_config({"type": name})


def test_configs_of_another_version():
    with pytest.raises(ValueError, match="NF4 takes block_size, double_quant, but the config has rows too"):
        format_from_config({"type": "NF4", "rows": 2})
    for name in ("floaty", "nn", "float32.x"):
        with pytest.raises(ValueError, match="is not the name of a torch dtype"):
            format_from_config({"type": "IntAffine", "param_dtype": name})
