"""XNOR-Net: weights and inputs are signs, and the product counts bits.

Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", arXiv:1603.05279,
section 3.2:

    W ≈ α · sign(W)      α = mean |W| of each output channel, eq. (6)
    x ≈ β · sign(x)      β = mean |x| of each token, eq. (10)
    W·x ≈ α · β · (sign(W) ⊛ sign(x))                                     eq. (11), ⊛ by XNOR and popcount

A QuantLinear with Binary weights and one-bit activations computes exactly that in floating point; `xnor_linear` computes it
from packed bits alone.

Axis legend: out, in = rows and columns of a weight.
"""

import torch
from torch import Tensor

from qlab.calibrate import InputStats
from qlab.formats import Binary, Format, QTensor, sign_words, xnor_matmul
from qlab.nn import ActQuant, QuantLinear
from qlab.ptq.method import Method


class XNOR(Method):
    """Signs of weights and of inputs. Needs no data. Format: Binary(), per channel.

    The paper keeps the first and the last layer in full precision (leave them out by `select`), and trains through the
    rounding: without training little is left of a network.
    """

    activations = ActQuant(bits=1)

    def check(self, fmt: Format, shape: torch.Size | None = None) -> None:
        if not isinstance(fmt, Binary) or fmt.granularity != "channel":
            raise ValueError(f"XNOR-Net multiplies signs and scales each output once, so it takes Binary(), not {fmt}")

    def quantize(self, w: Tensor, fmt: Format, stats: InputStats | None, name: str) -> tuple[QTensor, None]:
        return fmt.quantize(w), None


def xnor_linear(layer: QuantLinear, x: Tensor) -> Tensor:
    """layer(x) from packed signs: x (…, in) → (…, out), in x's dtype.

    layer: as `quantize_model(…, Binary(), "xnor")` makes it. Raises ValueError for other layers.
    """
    signs = isinstance(layer.format, Binary) and layer.format.granularity == "channel" and layer.input_scale is None
    if not signs or layer.act_quant is None or layer.act_quant.config() != ActQuant(bits=1).config():
        raise ValueError(
            f"xnor_linear takes a layer of Binary weights per channel and one-bit inputs per token, got {layer}"
        )
    tokens = x.reshape(-1, x.shape[-1])
    beta = layer.act_quant.params(tokens)["scale"]
    product = xnor_matmul(sign_words(tokens), sign_words(layer.qtensor), k=x.shape[-1])
    y = product * beta.unsqueeze(1) * layer.scale.float()
    y = y if layer.bias is None else y + layer.bias
    return y.to(x.dtype).view(*x.shape[:-1], -1)
