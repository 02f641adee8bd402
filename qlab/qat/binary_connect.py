"""BinaryConnect: the forward and backward passes see weights of two values, the updates go to the real ones.

Courbariaux, Bengio and David 2015, "BinaryConnect: Training Deep Neural Networks with binary weights during propagations",
arXiv:1511.00363, section 2:

    w_b = +H if w ≥ 0, −H otherwise                              deterministic, eq. (1)
    w_b = +H with probability p = σ(w / H), else −H              stochastic, eq. (2)
    σ(x) = clip((x + 1) / 2, 0, 1)                               hard sigmoid, eq. (3)
    w  ← clip(w − η · ∂C/∂w_b)                                   Algorithm 1, step 3: the real weights, to [−H, H]

The paper has H = 1. Its code scales each layer as Glorot and Bengio initialise it, H = √(6 / (in + out)) / 2, so that one
learning rate suits all layers. E[w_b] = w: stochastic rounding is unbiased for weights within ±H, which is why they are
clipped, and weights beyond would learn nothing more. At test time the weights
are the deterministic ones (section 2.6, method 1; after stochastic training the paper keeps the real weights, which saves
nothing).

Axis legend: out, in = rows and columns of a weight.
"""

import math

import torch
from torch import Tensor

from qlab.formats import Binary, Format
from qlab.formats.base import Params
from qlab.qat.fake_quant import FakeQuant
from qlab.qat.straight_through import straight_through


def glorot_level(shape: torch.Size) -> float:
    """H of a layer with a weight of shape (out, in), in weight units."""
    return math.sqrt(6 / (shape[0] + shape[1])) / 2


def hard_sigmoid(x: Tensor) -> Tensor:
    """eq. (3), shape of x.

    >>> hard_sigmoid(torch.tensor([-2.0, 0.0, 0.5, 1.0])).tolist()
    [0.0, 0.5, 0.75, 1.0]
    """
    return ((x + 1) / 2).clamp(0, 1)


def binarize(w: Tensor, level: Tensor, stochastic: bool = False) -> Tensor:
    """w_b: ±level, shape and dtype of w; the gradient of w_b is that of w, as Algorithm 1 uses it.

    Stochastic draws come from torch's global generator.
    """
    real = w.detach()
    positive = torch.rand_like(real) < hard_sigmoid(real / level) if stochastic else real >= 0
    return straight_through(w, torch.where(positive, level, -level).to(w.dtype))


class BinaryConnect(FakeQuant):
    """Weights ±H, H fixed by the layer's shape. Format: Binary("tensor").

    Parameters
    ----------
    stochastic : draw the signs in train mode; in eval mode, and stored, they are those of the real weights.

    State dict: scale, () float32 buffer: H.

    Call `constrain_weights(model)` after every optimizer step: it clips the real weights to ±H.
    """

    def __init__(self, format: Format, w: Tensor, stochastic: bool = False):
        super().__init__(format, w, grid="frozen")
        self.stochastic = stochastic

    def check(self, format: Format, shape: torch.Size) -> None:
        if not isinstance(format, Binary) or format.granularity != "tensor":
            raise ValueError(f'BinaryConnect has two values for each layer, so it takes Binary("tensor"), not {format}')

    def fit(self, w: Tensor) -> Params:
        return {"scale": torch.tensor(glorot_level(w.shape), dtype=self.format.param_dtype, device=w.device)}

    def forward(self, w: Tensor) -> Tensor:
        return binarize(w, self.scale.float(), self.stochastic and self.training)

    @torch.no_grad()
    def constrain(self, w: Tensor) -> None:
        level = float(self.scale)
        w.clamp_(-level, level)

    def extra_repr(self) -> str:
        return f"±{float(self.scale):.4g}" + ", stochastic" * self.stochastic
