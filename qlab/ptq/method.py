"""Method: how the codes of one layer are chosen. The simplest, RTN, takes the nearest one.

A method sees one layer at a time: its weight, and statistics of what the layer was fed. It may ask for a transform first:
one scale for all layers that share an input, which makes the input easier to quantize or its important channels louder.

    x' = x / s,   W' = W · s        W'·x' = W·x

Axis legend: out, in = rows and columns of a weight.
"""

import torch
from torch import Tensor, nn

from qlab.calibrate import InputStats
from qlab.formats import Format, QTensor
from qlab.nn import ActQuant


class Method:
    """What `quantize_model` asks of a method. A subclass overrides what it does differently from rounding to nearest.

    Attributes
    ----------
    keep : which statistics of the layer's input it needs (names of `qlab.calibrate.STATISTICS`). None: no data.
    activations : how it quantizes activations where the caller does not say: a template, copied for each layer.
    norms_only : whether its transform is for inputs that a norm gives, and for no others.
    """

    keep: tuple[str, ...] = ()
    activations: ActQuant | None = None
    norms_only: bool = False

    def check(self, fmt: Format, shape: torch.Size | None = None) -> None:
        """Raises ValueError, naming both, if this method cannot choose codes of `fmt`, or not for a weight of `shape`."""

    def batches(self, model: nn.Module, calibration: list | None) -> list | None:
        """The calibration data to use: what the caller gave, unless the method makes its own."""
        return calibration

    def scale(self, weights: list[Tensor], stats: InputStats, formats: list[Format]) -> Tensor | None:
        """(in,) float32, > 0: what the input that these layers share is divided by and their weights are multiplied by.

        weights: (out, in) each, with one `in`, and the format of each; stats: of the input. None: no transform.
        """
        return None

    def quantize(self, w: Tensor, fmt: Format, stats: InputStats | None, name: str) -> tuple[QTensor, Tensor | None]:
        """The codes of one layer, and its g_idx (see QuantLinear) where its columns are grouped out of order.

        w: (out, in), transformed already, not changed. stats: of the layer's (transformed) input, if `keep` asks for any.
        name: of the layer in its model.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define quantize")

    def __repr__(self) -> str:
        settings = {k: v for k, v in vars(self).items() if k not in ("keep", "activations") and not k.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


class RTN(Method):
    """Round to nearest: each weight takes the code nearest to it, whatever the layer is fed. Any format."""

    def quantize(self, w: Tensor, fmt: Format, stats: InputStats | None, name: str) -> tuple[QTensor, None]:
        return fmt.quantize(w), None
