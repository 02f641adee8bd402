"""QALoRALinear: LoRA on group sums of the input, so that ΔW is a change of zero points.

Xu et al. 2023, "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models", arXiv:2309.14717, section 3.3
and algorithm 1. The paper sums each group of inputs; its official code averages (AvgPool1d).

    y = W·x + b + scaling · B·(A·pool(x)),      pool(x)ᵢ = Σⱼ xⱼ over the columns j of quantization group i
    ΔWⱼ = scaling · (B·A)ᵢ for every column j of group i;  mean pooling: divided by group_size
    W = scale · (q − zero_point)   ⟹   W + ΔW = scale · (q − (zero_point − ΔW / scale)):  the codes q stay

Axis legend: out, in = rows and columns of the base weight; n = in / group_size, groups of a row.
"""

from torch import Tensor, nn
from torch.nn import functional

from qlab.adapters.lora import LoRALinear
from qlab.nn import QuantLinear

POOLINGS = ("sum", "mean")


class QALoRALinear(LoRALinear):
    """A LoRALinear whose A is (r, n) and reads one number for each quantization group of the input.

    Parameters
    ----------
    base : QuantLinear whose weights share a scale and a floating-point zero point by group of a row:
        IntAffine(bits, symmetric=False, granularity="group", group_size=…, float_zero_point=True).
    pooling : "sum" (the paper) | "mean" (its code). They can reach the same ΔW, but for the same A and B that of mean is
        group_size times smaller, and so are the gradients of A and B.
    r, lora_alpha and the others : as in LoRALinear. Dropout falls on whole groups, after pooling.

    Groups are those of the base: its columns sorted by g_idx where it has one, of x / input_scale where it has that. An
    act_quant of the base rounds what the base reads, but not what A reads until ΔW is merged.

    Raises TypeError for another base, ValueError for a format without zero points that can take ΔW up, naming it.

    >>> import torch
    >>> from qlab.formats import IntAffine
    >>> fmt = IntAffine(4, symmetric=False, granularity="group", group_size=2, float_zero_point=True)
    >>> layer = QALoRALinear(QuantLinear(fmt.quantize(torch.randn(3, 8))), r=2, lora_alpha=4)
    >>> layer.lora_A.shape, layer.zero_point_delta().shape
    (torch.Size([2, 4]), torch.Size([3, 4]))
    """

    def __init__(self, base: QuantLinear, r: int, lora_alpha: float, *, pooling: str = "sum", **settings):
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is 'sum' or 'mean', got {pooling!r}")
        super().__init__(base, r, lora_alpha, **settings)
        self.pooling, self.group_size = pooling, self.shape[1] // self.lora_A.shape[1]

    def _columns(self, base: nn.Module) -> int:
        _check_base(base)
        return base.zero_point.shape[1]

    def _adapter_input(self, x: Tensor) -> Tensor:
        """Pooled: (…, in) → (…, n)."""
        if self.base.input_scale is not None:
            x = (x / self.base.input_scale).to(x.dtype)
        if self.base.g_idx is not None:
            x = x[..., self.base.g_idx.argsort(stable=True)]
        groups = x.unflatten(-1, (-1, self.group_size))
        pooled = groups.sum(-1) if self.pooling == "sum" else groups.mean(-1)
        return functional.dropout(pooled, self.lora_dropout, self.training)

    def _group_delta(self) -> Tensor:
        """(out, n): what ΔW adds to each stored weight of a group."""
        delta = super().delta_weight()
        return delta if self.pooling == "sum" else delta / self.group_size

    def delta_weight(self) -> Tensor:
        """ΔW: (out, in), weight units, float32 or wider, constant within a group but for input_scale."""
        delta = self._group_delta().repeat_interleave(self.group_size, dim=1)
        if self.base.g_idx is not None:
            delta = delta[:, self.base.g_idx.argsort(stable=True).argsort()]
        return delta if self.base.input_scale is None else delta / self.base.input_scale

    def zero_point_delta(self) -> Tensor:
        """(out, n), code units, float32 or wider: the base decoded with zero_point − this is W + ΔW.

        Exact in real numbers; a zero point that is stored in fewer bits rounds it.
        """
        return self._group_delta() / self.base.scale.float()


def _check_base(base: nn.Module) -> None:
    if not isinstance(base, QuantLinear):
        raise TypeError(
            f"QA-LoRA changes the zero points of a QuantLinear, got a {type(base).__name__}: quantize the layer first"
        )
    fmt = base.format
    if not fmt.affine or "zero_point" not in base.param_names:
        why = "has no zero points"
    elif not fmt.float_zero_point:
        why = "has integer zero points, which would round ΔW away"
    elif not fmt.refits:
        why = "has no zero point of its own for each group of inputs"
    else:
        return
    raise ValueError(
        f"QA-LoRA puts ΔW into zero points: {fmt} {why}. Quantize with IntAffine(bits, symmetric=False, "
        "granularity='group', group_size=…, float_zero_point=True)"
    )
