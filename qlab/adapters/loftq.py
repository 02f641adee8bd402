"""LoftQ: start the adapter where it makes up for the rounding of the base, instead of at 0.

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv:2310.08659, algorithm 1:

    A = B = 0
    repeat:   Q = quantize(W − B·A)                    nearest codes, params fitted anew
              B·A = SVD_r(W − dequantize(Q))           the best rank-r matrix; √σ to each factor
    minimizes ‖W − dequantize(Q) − B·A‖ (Frobenius)

The SVD step never raises the error, so one pass is never worse than plain quantization. The quantization step may raise it:
W − B·A gets params of its own, and those fitted to its largest weights are not the best ones. At 4 bits and small ranks the
error falls pass by pass; at 2 bits, or at ranks near the width of W, it soon rises again.

Axis legend: out, in = rows and columns of the weight; r = rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlab.adapters.add import adapters_of
from qlab.adapters.bases import from_stored, holds_codes, qtensor_of, to_stored, with_codes
from qlab.adapters.lora import LoRALinear
from qlab.formats import Format, QTensor
from qlab.formats.base import check_weights
from qlab.nn import weight_of


@dataclass(frozen=True)
class LoftQError:
    """Of one layer: ‖W − …‖ / ‖W‖ in Frobenius norm.

    quantized : of the nearest codes alone, which is where an adapter that starts at 0 starts.
    initialized : of what `loftq_init` left: new codes and B·A, in the dtypes they are kept in.
    """

    quantized: float
    initialized: float


def loftq(w: Tensor, fmt: Format, r: int, iterations: int = 1) -> tuple[QTensor, Tensor, Tensor]:
    """Codes and factors with w ≈ dequantize(Q) + B·A. Returns Q, A: (r, in) and B: (out, r), float32, weight units.

    Parameters
    ----------
    w : (out, in), floating point; it is not changed.
    fmt : any Format that stores it.
    r : rank, 1 to min(out, in).
    iterations : passes of algorithm 1, 1 or more. The last one is returned, as in the paper.

    A direction in which nothing is left to make up for gets 0 in both factors, and then no gradient: a format that stores w
    exactly gives an adapter that cannot train.

    Raises ValueError for a weight that is no matrix and for settings out of range, and what `fmt.quantize` raises.

    >>> from qlab.formats import IntAffine
    >>> q, a, b = loftq(torch.tensor([[0.7, -0.32], [0.22, 0.1]]), IntAffine(bits=4, granularity="channel"), r=2)
    >>> (q.dequantize() + b @ a).allclose(torch.tensor([[0.7, -0.32], [0.22, 0.1]]))
    True
    """
    _check(w, r, iterations)
    return _alternate(w.detach(), fmt, r, iterations, lambda target: target, lambda decoded: decoded)


def loftq_init(
    model: nn.Module, originals: nn.Module | Mapping[str, Tensor], iterations: int = 1
) -> dict[str, LoftQError]:
    """Initialize every LoRALinear of `model` that stands on a quantized base, in place: its codes, lora_A and lora_B.

    Parameters
    ----------
    originals : the model as it was before it was quantized, or name of an adapter → its weight (out, in), float.
    iterations : see `loftq`.

    The factors are divided by √scaling each, so that scaling · lora_B · lora_A is the B·A of `loftq` at any lora_alpha
    (PEFT does not divide: there lora_alpha has to equal r). The codes are the nearest ones in the base's own format,
    whatever method had chosen them; a bitsandbytes base becomes a QuantLinear of the same format. Adapters on float layers
    are left as they are.

    Returns name → errors. Raises, before anything is changed: ValueError where there is no such adapter, an original is
    missing, quantized itself or of another shape, and for settings as `loftq`; TypeError for an adapter whose ΔW is no free B·A.
    """
    layers = {name: layer for name, layer in adapters_of(model).items() if qtensor_of(layer.base) is not None}
    if not layers:
        raise ValueError("no adapter stands on a quantized layer: quantize the model, then call add_adapters on it")
    weights = {name: _original(originals, name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        if type(layer) is not LoRALinear:
            raise TypeError(f"{name!r} is a {type(layer).__name__}: LoftQ initializes a LoRALinear, whose A is (r, in)")
        _check(weights[name], layer.r, iterations)
    return {name: _initialize(layer, weights[name], iterations) for name, layer in layers.items()}


def _alternate(
    w: Tensor,
    fmt: Format,
    r: int,
    iterations: int,
    to_codes: Callable[[Tensor], Tensor],
    from_codes: Callable[[Tensor], Tensor],
) -> tuple[QTensor, Tensor, Tensor]:
    """Algorithm 1. to_codes, from_codes: between w and the weight as the codes hold it (order of columns, input_scale)."""
    wide, target = w.float(), w.float()
    for _ in range(iterations):
        q = fmt.quantize(to_codes(target))
        u, s, vh = torch.linalg.svd(wide - from_codes(q.dequantize(torch.float32)), full_matrices=False)
        root = s[:r].sqrt()
        a, b = root.unsqueeze(1) * vh[:r], u[:, :r] * root
        target = wide - b @ a
    return replace(q, dtype=w.dtype), a, b


@torch.no_grad()
def _initialize(layer: LoRALinear, w: Tensor, iterations: int) -> LoftQError:
    base = layer.base
    old = qtensor_of(base)
    plain = from_stored(base, old.format.quantize(to_stored(base, w.float())).dequantize(torch.float32))
    q, a, b = _alternate(
        w, old.format, layer.r, iterations, lambda t: to_stored(base, t), lambda decoded: from_stored(base, decoded)
    )
    layer.base = with_codes(base, replace(q, dtype=old.dtype)).train(base.training).requires_grad_(False)
    root = layer.scaling**0.5
    layer.lora_A.copy_(a / root)
    layer.lora_B.copy_(b / root)
    return LoftQError(_relative(w, plain), _relative(w, layer.dequantized_weight()))


def _relative(w: Tensor, w_hat: Tensor) -> float:
    return float((w.float() - w_hat).norm() / w.float().norm())


def _original(originals: nn.Module | Mapping[str, Tensor], name: str, layer: LoRALinear) -> Tensor:
    if isinstance(originals, nn.Module):
        originals = dict(originals.named_modules())
    if name not in originals:
        raise ValueError(f"originals has nothing for {name!r}; it has {', '.join(list(originals)[:5]) or 'nothing'}")
    w = originals[name]
    if isinstance(w, nn.Module):
        if holds_codes(w):
            raise ValueError(f"the original of {name!r} is quantized itself: pass the model as it was before")
        w = weight_of(w)
    w = w.detach()
    if tuple(w.shape) != tuple(layer.shape):
        raise ValueError(f"the original of {name!r} must have the shape {tuple(layer.shape)}, got {tuple(w.shape)}")
    return w.to(layer.lora_A.device)


def _check(w: Tensor, r: int, iterations: int) -> None:
    check_weights(w)
    if w.dim() != 2:
        raise ValueError(f"LoftQ takes a matrix (out, in), got a weight of shape {tuple(w.shape)}")
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= min(w.shape):
        raise ValueError(f"r must be an integer from 1 to min(out, in) = {min(w.shape)}, got {r!r}")
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1, got {iterations!r}")
