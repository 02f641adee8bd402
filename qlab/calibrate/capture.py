"""One pass of calibration data through a model, with forward pre-hooks on the layers that are to be quantized.

A *batch* is what the model is called with: a mapping (`model(**batch)`, what tokenizers return), a tensor or a tuple of
positional arguments, or a `Call`. Where a mapping holds an `attention_mask` (batch, tokens), positions with a 0 are
padding and are left out of every statistic.

Memory: what is kept for the selected layers, and one batch. A Hessian takes in² numbers a layer, so a large model goes
layer by layer, with `layers=[name]` or, block by block and without running the rest of the model each time:

    calls = inputs_of(model, batches, "model.layers.0")       the inputs of a block, for every batch
    stats = capture(block, calls, keep=("hessian",))          statistics of the layers in it
"""

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlab.calibrate.observers import Observer
from qlab.calibrate.statistics import STATISTICS, InputStats
from qlab.models import find_linears, guard_bitsandbytes


class Call(NamedTuple):
    """The arguments of one call of a module. mask: (batch, tokens) attention mask of the batch it came from, or None."""

    args: tuple
    kwargs: dict
    mask: Tensor | None = None


def capture(
    model: nn.Module,
    batches: Iterable,
    layers: Iterable[str] | None = None,
    keep: tuple[str, ...] = STATISTICS[:3],
    dtype: torch.dtype = torch.float32,
    stop: bool = False,
) -> dict[str, InputStats]:
    """name → statistics of the layer's input, over all tokens of all batches.

    layers: full names of any modules whose input is (…, in); None: all linear layers.
    keep, dtype: as in InputStats. "hessian" is kept only where it is asked for.
    stop: end each forward once it has reached every one of `layers`. For layers that a forward reaches once.

    The model runs in eval mode without gradients; modes are put back and hooks removed, after an error too.
    Raises ValueError for a name that is no module, and for layers that no batch reached, naming them. Errors on an input
    (NaN, integers, another width than before) name the layer in a note.
    """
    return _watch(model, batches, {name: InputStats(keep, dtype) for name in _names(model, layers)}, stop)


def observe_inputs(
    model: nn.Module,
    batches: Iterable,
    make: Callable[[], Observer],
    layers: Iterable[str] | None = None,
    stop: bool = False,
) -> dict[str, Observer]:
    """name → range observer that has seen the layer's input; make: a new observer for each layer, e.g. `Entropy`.

    Everything else is as in `capture`.
    """
    return _watch(model, batches, {name: make() for name in _names(model, layers)}, stop)


def inputs_of(model: nn.Module, batches: Iterable, name: str) -> list[Call]:
    """What module `name` is called with, for every batch: the forward ends there.

    Memory: all these inputs at once. Raises ValueError for a name that is no module or that a batch does not reach.
    """
    (name,) = _names(model, [name])
    calls: list[Call] = []

    def stop(module, args, kwargs):
        calls.append(Call(args, kwargs, mask))
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with evaluating(model):
            for number, batch in enumerate(batches):
                mask = _mask(batch)
                with contextlib.suppress(_Reached):
                    run(model, batch)
                if len(calls) == number:
                    raise ValueError(f"batch {number} did not reach {name!r}")
    finally:
        handle.remove()
    return calls


class _Reached(Exception):
    """Ends a forward at the module whose input was wanted."""


def _watch(model: nn.Module, batches: Iterable, watchers: dict, stop: bool) -> dict:
    """Show each watcher, by its `observe`, every input of the layer it is named after."""
    seen, mask, reached = dict.fromkeys(watchers, 0), None, set()

    def hook_for(name):
        def hook(module, args, kwargs):
            try:
                x = _without_padding(_input(args, kwargs), mask)
                watchers[name].observe(x)
            except (TypeError, ValueError) as error:
                error.add_note(f"while observing the input of {name!r}")
                raise
            seen[name] += x.numel()
            reached.add(name)
            if stop and len(reached) == len(watchers):
                raise _Reached

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in watchers:
            handle = model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            mask = _mask(batch)
            reached.clear()
            with contextlib.suppress(_Reached):
                run(model, batch)
    if missed := [name for name, values in seen.items() if not values]:
        raise ValueError(
            f"no batch reached {len(missed)} of {len(seen)} layers: {', '.join(missed)}. Leave them out of `layers`, or "
            "calibrate with batches that use them"
        )
    return watchers


def _names(model: nn.Module, layers: Iterable[str] | None) -> list[str]:
    if layers is None:
        names = list(find_linears(model))
        if not names:
            raise ValueError(f"{type(model).__name__} has no linear layer: name the layers to watch")
        return names
    known = dict(model.named_modules(remove_duplicate=False))
    names = [layers] if isinstance(layers, str) else list(layers)
    for name in names:
        if name not in known:
            close = ", ".join(map(repr, difflib.get_close_matches(name, known, n=3))) or "none"
            raise ValueError(f"no layer is named {name!r}. Close: {close}")
    return names


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Eval mode and no gradients; afterwards each module is in the mode it was in."""
    if "bitsandbytes" in sys.modules:  # an eval forward would repack its 4-bit weights
        guard_bitsandbytes(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def run(model: nn.Module, batch):
    """What the model returns for a batch, whose tensors are moved to the device of the model."""
    first = next((tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors), None)

    def here(value):
        return value.to(first.device) if isinstance(value, Tensor) and first is not None else value

    if isinstance(batch, Call):
        return model(*batch.args, **batch.kwargs)
    if isinstance(batch, Mapping):
        return model(**{name: here(value) for name, value in batch.items()})
    if isinstance(batch, Tensor):
        return model(here(batch))
    if isinstance(batch, tuple | list):
        return model(*map(here, batch))
    raise TypeError(f"a batch is a mapping, a tensor, a tuple or a Call, got {type(batch).__name__}")


def _mask(batch) -> Tensor | None:
    """(batch, tokens) bool, True for tokens; None where there is no padding."""
    mask = (
        batch.mask if isinstance(batch, Call) else batch.get("attention_mask") if isinstance(batch, Mapping) else None
    )
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"an attention_mask is (batch, tokens) with 1 for tokens, got shape {tuple(mask.shape)}")
    return None if mask.bool().all() else mask.bool()


def _input(args: tuple, kwargs: dict) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("it was called without a tensor")


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or x.shape[:-1] == mask.shape[:1]:  # one row a sequence, such as a pooler's
        return x
    mask = mask.to(x.device)
    if x.shape[: mask.dim()] == mask.shape:
        return x[mask]
    if x.dim() == 2 and len(x) == mask.numel():  # tokens of all sequences, flattened
        return x[mask.reshape(-1)]
    raise ValueError(
        f"an input of shape {tuple(x.shape)} cannot be matched to an attention_mask of shape {tuple(mask.shape)}: "
        "use batches without padding, or leave this layer out"
    )
