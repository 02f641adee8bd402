"""QuantLinear: a linear layer over a frozen, packed weight.

    y = ActQuant(x / input_scale) · Wᵀ + bias,      W = dequantize(packed, params), columns put back in order by g_idx

W is written out for the product and dropped again, in forward and in backward: between them only codes are in memory.

State dict, all tensors of one layer:

| key | shape, dtype | present |
|---|---|---|
| packed | (bytes,) uint8 | always |
| scale, zero_point, absmax, … | as the format keeps it (`stored`) | one for each param of the format |
| bias | (out,), the layer's dtype | if the layer has one |
| input_scale | (in,) float32 | if a Transform was not folded into the producer |
| g_idx | (in,) int32 | if the groups of columns are not contiguous |
| act_quant.scale, act_quant.zero_point | (), see ActQuant | static activation quantization |

`config()` gives the rest as JSON, and `from_config(config, tensors)` makes the same layer again.

Axis legend: out, in = rows and columns of the weight; tokens = every axis of x but the last.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlab.formats import Format, QTensor
from qlab.nn.act_quant import ActQuant
from qlab.nn.base import FrozenBuffers
from qlab.nn.config import dtype_from_name, dtype_name, format_config, format_from_config
from qlab.nn.kernels import dequantize
from qlab.nn.weights import weight_of


class QuantLinear(FrozenBuffers):
    """A base layer (see `Base`) whose weight is a QTensor.

    Parameters
    ----------
    qtensor : the weight, (out, in); with `input_scale`, of W · input_scale; with `g_idx`, of its columns sorted by group.
    bias : (out,) or None. A Parameter is kept as it is, shared and trainable if it was; another tensor is frozen.
    act_quant : quantizes the input; None: it is left as it is.
    input_scale : (in,) > 0, what the input is divided by: SmoothQuant's and AWQ's s where it could not be folded into
        the layer before.
    g_idx : (in,) integers, the group of each input column (GPTQ with act-order). The QTensor holds column
        `argsort(g_idx, stable=True)[k]` at place k.

    Casting the module (`.half()`, `.to(dtype)`) changes the bias only; the weight follows the dtype of x, rounded once
    from float32.

    Raises ValueError for shapes that do not fit, quoting them.

    >>> from qlab.formats import IntAffine
    >>> layer = QuantLinear(IntAffine(bits=4, granularity="channel").quantize(torch.tensor([[0.7, -0.3], [0.2, 0.1]])))
    >>> layer, layer(torch.tensor([10.0, 0.0]))
    (QuantLinear((2, 2), IntAffine(bits=4, symmetric, per channel)), tensor([7., 2.]))
    """

    def __init__(
        self,
        qtensor: QTensor,
        bias: Tensor | None = None,
        act_quant: ActQuant | None = None,
        input_scale: Tensor | None = None,
        g_idx: Tensor | None = None,
    ):
        super().__init__()
        if len(qtensor.shape) != 2:
            raise ValueError(f"a linear layer's weight is (out, in), got a QTensor of shape {tuple(qtensor.shape)}")
        self.format, self.shape, self.dtype = qtensor.format, tuple(qtensor.shape), qtensor.dtype
        self.param_names = tuple(qtensor.params)
        out_features, in_features = self.shape
        _check_vector("bias", bias, out_features)
        _check_vector("input_scale", input_scale, in_features)
        _check_vector("g_idx", g_idx, in_features)
        if input_scale is not None and not (input_scale.isfinite() & (input_scale > 0)).all():
            raise ValueError(
                f"input_scale must be finite and above 0, got {float(input_scale.min())} to {float(input_scale.max())}"
            )
        self.register_buffer("packed", qtensor.packed)
        for name, param in qtensor.params.items():
            self.register_buffer(name, param.detach().contiguous())
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.register_buffer("input_scale", None if input_scale is None else input_scale.detach().float())
        self.register_buffer("g_idx", None if g_idx is None else _checked_groups(g_idx))
        self.act_quant = act_quant

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        fmt: Format,
        act_quant: ActQuant | None = None,
        input_scale: Tensor | None = None,
    ) -> "QuantLinear":
        """Round a layer's weight (times `input_scale`, if given) to the nearest codes of `fmt`. Its bias is kept.

        linear: whatever `weight_of` reads: nn.Linear, Conv1D, bitsandbytes' layers, another QuantLinear. Raises TypeError
        for others.
        """
        weight = weight_of(linear)
        if input_scale is not None:
            _check_vector("input_scale", input_scale, weight.shape[1])
            scaled = fmt.quantize(weight.detach().float() * input_scale)
            return cls(replace(scaled, dtype=weight.dtype), linear.bias, act_quant, input_scale)
        return cls(fmt.quantize(weight), linear.bias, act_quant)

    @property
    def qtensor(self) -> QTensor:
        """The stored weight, a view of the buffers."""
        params = {name: getattr(self, name) for name in self.param_names}
        return QTensor(self.format, self.packed, params, torch.Size(self.shape), self.dtype)

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in), weight units, in the dtype it was quantized from or `dtype`: W as it acts on x, input_scale divided
        out."""
        if self.input_scale is None:
            return self._stored_weight(dtype or self.dtype)
        return (self._stored_weight(torch.float32) / self.input_scale).to(dtype or self.dtype)

    def _stored_weight(self, dtype: torch.dtype) -> Tensor:
        weight = dequantize(self.qtensor, dtype)
        return weight if self.g_idx is None else weight[:, self.g_idx.argsort(stable=True).argsort()]

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in), floating point. Returns (…, out) in x's dtype."""
        if x.dim() == 0 or x.shape[-1] != self.shape[1]:
            raise ValueError(
                f"a weight of shape {self.shape} takes x of shape (…, {self.shape[1]}), got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"QuantLinear takes floating-point x, got {x.dtype}")
        if self.input_scale is not None:
            x = (x / self.input_scale).to(x.dtype)
        if self.act_quant is not None:
            x = self.act_quant(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _FrozenLinear.apply(x, bias, self._stored_weight)

    def config(self) -> dict:
        """What `from_config` needs beside the state dict, JSON types only."""
        return {
            "format": format_config(self.format),
            "params": list(self.param_names),
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "act_quant": None if self.act_quant is None else self.act_quant.config(),
            "tensors": {key: list(tensor.shape) for key, tensor in self.state_dict().items()},
        }

    @classmethod
    def from_config(cls, config: dict, tensors: Mapping[str, Tensor]) -> "QuantLinear":
        """The layer that `config()` and `state_dict()` describe. The bias comes back as a Parameter, frozen.

        Raises ValueError, naming the keys, where `tensors` has not exactly the keys and shapes that the config lists.
        """
        listed, given = config["tensors"], {key: list(tensor.shape) for key, tensor in tensors.items()}
        if wrong := sorted(key for key in listed.keys() | given.keys() if listed.get(key) != given.get(key)):
            raise ValueError(
                "the tensors are not those of the config: "
                + ", ".join(f"{key} is {given.get(key, 'missing')}, not {listed.get(key, 'there')}" for key in wrong)
            )
        own = {key: tensor for key, tensor in tensors.items() if not key.startswith("act_quant.")}
        act_quant = None
        if config["act_quant"] is not None:
            act_quant = ActQuant(**config["act_quant"])
            act_quant.load_state_dict(
                {key.removeprefix("act_quant."): tensors[key] for key in tensors.keys() - own.keys()}
            )
        packed, params = own.pop("packed"), {name: own.pop(name) for name in config["params"]}
        fmt, dtype = format_from_config(config["format"]), dtype_from_name(config["dtype"])
        return cls(QTensor(fmt, packed, params, torch.Size(config["shape"]), dtype), act_quant=act_quant, **own)

    def extra_repr(self) -> str:
        parts = [str(self.shape), str(self.format)]
        parts += [name for name in ("bias", "input_scale", "g_idx") if getattr(self, name) is not None]
        return ", ".join(parts)


class _FrozenLinear(torch.autograd.Function):
    """x · Wᵀ + bias for a W that is made anew in backward, where F.linear would keep it from forward to backward."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, weight(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x = grad @ ctx.weight(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum_to_size(grad.shape[-1:]) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


def _check_vector(name: str, tensor: Tensor | None, size: int) -> None:
    if tensor is not None and tuple(tensor.shape) != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(tensor.shape)}")


def _checked_groups(g_idx: Tensor) -> Tensor:
    if g_idx.is_floating_point() or g_idx.min() < 0:
        raise ValueError(
            f"g_idx holds group numbers from 0, got {g_idx.dtype} with a least value of {g_idx.min().item()}"
        )
    sizes = g_idx.bincount()
    if (sizes != sizes[0]).any():
        raise ValueError(f"g_idx puts unequal numbers of columns in its groups: {sizes.tolist()}")
    return g_idx.to(torch.int32)
