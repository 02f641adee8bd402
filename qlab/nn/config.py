"""Formats as JSON: what a checkpoint writes down to decode its weights again.

    {"type": "IntAffine", "bits": 4, "symmetric": false, "granularity": "group", "group_size": 32, …,
     "param_dtype": "float32"}

"type" names a class that `qlab.formats` exports, and nothing else can be made from a config. The other entries are the
arguments of its constructor, which every format keeps under their own names.
"""

import inspect

import torch

import qlab.formats
from qlab.formats import Format


def format_config(fmt: Format) -> dict:
    """The config of a format, JSON types only. Raises TypeError for a format that cannot be written so, saying why.

    >>> from qlab.formats import NF4
    >>> format_config(NF4(block_size=64, double_quant=True))
    {'type': 'NF4', 'block_size': 64, 'double_quant': True}
    """
    name = type(fmt).__name__
    if getattr(qlab.formats, name, None) is not type(fmt):
        raise TypeError(f"{name} is not exported by qlab.formats, so a config could not be read back")
    config = {"type": name}
    for argument in inspect.signature(type(fmt)).parameters:
        if not hasattr(fmt, argument):
            raise TypeError(
                f"{name} does not keep its argument {argument!r} under that name: it cannot be written down"
            )
        value = getattr(fmt, argument)
        if isinstance(value, torch.dtype):
            value = dtype_name(value)
        if not isinstance(value, bool | int | float | str | None):
            raise TypeError(f"{name}.{argument} is a {type(value).__name__}, which a config cannot hold")
        config[argument] = value
    return config


def format_from_config(config: dict) -> Format:
    """The format that `format_config` wrote down. Raises ValueError for one that this qlab does not have."""
    settings = dict(config)
    name = settings.pop("type", None)
    made = getattr(qlab.formats, name, None) if isinstance(name, str) else None
    if not (isinstance(made, type) and issubclass(made, Format) and made is not Format):
        raise ValueError(f"no format is named {name!r} in qlab.formats")
    arguments = inspect.signature(made).parameters
    if unknown := settings.keys() - arguments.keys():
        raise ValueError(f"{name} takes {', '.join(arguments)}, but the config has {', '.join(sorted(unknown))} too")
    for argument, value in settings.items():
        if isinstance(arguments[argument].default, torch.dtype):
            settings[argument] = dtype_from_name(value)
    return made(**settings)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 → "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """ "bfloat16" → torch.bfloat16. Raises ValueError for a name that is no dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not the name of a torch dtype")
    return dtype
