"""QAT + LoRA: low-rank training that sees the rounding, in three schools that differ in what is rounded.

    Q(·) = fake quantization: rounded in the forward pass, straight through in the backward pass (qlab.qat)

    merged     y = Q(W + ΔW)·x + b                               what a merge will store; Jeon et al., below
    base       y = Q(W)·x + b + scaling · B·(A·dropout(x))       torchtune's recipe
    factors    y = W·x + b + scaling · Q(B)·(Q(A)·dropout(x))

Jeon, Kim and Kim 2024, "L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models", arXiv:2402.04902,
has the first, with learned steps and zero points: method="lsq". ΔW = scaling · B·A, scaling = lora_alpha / r, as in LoRALinear.

Gradients of the merged school: with G = ∂L/∂y · xᵀ, (out, in), and M = 1 where Q did not clip, else 0,

    ∂L/∂B = scaling · (G ∘ M)·Aᵀ,      ∂L/∂A = scaling · Bᵀ·(G ∘ M)

so W + ΔW, its rounding and G are written out for each layer, as in full QAT: only gradients and optimizer states of W are saved.

W never moves. In the base school a grid that is not learned never moves either, so this is QLoRA's LoRALinear over a
QuantLinear, which costs less: there W is codes, and is not rounded anew in each forward.

State dict: lora_A, lora_B as in LoRALinear; base.… those of the base, which is a QATLinear in the merged and the base school.

Axis legend: out, in = rows and columns of W; r = rank.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlab.adapters.lora import LoRALinear
from qlab.formats import Format, QTensor
from qlab.models import Replacement, find_linears
from qlab.models import replace as replace_layers
from qlab.nn import LINEAR_TYPES, QuantLinear, weight_of
from qlab.nn.weights import bitsandbytes_kind
from qlab.qat import METHODS, FakeQuant, QATLinear
from qlab.qat.qat_linear import master_weight

SCHOOLS = ("merged", "base", "factors")
ROUNDINGS = ("ste", "frozen", "learned", "lsq")  # those of qlab.qat that do nothing after an optimizer step


class QATLoRALinear(LoRALinear):
    """A LoRALinear that trains through the rounding of W + ΔW, of W, or of A and B.

    Parameters
    ----------
    base : nn.Linear or Conv1D with float weights; school="factors": any base of a LoRALinear. Half-precision weights are kept
        as a float32 copy in the merged and the base school (see QATLinear).
    r, lora_alpha, lora_dropout, use_rslora, dtype : as in LoRALinear. The merged school reads no A·x, so it has no dropout.
    fmt : the format of what is rounded. Factors: of A (r, in) and of B (out, r), so its groups must divide in and r.
    school : "merged" | "base" | "factors".
    method : where the grid lies, as in `prepare_qat`: "ste" | "frozen" | "learned" | "lsq". The grid starts from W. Learned
        ones train; they are among `qlab.qat.grid_parameters(model)`. Factors: "ste" alone, for B starts at 0.

    B starts at 0, so the merged and the base school start as the rounded base, and factors as the base.

    Raises TypeError for a base without float weights where W is rounded; ValueError for unknown names, and for formats that do
    not fit the shapes.

    >>> from qlab.formats import IntAffine
    >>> layer = QATLoRALinear(nn.Linear(6, 4), r=2, lora_alpha=16, fmt=IntAffine(4, granularity="channel"))
    >>> [name for name, p in layer.named_parameters() if p.requires_grad], layer.convert()
    (['lora_A', 'lora_B'], QuantLinear((4, 6), IntAffine(bits=4, symmetric, per channel), bias))
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        lora_alpha: float,
        *,
        fmt: Format,
        school: str = "merged",
        method: str = "ste",
        **settings,
    ):
        _check_settings(school, method, settings)
        if school != "factors":  # before the base is frozen, so that what is refused stays as it was
            quant = METHODS[method](fmt, master_weight(base).detach())
        super().__init__(base, r, lora_alpha, **settings)
        self.format, self.school = fmt, school
        if school == "factors":
            self.quant_a, self.quant_b = FakeQuant(fmt, self.lora_A), FakeQuant(fmt, self.lora_B)
            return
        self.base = QATLinear(base, quant).requires_grad_(False)
        for parameter in self.grid_parameters():
            parameter.requires_grad_(True)

    def grid_parameters(self) -> list[nn.Parameter]:
        """Learned steps, zero points or levels."""
        return [] if self.school == "factors" else list(self.base.weight_quant.parameters())

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What trains: A and B, and a learned grid."""
        return [*super().adapter_parameters(), *self.grid_parameters()]

    def merged_weight(self) -> Tensor:
        """W + ΔW, all real numbers, nothing rounded: (out, in), weight units, float32 or wider."""
        weight = weight_of(self.base) if self.school == "factors" else self.base.weight
        return weight + super().delta_weight()

    def dequantized_weight(self) -> Tensor:
        """(out, in), weight units, float32 or wider: what the layer as a whole does to x, all rounding included."""
        if self.school == "merged":
            return self.base.weight_quant(self.merged_weight())
        return super().dequantized_weight()

    def delta_weight(self) -> Tensor:
        """(out, in), weight units, float32 or wider: what the layer adds to `weight_of(self.base)`, rounding included.

        Merged: Q(W + ΔW) − Q(W), a step of the grid or more wherever it is not 0. Factors: scaling · Q(B)·Q(A).
        """
        if self.school == "merged":
            return self.dequantized_weight() - weight_of(self.base)
        if self.school == "factors":
            wide = torch.promote_types(self.lora_A.dtype, torch.float32)
            return self.quant_b(self.lora_B).to(wide) @ self.quant_a(self.lora_A).to(wide) * self.scaling
        return super().delta_weight()

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in), floating point. Returns (…, out): merged: in x's dtype, otherwise in the dtype that the base returns."""
        if self.school == "base":
            return super().forward(x)
        if self.school == "factors":
            return self._factors_forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dequantized_weight().to(x.dtype).contiguous(), bias)  # summed as a stored one

    def _factors_forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        a_x = functional.linear(self._adapter_input(x.to(self.lora_A.dtype)), self.quant_a(self.lora_A))
        change = functional.linear(a_x, self.quant_b(self.lora_B)) * self.scaling
        if not isinstance(self.base, LINEAR_TYPES) or bitsandbytes_kind(self.base):
            change = change.to(y.dtype)  # the rounding of LoRALinear
        return (y + change).to(y.dtype)

    def quantized_weight(self) -> QTensor:
        """The integers that train: of W + ΔW (merged) or of W (base), (out, in), with the dtype that the base had.

        Raises ValueError for school="factors".
        """
        if self.school == "factors":
            raise ValueError("school='factors' rounds A and B, not the weight: use quantized_factors()")
        weight = self.merged_weight() if self.school == "merged" else self.base.weight
        return replace(self.base.weight_quant.quantize(weight.detach()), dtype=self.base.dtype)

    def quantized_factors(self) -> tuple[QTensor, QTensor]:
        """The integers that train with school="factors": of A (r, in) and of B (out, r). Raises ValueError for the others."""
        if self.school != "factors":
            raise ValueError(f"school={self.school!r} rounds the weight, not A and B: use quantized_weight()")
        return self.quant_a.quantize(self.lora_A), self.quant_b.quantize(self.lora_B)

    def convert(self) -> nn.Module:
        """The layer as it is stored; its output is this one's in eval mode. Shares lora_A, lora_B and the bias with it.

        merged: a QuantLinear. base: a LoRALinear over a QuantLinear. factors: a LoRALinear over the base whose A and B hold
        the numbers that `quantized_factors` decode to.
        """
        if self.school == "merged":
            return QuantLinear(self.quantized_weight(), self.bias)
        if self.school == "base":
            return self._lora(QuantLinear(self.quantized_weight(), self.bias), self.lora_A, self.lora_B)
        return self._lora(self.base, *(nn.Parameter(q.dequantize()) for q in self.quantized_factors()))

    def _lora(self, base: nn.Module, a: nn.Parameter, b: nn.Parameter) -> LoRALinear:
        settings = {"lora_dropout": self.lora_dropout, "use_rslora": self.use_rslora, "dtype": self.lora_A.dtype}
        layer = LoRALinear(base, self.r, self.lora_alpha, **settings)
        layer.lora_A, layer.lora_B = a, b
        return layer

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.school}, {self.format}"


def convert_qat_lora(model: nn.Module) -> Replacement:
    """Replace every QATLoRALinear of `model`, in place, by what `QATLoRALinear.convert` makes of it.

    `.model` is the model given, or the new layer if it was a single one; `.replaced` is name → new layer. In eval mode the
    outputs are those of training, bit for bit where x has the dtype of training.

    What is left of the base school is an adapter over codes. It is exact as long as it stays unmerged; a merge into the codes
    rounds once more, and training has not seen that rounding: `qlab.adapters.merge(model, "requantize")` reports its cost.

    Raises ValueError for a model without such layers and, naming the layer, for NaN or Inf in W + ΔW, A or B; RuntimeError for
    a step that was learned down to 0. Nothing is changed then.
    """
    layers = find_linears(model, (QATLoRALinear,))
    if not layers:
        raise ValueError(
            "there is no QATLoRALinear in this model: call add_adapters(model, 'qat', …) first, unless it has been converted already"
        )
    made = {}
    for name, layer in layers.items():
        try:
            made[name] = layer.convert()
        except (ValueError, RuntimeError) as error:
            error.add_note(f"while converting the layer {name!r}. Nothing was changed")
            raise
    return replace_layers(model, lambda name, _: name in made, lambda name, _: made[name], types=(QATLoRALinear,))


def _check_settings(school: str, method: str, settings: dict) -> None:
    if school not in SCHOOLS:
        raise ValueError(f"school is one of {', '.join(map(repr, SCHOOLS))}, got {school!r}")
    if method not in ROUNDINGS:
        raise ValueError(f"method is one of {', '.join(map(repr, ROUNDINGS))}, got {method!r}")
    if school == "factors" and method != "ste":
        raise ValueError(
            f"a grid fitted to B at the start fits nothing, for B is 0 there: school='factors' takes method='ste', got {method!r}"
        )
    if school == "merged" and settings.get("lora_dropout"):
        raise ValueError(
            f"school='merged' has no A·x to drop inputs from: leave lora_dropout at 0, got {settings['lora_dropout']}"
        )
