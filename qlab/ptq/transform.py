"""Which layers share an input, and where a scale on that input can be folded away.

SmoothQuant and AWQ divide an input by s and multiply the weights that read it by s. The division costs nothing where the
input is the output of a norm and of nothing else: y = weight · x̂ + bias, so weight / s and bias / s give y / s. Where
something beside those layers reads the norm's output (the residual of a BERT layer), or no norm makes it (the inputs of
o_proj and down_proj), the scale stays with the layers as their `input_scale`.

    Llama   input_layernorm → q, k, v    folded        o_proj, down_proj    kept
    BERT    LayerNorm → q, k, v, + x     kept

Nothing is known by name here: one forward is recorded.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qlab.calibrate.capture import evaluating, run
from qlab.models import find_tied


@dataclass(frozen=True)
class InputGroup:
    """Layers that are fed the very same tensor.

    names : in the order in which the forward reaches them.
    norm : the module into which a scale on their input can be folded, or None.
    after_norm : whether their input is what a norm gives, be it folded into or not.
    calls : how often a forward reaches each of them.
    """

    names: tuple[str, ...]
    norm: str | None = None
    after_norm: bool = False
    calls: int = 1


def input_groups(model: nn.Module, batch, names: Iterable[str]) -> list[InputGroup]:
    """The named layers in groups, in the order in which one forward on `batch` reaches them.

    Raises ValueError for layers that the batch does not reach, naming them.
    """
    names = list(names)
    recorder = _Recorder(model, names)
    groups: dict[tuple[int, ...], list[str]] = {}
    with evaluating(model):
        with recorder:
            recorder.uses(run(model, batch))
        if missed := [name for name in names if name not in recorder.inputs]:
            raise ValueError(
                f"the first calibration batch does not reach {', '.join(missed)}: leave them out of `select`"
            )
        for name, inputs in recorder.inputs.items():
            groups.setdefault(tuple(map(id, inputs)), []).append(name)
        return [
            InputGroup(
                tuple(group),
                recorder.norm_of(ids[0]) if len(ids) == 1 else None,
                all(tensor_id in recorder.norms for tensor_id in ids),
                len(ids),
            )
            for ids, group in groups.items()
        ]


def fold(model: nn.Module, norm: str, scale: Tensor) -> None:
    """Divide the output of the module `norm` by scale, (in,), by way of its weight and bias. In place."""
    module = model.get_submodule(norm)
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.copy_(parameter.double() / scale.to(parameter.device))


@dataclass
class _Call:
    """One call of a module that may be a norm. Tensors are held, so that no other one gets their id."""

    name: str
    args: tuple
    kwargs: dict
    output: Tensor


@dataclass
class _Recorder(TorchFunctionMode):
    """Watches a forward: what the named layers are fed, what norms give, and what else computes with that."""

    model: nn.Module
    names: list[str]
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    norms: dict[int, _Call] = field(default_factory=dict)
    used: Counter = field(default_factory=Counter)

    def __post_init__(self):
        super().__init__()
        self.inside = 0  # how many of the named layers are running
        self.handles = []

    def __enter__(self):
        for name in self.names:
            layer = self.model.get_submodule(name)
            self.handles.append(layer.register_forward_pre_hook(self._enters(name), with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self._leaves, always_call=True))
        for name, module in self.model.named_modules():
            weight = vars(module).get("_parameters", {}).get("weight")
            if weight is not None and weight.dim() == 1:
                self.handles.append(module.register_forward_hook(self._gives(name), with_kwargs=True))
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)

    def _enters(self, name):
        def hook(module, args, kwargs):
            self.inside += 1
            self.inputs.setdefault(name, []).append(next(_tensors((args, kwargs))))

        return hook

    def _leaves(self, module, args, output):
        self.inside -= 1

    def _gives(self, name):
        def hook(module, args, kwargs, output):
            if isinstance(output, Tensor):
                self.norms[id(output)] = _Call(name, args, kwargs, output)

        return hook

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.inside and next(_tensors(result), None) is not None:  # x.shape and the like read no values
            self.uses((args, kwargs))
        return result

    def uses(self, values) -> None:
        """Count the norm outputs among `values`. Only those are held, so only their ids stay their own."""
        self.used.update(id(tensor) for tensor in _tensors(values) if id(tensor) in self.norms)

    def norm_of(self, tensor_id: int) -> str | None:
        """The module whose output is that tensor, if a scale can be folded into it."""
        call = self.norms.get(tensor_id)
        if call is None or self.used[tensor_id]:
            return None
        calls = sum(other.name == call.name for other in self.norms.values())
        own = {f"{call.name}.{name}" for name, _ in self.model.get_submodule(call.name).named_parameters()}
        tied = any(own.intersection(group) for group in find_tied(self.model))
        return call.name if calls == 1 and not tied and self._divides(call) else None

    @torch.no_grad()
    def _divides(self, call: _Call) -> bool:
        """Whether dividing the module's parameters divides its output: not so where it computes with 1 + weight."""
        module = self.model.get_submodule(call.name)
        width = call.output.shape[-1]
        own = dict(module.named_parameters())
        if any(parameter.shape != (width,) for parameter in own.values()):
            return False
        scale = torch.linspace(0.5, 2, width, device=call.output.device)
        divided = {name: (parameter / scale).to(parameter.dtype) for name, parameter in own.items()}
        output = torch.func.functional_call(module, divided, call.args, call.kwargs)
        expected, tolerance = call.output.float() / scale, 16 * torch.finfo(call.output.dtype).eps
        return bool(
            ((output - expected).abs() <= tolerance * (expected.abs() + call.output.float().abs().amax())).all()
        )


def _tensors(value):
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)
