"""ZeroQ: calibration data distilled from what a network's BatchNorm layers remember of its training data.

Cai et al. 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", arXiv:2001.00281, section 3 (distilled data):

    min over x of  Σ_i ‖μ_i(x) − μ_i‖² + ‖σ_i(x) − σ_i‖²

i = 1 … : the BatchNorm layers; μ_i, σ_i = their running mean and standard deviation, μ_i(x), σ_i(x) = those of the batch x where
it enters layer i. i = 0 is x itself, with μ = 0 and σ = 1, for training data are normalised. x starts as Gaussian noise
and is moved by Adam; labels are not needed.

As in the authors' code, each norm is divided by its number of channels, the learning rate starts at 0.5 and falls tenfold
after 100 steps without improvement, and 500 steps are made. Unlike there, statistics are taken over the batch, as in the
equation: the code takes them image by image over the pixels, which vectors do not have.

Axis legend: x = (batch, channels, …); a channel's statistics are over every other axis.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qlab.calibrate import InputStats
from qlab.calibrate.capture import evaluating
from qlab.formats import Format, QTensor
from qlab.nn import ActQuant
from qlab.ptq.method import RTN, Method


class Distilled(NamedTuple):
    """x : the data, of the shape asked for. losses : (steps + 1,) the objective before each step and after the last."""

    x: Tensor
    losses: Tensor


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel: (channels,) both. x: (batch, channels, …).

    Variances are divided by n − 1, as BatchNorm's running ones are.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return x.mean(axes), (x.var(axes) + 1e-6).sqrt()  # the root's slope is infinite at 0


def distance(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Tensor:
    """(‖μ(x) − μ‖² + ‖σ(x) − σ‖²) / channels, ()."""
    return sum((f - w).square().mean() for f, w in zip(found, wanted, strict=True))


def distill(model: nn.Module, shape: tuple[int, ...], steps: int = 500, lr: float = 0.5, seed: int = 0) -> Distilled:
    """A batch of `shape`, (batch, channels, …), whose statistics at each BatchNorm's input are the stored ones.

    model: is called with x alone, in eval mode. Its weights, running statistics, gradients and modes are left as they were.

    Raises ValueError for a model without running statistics, for a shape that it does not take or that leaves a BatchNorm with
    one value per channel, and where a BatchNorm is not reached.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise ValueError(_no_statistics(model))
    if len(shape) < 2 or math.prod(shape[:1] + shape[2:]) < 2:
        raise ValueError(f"shape is (batch, channels, …) with at least 2 values per channel, got {tuple(shape)}")
    like = next(iter(norms.values())).running_mean
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=100, min_lr=1e-4)
    losses = []
    with evaluating(model), torch.enable_grad():
        for step in range(steps + 1):
            loss = _mismatch(model, norms, x)
            losses.append(loss.detach())
            if step < steps:
                (x.grad,) = torch.autograd.grad(loss, [x])  # of x alone: no gradient reaches a weight's .grad
                optimizer.step()
                schedule.step(losses[-1])
    return Distilled(x.detach(), torch.stack(losses).cpu())


class ZeroQ(Method):
    """Codes by another method, calibrated on distilled data where the caller has none.

    shape : of the batch to distill, (batch, channels, …). steps, lr, seed : as in `distill`.
    codes : how the codes are chosen; round to nearest needs no data, so with it the data serve the activations' ranges alone.
    activations : 8 bits, one static range per layer.
    """

    def __init__(
        self, shape: tuple[int, ...], steps: int = 500, lr: float = 0.5, seed: int = 0, codes: Method | None = None
    ):
        self.shape, self.steps, self.lr, self.seed = tuple(shape), steps, lr, seed
        self.codes = RTN() if codes is None else codes
        self.keep = self.codes.keep
        self.activations = ActQuant(8, granularity="tensor", static=True)

    @property
    def norms_only(self) -> bool:
        return self.codes.norms_only

    def check(self, fmt: Format, shape: torch.Size | None = None) -> None:
        self.codes.check(fmt, shape)

    def batches(self, model: nn.Module, calibration: list | None) -> list:
        """The distilled batch, unless there is calibration data."""
        if calibration is not None:
            return calibration
        return [distill(model, self.shape, self.steps, self.lr, self.seed).x]

    def scale(self, weights: list[Tensor], stats: InputStats, formats: list[Format]) -> Tensor | None:
        return self.codes.scale(weights, stats, formats)

    def quantize(self, w: Tensor, fmt: Format, stats: InputStats | None, name: str) -> tuple[QTensor, Tensor | None]:
        return self.codes.quantize(w, fmt, stats, name)


def _mismatch(model: nn.Module, norms: dict[str, _BatchNorm], x: Tensor) -> Tensor:
    """The objective, ()."""
    terms = {"": distance(statistics(x), (x.new_zeros(()), x.new_ones(())))}

    def hook_for(name):
        def hook(norm, args):
            if args[0].numel() < 2 * args[0].shape[1]:
                raise ValueError(
                    f"{name!r} gets one value per channel from x of shape {tuple(x.shape)}: enlarge the batch"
                )
            stored = norm.running_mean, (norm.running_var + 1e-6).sqrt()
            terms[name] = terms.get(name, 0) + distance(statistics(args[0]), stored)

        return hook

    handles = [norm.register_forward_pre_hook(hook_for(name)) for name, norm in norms.items()]
    try:
        model(x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        error.add_note(
            f"while running {type(model).__name__} on noise of shape {tuple(x.shape)}: does it take that shape?"
        )
        raise
    finally:
        for handle in handles:
            handle.remove()
    if missed := norms.keys() - terms.keys():
        raise ValueError(f"x did not reach {', '.join(sorted(missed))}: their statistics cannot be matched")
    return sum(terms.values())


def _no_statistics(model: nn.Module) -> str:
    """Why there is nothing to distill from, and what to do."""
    without = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    why = (
        f"its BatchNorm layers keep no running statistics ({', '.join(without[:3])})"
        if without
        else "it has no BatchNorm layer"
    )
    return (
        f"ZeroQ needs running statistics of the training data, and {type(model).__name__} stores none: {why}. The LayerNorm and "
        "RMSNorm of a transformer compute theirs from each token anew; calibrate on text instead, if need be on text that the "
        "model itself generates (LLM-QAT, arXiv:2305.17888)"
    )
