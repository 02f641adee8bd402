"""LoRALinear: a frozen layer and the low-rank change of its weight that is trained instead.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1; over a quantized base:
Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, eq. (5); α/√r: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.

    y = W·x + b + scaling · B·(A·dropout(x)),      ΔW = scaling · B·A,      scaling = lora_alpha / r

State dict, all tensors of one layer:

| key | shape, dtype |
|---|---|
| lora_A | (r, in), the adapter's dtype; (r, in / group_size) in a QALoRALinear |
| lora_B | (out, r), the adapter's dtype |
| base.… | the base layer's own |

r, lora_alpha and the other settings are attributes, not tensors: the layer is made anew with them before it is loaded.

Axis legend: out, in = rows and columns of the base weight W; r = rank.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlab.nn import LINEAR_TYPES, shape_of, weight_of


class LoRALinear(nn.Module):
    """A base layer (see `qlab.nn.Base`) that stays as it is, plus B·A, which trains.

    Parameters
    ----------
    base : any layer that `weight_of` reads: nn.Linear, Conv1D, QuantLinear, bitsandbytes' Linear4bit and Linear8bitLt. All
        its parameters are frozen, bias included, and with them whatever is tied to them.
    r : rank, 1 or more.
    lora_alpha : > 0. ΔW = lora_alpha / r · B·A, so that another r needs no other learning rate.
    lora_dropout : share of the adapter's inputs that training sets to 0, in [0, 1). The base sees x without dropout.
    use_rslora : scaling = lora_alpha / √r.
    dtype : of A and B. None: float32, or float64 over float64 weights (PEFT's rule: over 16-bit and quantized weights too).

    A starts uniform in ±1/√in and B at 0, so the layer starts as its base.

    Dtypes as in PEFT, bit for bit: the adapter computes in its own dtype, and y is in the dtype that the base returns. Over
    float weights it is the sum that is rounded to that dtype; over quantized ones the adapter's part is, and then added.

    Raises TypeError for a base that has no weight to read or is an adapter already, ValueError for settings out of range.

    >>> layer = LoRALinear(nn.Linear(6, 4), r=2, lora_alpha=16)
    >>> layer.shape, layer.scaling, [name for name, p in layer.named_parameters() if p.requires_grad]
    ((4, 6), 8.0, ['lora_A', 'lora_B'])
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        lora_alpha: float,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if isinstance(base, LoRALinear):
            raise TypeError(
                f"the base is a {type(base).__name__} already: merge it first, or train the one that is there"
            )
        self.shape = shape_of(base)
        _check_settings(r, lora_alpha, lora_dropout, dtype)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        out_features = self.shape[0]
        a = torch.empty(r, self._columns(base))
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        place = {"device": _device(base), "dtype": dtype or _adapter_dtype(base)}
        self.lora_A = nn.Parameter(a.to(**place))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, **place))
        self.base = base.requires_grad_(False)

    def _columns(self, base: nn.Module) -> int:
        """How many numbers of each input A reads."""
        return self.shape[1]

    @property
    def bias(self) -> Tensor | None:
        """(out,), the base's, or None."""
        return self.base.bias

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [self.lora_A, self.lora_B]

    def delta_weight(self) -> Tensor:
        """ΔW: (out, in), weight units, float32 or wider. Differentiable in A and B."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.lora_B.to(wide) @ self.lora_A.to(wide) * self.scaling

    def dequantized_weight(self) -> Tensor:
        """(out, in), weight units, float32 or wider: W + ΔW, what the layer as a whole does to x."""
        return weight_of(self.base) + self.delta_weight()

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in), floating point. Returns (…, out) in the dtype that the base returns."""
        if x.dim() == 0 or x.shape[-1] != self.shape[1]:
            raise ValueError(
                f"a weight of shape {self.shape} takes x of shape (…, {self.shape[1]}), got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} takes floating-point x, got {x.dtype}")
        y = self.base(x)
        a_x = functional.linear(self._adapter_input(x.to(self.lora_A.dtype)), self.lora_A)
        change = functional.linear(a_x, self.lora_B) * self.scaling
        if not _has_float_weight(self.base):
            change = change.to(y.dtype)
        return (y + change).to(y.dtype)

    def _adapter_input(self, x: Tensor) -> Tensor:
        """What A reads of x (…, in)."""
        return functional.dropout(x, self.lora_dropout, self.training)

    def extra_repr(self) -> str:
        parts = [f"{self.shape}, r={self.r}, lora_alpha={self.lora_alpha}"]
        parts += [f"lora_dropout={self.lora_dropout}"] * (self.lora_dropout > 0) + ["use_rslora"] * self.use_rslora
        return ", ".join(parts)


def _has_float_weight(base: nn.Module) -> bool:
    return isinstance(base, LINEAR_TYPES) and not type(base).__module__.startswith("bitsandbytes.")


def _adapter_dtype(base: nn.Module) -> torch.dtype:
    double = _has_float_weight(base) and base.weight.dtype == torch.float64
    return torch.float64 if double else torch.float32


def _device(base: nn.Module) -> torch.device:
    return next(tensor.device for tensors in (base.parameters(), base.buffers()) for tensor in tensors)


def _check_settings(r: int, lora_alpha: float, lora_dropout: float, dtype: torch.dtype | None) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r is the rank of ΔW, an integer of at least 1, got {r!r}")
    if not 0 < lora_alpha < math.inf:
        raise ValueError(f"lora_alpha must be finite and above 0, got {lora_alpha!r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout is the share of inputs set to 0, in [0, 1), got {lora_dropout!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"A and B train, so they need a floating-point dtype, got {dtype}")
