"""FakeQuant: weights that are rounded in every forward pass, so that training sees the model that will be stored.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, section 3. Where the grid lies is decided in one of three ways:

    refit      anew from the weights in each forward; no state, and nothing is ever clipped
    frozen     once, from the weights at the start; weights that leave the range get no gradient
    learned    scales, absmaxes or levels are Parameters, moved by their own gradient at fixed codes

State dict: refit: nothing. frozen: every param of `format.fit` as a buffer. learned: the same names; Parameters in float32
those that `decode` reads and that are real numbers, buffers the others (an integer zero_point, TWN's threshold).

`quantize(w)` gives the QTensor with the bits of the forward pass: all that has to be known to store a trained layer.
"""

import torch
from torch import Tensor, nn

from qlab.formats import Format, IntAffine, QTensor
from qlab.formats.base import Params
from qlab.nn.base import FrozenBuffers
from qlab.qat.straight_through import fake_quantize, straight_through

GRIDS = ("refit", "frozen", "learned")


class FakeQuant(FrozenBuffers):
    """w → w', both (out, in) in w's dtype: the weight as stored, differentiable.

    Parameters
    ----------
    format : any Format.
    w : the weight to start from, which "frozen" and "learned" are fitted to.
    grid : "refit" | "frozen" | "learned".

    Subclasses that choose codes or gradients in their own way override `params` or `forward`, and `check`. `inputs` is the
    module that makes what they quantize inputs with, unless `prepare_qat` is told otherwise.

    Raises ValueError for an unknown grid, and for a learned one where a format does not store what `fit` finds: double
    quantization, 8-bit scales, no params at all.

    >>> fake = FakeQuant(IntAffine(2, granularity="tensor"), torch.tensor([[0.4, -0.1]]))
    >>> fake(torch.tensor([[0.4, -0.1]])), fake.quantize(torch.tensor([[0.4, -0.1]])).nbytes
    (tensor([[0.4000, 0.0000]]), 5)
    """

    inputs: type[nn.Module] | None = None

    def __init__(self, format: Format, w: Tensor, grid: str = "refit"):
        super().__init__()
        if grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {grid!r}")
        self.check(format, w.shape)
        self.format, self.grid = format, grid
        self.dtypes: dict[str, torch.dtype] = {}
        if grid != "refit":
            self._keep(self.fit(w.detach()))

    def check(self, format: Format, shape: torch.Size) -> None:
        """Raises ValueError for a format that cannot be, or does not fit a weight of `shape`."""
        format.blocks(torch.empty(shape, device="meta"))

    def fit(self, w: Tensor) -> Params:
        """Where the grid starts."""
        return self.format.fit(w)

    def _keep(self, params: Params) -> None:
        learned = self._learnable(params) if self.grid == "learned" else ()
        for name, param in params.items():
            self.dtypes[name] = param.dtype
            if name in learned:
                self.register_parameter(name, nn.Parameter(param.float()))
            else:
                self.register_buffer(name, param.clone())

    def _learnable(self, params: Params) -> list[str]:
        stored = self.format.stored(params)
        real = [name for name, param in stored.items() if param.is_floating_point()]
        if not real or not stored.keys() <= params.keys() or any(stored[name].dtype.itemsize == 1 for name in real):
            raise ValueError(
                f"the grid of {self.format} cannot be learned: it stores {', '.join(stored) or 'no params'}, and a learned "
                "param must be stored as a real number of 16 bits or more. Use grid='refit'"
            )
        return real

    def params(self, w: Tensor) -> Params:
        """The params that encode w, as from `format.fit`, without a gradient.

        Raises RuntimeError for an integer grid whose step was learned down to 0.
        """
        if self.grid == "refit":
            return self.fit(w.detach())
        params = {name: getattr(self, name).detach().to(dtype) for name, dtype in self.dtypes.items()}
        if self.grid == "learned" and isinstance(self.format, IntAffine):
            check_scale(params["scale"])
        return params

    def forward(self, w: Tensor) -> Tensor:
        params = self.params(w)
        for name, parameter in self.named_parameters():  # float32: gradients of float16 would underflow
            params[name] = straight_through(parameter.float(), params[name].float())
        return fake_quantize(w, self.format, params, clip=self.grid != "refit")

    @torch.no_grad()
    def quantize(self, w: Tensor) -> QTensor:
        """The weight as the forward pass in eval mode sees it, stored. Training on does not change it."""
        params = {name: param.clone() for name, param in self.params(w).items()}
        codes = self.format.encode(w, params)
        return QTensor(self.format, self.format.pack(codes), self.format.stored(params), w.shape, w.dtype)

    @torch.no_grad()
    def constrain(self, w: Tensor) -> None:
        """Put w, in place, where the method keeps its real weights, after an optimizer step. Most methods: leave it."""

    def extra_repr(self) -> str:
        return f"{self.format}, {self.grid}"


def check_scale(scale: Tensor) -> None:
    """Raises RuntimeError unless every learned scale is finite and above 0."""
    if not (scale.isfinite() & (scale > 0)).all():
        raise RuntimeError(
            f"a learned scale has become {float(scale.min())}, and a grid needs a step above 0: lower the learning rate of "
            "the scales (qlab.qat.parameter_groups)"
        )
