"""How much the loss suffers when one layer is quantized: the curvature that HAWQ-V2 predicts it from, and the thing itself.

Dong et al. 2019, "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", arXiv:1911.03852, section 2:

    Ω_i = Tr(H_i) / n_i · ‖Q(W_i) − W_i‖²

H_i: Hessian of the loss in the n_i weights of layer i; Tr(H_i) / n_i is the average of its eigenvalues. Half of Ω is the
second-order loss increase of an error of that size in a random direction, at a point where the gradient is 0.

Hutchinson's estimator (section 2 as well) never forms H. For z with entries ±1, each with probability 1/2,

    E[zᵀ H z] = Tr(H),        H z = ∂(gᵀ z) / ∂w,    g = ∂loss / ∂w

One z is drawn for all layers together, so each H z serves them all; what the other layers add to (H z)_i has mean 0.

A *batch* is whatever `loss(model, batch)` takes; the loss meant is the mean over the batches.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qlab.calibrate.capture import evaluating, run
from qlab.formats import Format
from qlab.metrics import mse
from qlab.models import find_linears, find_tied, set_weight, weight_of

Loss = Callable[[nn.Module, Mapping], Tensor]


class TraceEstimate(NamedTuple):
    """mean: average Hessian trace Tr(H) / n, in loss per squared weight unit. standard_error: of it, over the draws of z.

    The batches are taken as given: that other batches have another Hessian is not in the standard error.
    """

    mean: float
    standard_error: float


def model_loss(model: nn.Module, batch: Mapping) -> Tensor:
    """The loss that a transformers model computes itself from the batch's labels, (). Raises ValueError if there is none."""
    loss = getattr(run(model, batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} computed no loss: add labels to the batch, or pass loss=a function of (model, batch)"
        )
    return loss


def hessian_traces(
    model: nn.Module,
    batches: Iterable,
    loss: Loss = model_loss,
    layers: Iterable[str] | None = None,
    samples: int = 32,
    seed: int = 0,
) -> dict[str, TraceEstimate]:
    """name → average Hessian trace of the layer's weight, by Hutchinson's estimator.

    loss: (model, batch) → scalar. Default: what a transformers model computes from the batch's labels.
    layers: names of linear layers; None: those that `quantize_model` takes, all but the output head and tied ones.
    samples: draws of z. Each costs one backward pass through the gradient per batch.

    The model runs in eval mode, and scaled_dot_product_attention by its math kernel, for the fused ones cannot be
    differentiated twice. Modes and requires_grad are put back, after an error too; no .grad is written.
    Memory: one batch's gradients with their graph, and one z.

    Raises ValueError for a layer that is none or whose weight is codes, or on which the loss does not depend, for a loss
    that is not finite, for no batches and for samples < 2.
    """
    if samples < 2:
        raise ValueError(f"a standard error needs at least 2 samples, got {samples}")
    weights = {name: module.weight for name, module in _layers(model, layers).items()}
    seeds = torch.randint(2**62, (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
    forms, count = torch.zeros(samples, len(weights), dtype=torch.float64), 0
    with evaluating(model), torch.enable_grad(), _only(model, weights.values()), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            gradients = _gradients(_finite(loss(model, batch)), weights)
            for row, z_seed in zip(forms, seeds, strict=True):
                row += quadratic_forms(gradients, list(weights.values()), _rademacher(weights.values(), z_seed))
            count += 1
    if not count:
        raise ValueError("no batches: the Hessian is that of a loss on data")
    averages = forms / (count * torch.tensor([w.numel() for w in weights.values()]))
    errors = averages.std(0) / math.sqrt(samples)
    return {
        name: TraceEstimate(mean, error)
        for name, mean, error in zip(weights, averages.mean(0).tolist(), errors.tolist(), strict=True)
    }


def quadratic_forms(gradients: list[Tensor], weights: list[Tensor], z: list[Tensor]) -> Tensor:
    """z_iᵀ (H z)_i of every layer i: (layers,) float64.

    gradients: of the loss in the weights, made with create_graph=True; z: shaped like the weights.
    """
    curved = [k for k, g in enumerate(gradients) if g.requires_grad]  # the others are constant: their rows of H are 0
    forms = torch.zeros(len(weights), dtype=torch.float64)
    if not curved:
        return forms
    try:
        products = torch.autograd.grad(
            *([tensors[k] for k in curved] for tensors in (gradients, weights, z)), retain_graph=True, allow_unused=True
        )
        # H is symmetric: a gradient that depends on weights, none of whose gradients depends on its own weight, cannot be.
        if any(hz is None for hz in products):
            raise RuntimeError("autograd stopped at a backward pass that cannot be differentiated")
    except RuntimeError as error:
        error.add_note(
            "H z differentiates the loss twice, and an operation of this model cannot be. Fused attention kernels are "
            'the usual one: load the model with attn_implementation="eager" or "sdpa"'
        )
        raise
    for k, hz in zip(curved, products, strict=True):
        forms[k] = (z[k] * hz).double().sum()
    return forms


def sensitivities(
    weights: nn.Module | Mapping[str, Tensor],
    formats: Mapping[str, Format | None],
    traces: Mapping[str, TraceEstimate],
) -> dict[str, dict[str, float]]:
    """layer → label → Ω in units of the loss, for every layer of `traces`. Ω / 2 estimates the loss increase.

    weights: the model, or name → (out, in). formats: label → format; None: the weight is kept, Ω = 0.
    Ω is negative where the trace is: there the second-order picture says nothing about harm.

    Raises ValueError for a layer without a weight; a format's own error names layer and label in a note.
    """
    return {
        name: {label: trace.mean * _error(w, fmt, name, label) for label, fmt in formats.items()}
        for (name, w), trace in zip(_named(weights, traces), traces.values(), strict=True)
    }


def sizes(
    weights: nn.Module | Mapping[str, Tensor], formats: Mapping[str, Format | None], layers: Iterable[str]
) -> dict[str, dict[str, int]]:
    """layer → label → bytes as stored, every constant counted. Arguments and errors as in `sensitivities`."""
    return {
        name: {
            label: w.nbytes if fmt is None else _quantized(w, fmt, name, label).nbytes for label, fmt in formats.items()
        }
        for name, w in _named(weights, layers)
    }


def loss_increase(
    model: nn.Module,
    batches: Iterable,
    formats: Mapping[str, Format | None],
    loss: Loss = model_loss,
    layers: Iterable[str] | None = None,
) -> dict[str, dict[str, float]]:
    """layer → label → measured loss with that layer alone rounded to nearest, minus the loss of the float model.

    Arguments and errors as in `hessian_traces`. One pass over the batches per layer and format. The weights are put back
    bit for bit, after an error too.
    """
    batches, modules = list(batches), _layers(model, layers)
    if not batches:
        raise ValueError("no batches: an increase of the loss is measured on data")

    def mean_loss():
        return sum(float(_finite(loss(model, batch))) for batch in batches) / len(batches)

    increases = {name: {} for name in modules}
    with evaluating(model):
        before = mean_loss()
        for name, module in modules.items():
            kept = weight_of(module).detach().clone()
            try:
                for label, fmt in formats.items():
                    w = kept if fmt is None else _quantized(kept, fmt, name, label).dequantize()
                    set_weight(module, w)
                    increases[name][label] = mean_loss() - before
            finally:
                set_weight(module, kept)
    return increases


def _layers(model: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Module]:
    known = find_linears(model)
    if layers is None:
        tied = {parameter.rpartition(".")[0] for names in find_tied(model) for parameter in names}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        names = [name for name, module in known.items() if name not in tied and module is not head]
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
    if not names:
        raise ValueError(
            f"no linear layer to measure: {type(model).__name__} has {len(known)}, and the output head and tied ones count "
            "only where they are named"
        )
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no linear layer of this model; it has {', '.join(list(known)[:5])}, …")
        if not known[name].weight.is_floating_point():
            raise ValueError(
                f"the weight of {name!r} is {known[name].weight.dtype} codes, and a Hessian needs real numbers"
            )
    return {name: known[name] for name in names}


@contextlib.contextmanager
def _only(model: nn.Module, weights: Iterable[Tensor]):
    """Of all parameters only these require a gradient; afterwards each is as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _finite(value: Tensor) -> Tensor:
    if value.dim() or not value.isfinite():
        raise ValueError(f"a loss is one finite number, got {value.detach()}")
    return value


def _gradients(value: Tensor, weights: Mapping[str, Tensor]) -> list[Tensor]:
    tensors = list(weights.values())
    gradients = (None,) * len(tensors)
    if value.requires_grad:
        gradients = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
    if unused := [name for name, gradient in zip(weights, gradients, strict=True) if gradient is None]:
        raise ValueError(f"the loss does not depend on the weight of {', '.join(unused)}: leave it out of `layers`")
    return list(gradients)


def _rademacher(weights: Iterable[Tensor], seed: int) -> list[Tensor]:
    """±1, shaped like each weight. Drawn on the CPU, so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, w.shape, generator=generator).to(w).mul_(2).sub_(1) for w in weights]


def _named(weights: nn.Module | Mapping[str, Tensor], layers: Iterable[str]):
    """(name, weight) of each layer."""
    if isinstance(weights, nn.Module):
        modules = _layers(weights, layers)
        weights = {name: weight_of(module) for name, module in modules.items()}
    for name in layers:
        if name not in weights:
            raise ValueError(f"there is no weight for {name!r}, only for {', '.join(weights) or 'none'}")
        yield name, weights[name].detach()


def _error(w: Tensor, fmt: Format | None, name: str, label: str) -> float:
    """‖Q(W) − W‖², in squared weight units."""
    return 0.0 if fmt is None else mse(w, _quantized(w, fmt, name, label).dequantize(torch.float32)) * w.numel()


def _quantized(w: Tensor, fmt: Format, name: str, label: str):
    try:
        return fmt.quantize(w)
    except (TypeError, ValueError) as error:
        error.add_note(f"while quantizing {name!r} to {label!r}")
        raise
