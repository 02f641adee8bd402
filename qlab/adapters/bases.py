"""What a merge has to know of a base layer: its codes as a QTensor, how its own library quantizes it anew, what replaces it.

| base | `qtensor_of` | requantized as |
|---|---|---|
| QuantLinear | its own | the same format, activation quantizer, input_scale and order of columns |
| bitsandbytes Linear4bit | NF4 or FP4 | bitsandbytes does, with the layer's own settings |
| bitsandbytes Linear8bitLt | IntAffine(8), per channel | bitsandbytes does, from float16 |
| nn.Linear, Conv1D, other bases | None | not at all: they hold no codes |

On CPUs with AVX512 bitsandbytes decodes 4-bit weights wrongly where blocks do not divide the rows, in the layer's forward and
so in PEFT's merge. Here they are decoded as they were encoded, and a merge differs from those two by that much.

Axis legend: out, in = rows and columns of a weight.
"""

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlab.adapters.merge_weight import merge_requantize, stochastic_codes
from qlab.formats import IntAffine, QTensor
from qlab.nn import QuantLinear, weight_of
from qlab.nn.weights import bitsandbytes_kind, qtensor_4bit, quant_state, row_absmax


def holds_codes(layer: nn.Module) -> bool:
    """True for a layer that `qtensor_of` reads: it is quantized, and not only going to be."""
    kind = bitsandbytes_kind(layer)
    if kind == "Linear4bit":
        return quant_state(layer) is not None
    return layer.weight.dtype == torch.int8 if kind else isinstance(layer, QuantLinear)


def qtensor_of(layer: nn.Module) -> QTensor | None:
    """The codes of a layer with all that decodes them; None where it stores no codes.

    (out, in), as stored: the columns of a QuantLinear in the order of its g_idx, and its weight times input_scale.
    """
    if not holds_codes(layer):
        return None
    if isinstance(layer, QuantLinear):
        return layer.qtensor
    if bitsandbytes_kind(layer) == "Linear4bit":
        return qtensor_4bit(layer)
    fmt, codes = IntAffine(8), layer.weight.data
    return QTensor(fmt, fmt.pack(codes), {"scale": row_absmax(layer) / 127}, codes.shape, torch.float32)


def base_weight(layer: nn.Module) -> Tensor:
    """(out, in), weight units, float32 or wider: the weight as it acts on the layer's input."""
    if isinstance(layer, QuantLinear):
        return layer.dequantized_weight(torch.promote_types(layer.dtype, torch.float32))
    weight = weight_of(layer).detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def float_layer(weight: Tensor, base: nn.Module, conv1d: bool) -> nn.Module:
    """An nn.Linear, or transformers' Conv1D, of a weight (out, in), frozen, with the bias of `base` in the weight's dtype."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        layer = Conv1D(out_features, in_features) if conv1d else nn.Linear(in_features, out_features, bias=False)
    layer.weight = nn.Parameter((weight.T if conv1d else weight).contiguous(), requires_grad=False)
    bias = base.bias
    if bias is None and conv1d:  # its forward adds one
        bias = nn.Parameter(weight.new_zeros(out_features), requires_grad=False)
    if bias is not None and bias.dtype != weight.dtype:
        bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    layer.bias = bias
    return layer


def with_codes(base: nn.Module, q: QTensor) -> QuantLinear:
    """A QuantLinear of `q` in the place of a quantized base: its bias, and what else a QuantLinear has."""
    if isinstance(base, QuantLinear):
        return QuantLinear(q, base.bias, base.act_quant, base.input_scale, base.g_idx)
    return QuantLinear(q, base.bias)


def requantized(base: nn.Module, delta: Tensor, generator: torch.Generator | None = None) -> nn.Module:
    """A layer of the same class and settings that holds the weight of `base` + delta, quantized anew. `base` stays as it is.

    delta: (out, in), weight units. generator: None: nearest codes; given: stochastic rounding, see `stochastic_codes`.
    On bitsandbytes' layers and None the result is that of PEFT's merge, bit for bit.
    """
    if isinstance(base, QuantLinear):
        return with_codes(base, merge_requantize(base.qtensor, to_stored(base, delta), generator))
    make = _requantized_4bit if bitsandbytes_kind(base) == "Linear4bit" else _requantized_8bit
    new, target = make(base, delta)
    if generator is not None:
        q = qtensor_of(new)
        codes = stochastic_codes(q.format, target, q.params, generator)
        packed = codes if codes.dtype == torch.int8 else q.format.pack(codes)
        new.weight.data.view(packed.dtype).view(packed.shape).copy_(packed)
    return new


def to_stored(layer: nn.Module, delta: Tensor) -> Tensor:
    """delta (out, in) for the weight as the QTensor of `layer` holds it: times input_scale, columns in the order of g_idx."""
    if not isinstance(layer, QuantLinear):
        return delta
    if layer.input_scale is not None:
        delta = delta * layer.input_scale
    return delta if layer.g_idx is None else delta[:, layer.g_idx.argsort(stable=True)]


def from_stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of `to_stored`."""
    if not isinstance(layer, QuantLinear):
        return weight
    if layer.g_idx is not None:
        weight = weight[:, layer.g_idx.argsort(stable=True).argsort()]
    return weight if layer.input_scale is None else weight / layer.input_scale


def _requantized_4bit(base: nn.Module, delta: Tensor) -> tuple[nn.Module, Tensor]:
    """The new layer, and the (out, in) weight that was quantized: in the wider dtype of both, as PEFT adds them."""
    old, new = base.weight, _twin(base)
    target = weight_of(base).detach() + delta
    new.weight = type(old)(
        target,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=new,
    ).to(old.device)
    return new, target


def _requantized_8bit(base: nn.Module, delta: Tensor) -> tuple[nn.Module, Tensor]:
    from bitsandbytes.functional import int8_vectorwise_dequant  # · 1/127, rounded: not quite our scale = absmax / 127

    old, new = base.weight, _twin(base)
    target = int8_vectorwise_dequant(old.data, row_absmax(base)).to(delta.dtype) + delta
    # Quantizing is what `to` does with weights that come from the CPU.
    new.weight = type(old)(target.cpu(), requires_grad=False, has_fp16_weights=old.has_fp16_weights).to(old.device)
    new.state = copy.copy(base.state)
    new.state.reset_grads()
    return new, target


def _twin(layer: nn.Module) -> nn.Module:
    """A shallow copy whose parameters can be set without changing those of `layer`."""
    twin = copy.copy(layer)
    twin._parameters = dict(layer._parameters)
    return twin
