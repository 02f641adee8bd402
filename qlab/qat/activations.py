"""FakeActivations: activations that are rounded in the forward pass, over a range that was watched first.

Jacob et al. 2018, arXiv:1712.05877, section 3.1: activation quantization is off for the first steps of training, in which
the ranges are still moving, and on afterwards. Here observers of `qlab.calibrate` watch that many batches, and then the range
is frozen. They see all of x, padding too. Granularities as in Nagel et al. 2021, arXiv:2106.08295, section 2.4.

| granularity | one range for | dynamic (warmup=0) | static (warmup=N) | can be stored in a QuantLinear |
|---|---|---|---|---|
| tensor | all of x | yes | yes | yes |
| token | a token | yes | no: tokens to come have no range yet | yes |
| channel | a column of x | yes | yes | no: an integer product cannot have a scale for each term of its sum |
| group | group_size columns | yes, for each token | yes, for all tokens | no: QuantLinear's products run over whole rows |

Axis legend: tokens = every axis of x but the last, flattened; in = its last axis; rows = numbers that share a range.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlab.calibrate import MinMax, Observer
from qlab.formats import IntAffine
from qlab.formats.base import Params
from qlab.nn import ActQuant, check_activations
from qlab.nn.base import FrozenBuffers
from qlab.qat.straight_through import fake_quantize

STORABLE = ("tensor", "token")


class FakeActivations(FrozenBuffers):
    """x → x', both (…, in) in x's dtype: quantized and decoded by IntAffine, with the straight-through gradient.

    Parameters
    ----------
    bits, symmetric, narrow : as in IntAffine.
    granularity, group_size : see above.
    warmup : batches in train mode that are only watched, x going through as it is; the next one is quantized over the range
        that the observers then give. 0: dynamic, the range of each x is its own.
    observer : makes a range observer; one for each range.

    Gradient: 1; 0 where a static range clipped x (see `inside`). Eval mode never watches.

    State dict: nothing where dynamic or still watching. Static, once frozen: scale, and zero_point unless symmetric, both
    (rows,) buffers: 1 per tensor, in, or in / group_size. What observers saw is not saved: a model loaded from before the
    freeze watches again from the start.

    Raises ValueError for settings that contradict each other. `forward` raises RuntimeError in eval mode before the freeze,
    TypeError for integers and ValueError for NaN or Inf in x, and for an x of another width than was watched.
    """

    def __init__(
        self,
        bits: int = 8,
        symmetric: bool = True,
        granularity: str = "tensor",
        group_size: int | None = None,
        warmup: int = 0,
        observer: Callable[[], Observer] = MinMax,
        narrow: bool = True,
    ):
        super().__init__()
        if granularity not in ("tensor", "token", "channel", "group"):
            raise ValueError(f"granularity of activations is tensor, token, channel or group, got {granularity!r}")
        if (granularity == "group") != (group_size is not None):
            raise ValueError(
                f"group_size belongs to granularity='group': got {granularity!r} and group_size={group_size}"
            )
        if warmup < 0 or (warmup and granularity == "token"):
            raise ValueError(
                f"warmup is a number of batches, and 0 per token, for tokens to come have no range yet: got warmup={warmup}, "
                f"granularity={granularity!r}"
            )
        self.format = IntAffine(bits, symmetric, "channel", narrow=narrow)  # a "channel" for each range
        self.bits, self.symmetric, self.narrow, self.observer = bits, symmetric, narrow, observer
        self.granularity, self.group_size, self.warmup = granularity, group_size, warmup
        self.observers: list[Observer] = []
        self.watched = 0
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    @property
    def frozen(self) -> bool:
        """True once a static range is fixed."""
        return self.scale is not None

    def freeze(self) -> None:
        """Fix the range that the observers give now, before `warmup` batches are full if need be."""
        if not self.observers:
            raise RuntimeError("nothing was watched yet: run batches in train mode first")
        low, high = (torch.stack(ends) for ends in zip(*(one.range() for one in self.observers), strict=True))
        for name, param in self.format.from_range(low, high).items():
            setattr(self, name, param)
        self.observers = []

    def forward(self, x: Tensor) -> Tensor:
        check_activations(x)
        rows = self._rows(x)
        if not self.warmup:
            return self._quantize(x, rows, self.format.fit(rows.detach()), clip=False)
        if not self.frozen and self.training and self.watched < self.warmup:
            self._watch(rows.detach())
            return x
        if not self.frozen:
            if not self.training:
                raise RuntimeError(
                    f"{self.watched} of {self.warmup} batches were watched: run more in train mode, or call freeze()"
                )
            self.freeze()
        if len(rows) != len(self.scale):
            raise ValueError(f"{len(self.scale)} ranges were watched, x of shape {tuple(x.shape)} needs {len(rows)}")
        return self._quantize(x, rows, {name: param.to(x.device) for name, param in self.named_buffers()}, clip=True)

    def _watch(self, rows: Tensor) -> None:
        self.observers = self.observers or [self.observer() for _ in rows]
        if len(rows) != len(self.observers):
            raise ValueError(f"{len(self.observers)} ranges were watched, this x has {len(rows)}")
        for one, values in zip(self.observers, rows, strict=True):
            one.observe(values)
        self.watched += 1

    def _quantize(self, x: Tensor, rows: Tensor, params: Params, clip: bool) -> Tensor:
        x_hat = self._unrows(fake_quantize(rows, self.format, params, clip), x)
        largest = torch.finfo(x.dtype).max  # the outermost level can lie half a step beyond the dtype
        return x_hat.clamp(-largest, largest).to(x.dtype)

    def _rows(self, x: Tensor) -> Tensor:
        """(rows, n) float32: x laid out so that what shares a range is a row."""
        if x.dim() == 0:
            raise ValueError("activations need at least one axis, got a scalar")
        if self.granularity == "group" and x.shape[-1] % self.group_size:
            raise ValueError(f"group_size={self.group_size} does not divide the last axis of x, {tuple(x.shape)}")
        tokens = x.float().reshape(x.shape[:-1].numel(), x.shape[-1])
        if self.granularity == "tensor":
            return tokens.reshape(1, -1)
        if self.granularity == "token":
            return tokens
        if self.granularity == "channel":
            return tokens.t()
        groups = tokens.reshape(len(tokens), -1, self.group_size)
        return groups.movedim(1, 0).flatten(1) if self.warmup else groups.flatten(0, 1)

    def _unrows(self, rows: Tensor, x: Tensor) -> Tensor:
        """The inverse of `_rows`."""
        if self.granularity == "channel":
            rows = rows.t()
        elif self.granularity == "group" and self.warmup:
            rows = rows.view(x.shape[-1] // self.group_size, -1, self.group_size).movedim(0, 1)
        return rows.reshape(x.shape)

    def act_quant(self) -> ActQuant:
        """The same quantization, stored. Raises ValueError for what ActQuant has not, and where nothing is frozen yet."""
        if self.granularity not in STORABLE:
            raise ValueError(
                f"activations per {self.granularity} cannot be stored: a QuantLinear quantizes its input per "
                f"{' or '.join(STORABLE)}"
            )
        if self.warmup and not self.frozen:
            raise ValueError(f"the range is not frozen: {self.watched} of {self.warmup} batches were watched")
        act = ActQuant(self.bits, self.symmetric, self.granularity, static=bool(self.warmup), narrow=self.narrow)
        for name, param in self.named_buffers():
            getattr(act, name).copy_(param.reshape(()))
        return act

    def _load_from_state_dict(self, state_dict, prefix, *args, **settings):
        for name in ("scale", "zero_point") if self.warmup else ():  # how many there are is known only from data
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args, **settings)

    def extra_repr(self) -> str:
        where = f"group {self.group_size}" if self.granularity == "group" else f"per {self.granularity}"
        how = f"static after {self.warmup} batches" if self.warmup else "dynamic"
        return f"{self.format.bits} bits, {'symmetric' if self.symmetric else 'asymmetric'}, {where}, {how}"
