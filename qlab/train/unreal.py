"""Models without memory: built, quantized, given adapters and trained by the real code, on tensors that have shapes only.

They are torch's FakeTensors, with device and dtype, so that casts, attention kernels and saved tensors are those of a real run:

    with without_memory() as fake:
        net = prepared(build(config, torch.bfloat16, fake), "qlora", NF4(), r=16)

A check that asks for a value gets 1: see `_NoValues`. The one thing that is not the run's own is how a QuantLinear writes its weight
out: the tables that decode codes are cached for all models, and must stay real.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from qlab.adapters import adapters_of, add_adapters, bitfit
from qlab.formats import NF4, Format, IntAffine, QTensor
from qlab.formats.codebook import BlockCodebook
from qlab.models import locate, replace, shape_of
from qlab.nn import QuantLinear
from qlab.nn.weights import bitsandbytes_kind
from qlab.ptq.quantize import formats_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

METHODS = {"lora": "lora", "qlora": "lora", "qalora": "qalora", "qat-lora": "qat", "bitfit": ""}  # → kind of adapter
# Touvron et al. 2023, arXiv:2307.09288, and the published configs: hidden, intermediate, layers, heads, key-value heads.
LLAMA_2 = {"7B": (4096, 11008, 32, 32, 32), "13B": (5120, 13824, 40, 40, 40), "70B": (8192, 28672, 80, 64, 8)}
DEPTH = 3  # layers of a stack of equal ones; what one more holds is what each of the others does
LLAMA_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@contextmanager
def without_memory() -> Iterator[FakeTensorMode]:
    """Inside, every new tensor is one without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _NoValues():
        yield fake


def config_of(model: "PretrainedConfig | str | Path") -> "PretrainedConfig":
    """Of "7B", "13B" or "70B" (Llama 2's shapes), a folder or a Hub id; a config as it is. Raises what `locate` raises."""
    from transformers import AutoConfig, LlamaConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    if str(model) in LLAMA_2:
        sizes = dict(zip(LLAMA_SIZES, LLAMA_2[str(model)], strict=True))
        return LlamaConfig(vocab_size=32000, dtype=torch.bfloat16, **sizes)
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        source = locate(model)
        folder = source.folder or source.name
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def base_format(method: str, bits: int | None, group_size: int, block_size: int, double_quant: bool) -> Format | None:
    """How the method stores linear layers; None: in floating point."""
    if method == "lora" or bits is None:
        return None
    if method in ("qlora", "bitfit") and bits == 4:
        return NF4(block_size, double_quant)
    return IntAffine(bits, symmetric=False, granularity="group", group_size=group_size, float_zero_point=True)


def named(names: str | Iterable[str]) -> tuple[str, ...]:
    """One name, or several."""
    return (names,) if isinstance(names, str) else tuple(names)


class _NoValues(TorchDispatchMode):
    """Tensors without memory have no values: where code asks for one it gets 1, so that checks pass, and equal ones are equal."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            return True
        return func(*args, **(kwargs or {}))


def refuse_prepared(source: "nn.Module | PretrainedConfig") -> None:
    """ValueError for a base that has been quantized or has adapters already."""
    if not isinstance(source, nn.Module):
        found = ["quantization_config"] if getattr(source, "quantization_config", None) else []
    else:
        modules = source.named_modules()
        codes = [name for name, module in modules if bitsandbytes_kind(module) or isinstance(module, QuantLinear)]
        found = [*adapters_of(source), *codes]
    if found:
        raise ValueError(
            f"the base is taken as it was before the run, and this one has adapters or codes already ({found[0]}): take its "
            "float original, or measure() it"
        )


def build(source: "nn.Module | PretrainedConfig", dtype: torch.dtype | None, fake: FakeTensorMode) -> nn.Module:
    """A copy of a model, or the model of a config, on the CPU. dtype None: its own; a config without one: float32."""
    if isinstance(source, nn.Module):
        with FakeCopyMode(fake):
            net = copy.deepcopy(source)
        return _cast(net, dtype)
    return _auto_class(source).from_config(source, dtype=dtype or source.dtype or torch.float32)


def _cast(net: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """On the CPU, floating-point parameters in `dtype`, as a load in it has them: buffers keep theirs, tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in net.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in made:
                    parameter = isinstance(old, nn.Parameter)
                    new = old.detach().to("cpu", dtype if parameter and old.is_floating_point() else None)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if parameter else new
                held[name] = made[id(old)]
    return net


def _auto_class(config: "PretrainedConfig"):
    """A causal LM where the config names one, or could be nothing else; otherwise an encoder without a head."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if named := set(config.architectures or ()):
        return AutoModelForCausalLM if named & set(causal.values()) else AutoModel
    kind = config.model_type
    return AutoModelForCausalLM if kind in causal and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES else AutoModel


def has_equal_layers(source: "nn.Module | PretrainedConfig", target_modules) -> bool:
    """True for a config of more than DEPTH + 1 layers, all of one kind, none of which `target_modules` tells apart."""
    if isinstance(source, nn.Module) or len(set(getattr(source, "layer_types", None) or ())) > 1:
        return False
    by_number = any(re.search(r"\d", name) for name in named(target_modules))
    return not by_number and getattr(source, "num_hidden_layers", 0) > DEPTH + 1


def shallow(config: "PretrainedConfig", depth: int) -> "PretrainedConfig":
    """The same with `depth` layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    return config


def prepared(
    net: nn.Module,
    method: str,
    fmt: Format | None,
    r: int = 8,
    target_modules: str | Iterable[str] = "all-linear",
    exclude_modules: str | Iterable[str] = (),
    head: tuple[str, ...] = (),
    **settings,
) -> nn.Module:
    """What the method makes of the base, in place: layers quantized, adapters added, everything else frozen.

    fmt : of the codes; qat-lora: of the rounding; None: floating point. head: ends of names of modules that train in full.
    settings : of `add_adapters` or `bitfit`; rounding: the method of QATLoRALinear.
    """
    if fmt is not None and method != "qat-lora":
        _quantize(net, fmt, head)
    if method == "bitfit":
        return bitfit(net, head=head, **{"new_biases": True} | settings).model
    if method == "qat-lora":
        settings = {"method": settings.pop("rounding", "ste"), "fmt": fmt} | settings
    adapted = add_adapters(
        net, METHODS[method], r, 2 * r, target_modules, _also(exclude_modules, head), **settings
    ).model
    for name, module in adapted.named_modules():
        if _ends_so(name, head):
            module.requires_grad_(True)
    return adapted


def _also(excluded: str | Iterable[str], head: tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(excluded, str) and head:
        return rf"(?:{excluded})|(?:.*\.)?(?:{'|'.join(map(re.escape, head))})"
    return excluded if isinstance(excluded, str) else (*excluded, *head)


def _ends_so(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _quantize(net: nn.Module, fmt: Format, head: tuple[str, ...]) -> None:
    """The layers that `quantize_model` takes, in `fmt`, without values."""
    output = getattr(net, "get_output_embeddings", lambda: None)()
    formats, _ = formats_of(net, fmt, lambda name, layer: layer is not output and not _ends_so(name, head))
    made: dict[tuple, QTensor] = {}

    def make(name: str, layer: nn.Module) -> QuantLinear:
        shape, dtype = shape_of(layer), layer.weight.dtype
        if (shape, dtype) not in made:
            with unset_fake_temporarily():  # the tables that decode codes are cached, and must stay real
                q = made[shape, dtype] = fmt.quantize(torch.empty(shape, dtype=dtype, device="meta"))
                q.dequantize()  # makes the tables now, for they are not of the step
        return _unreal_linear(made[shape, dtype], layer.bias)

    replace(net, list(formats), make)


def _unreal_linear(q: QTensor, bias: nn.Parameter | None) -> QuantLinear:
    """A QuantLinear of the shapes of `q`, which is on the meta device, with the memory that decoding takes."""
    params = {name: _unreal_like(param) for name, param in q.params.items()}
    layer = QuantLinear(QTensor(q.format, _unreal_like(q.packed), params, q.shape, q.dtype), bias)

    def decoded(dtype: torch.dtype) -> Tensor:
        if isinstance(
            q.format, BlockCodebook
        ):  # tile by tile: beside the result there is only the absmax of every block
            beside = torch.empty(q.format.double_quant * -(-q.shape.numel() // q.format.block_size))
        else:
            with unset_fake_temporarily():
                beside = q.dequantize(dtype)[:0].clone()
        weight = torch.empty(q.shape, dtype=dtype)
        del beside
        return weight

    layer._stored_weight = decoded
    return layer


def _unreal_like(t: Tensor) -> Tensor:
    """t without memory, with a storage as large as that of t, which can be a part of it."""
    whole = torch.empty(t.untyped_storage().nbytes() // t.itemsize, dtype=t.dtype)
    return whole[: t.numel()].view(t.shape)


def training_loss(net: nn.Module, batch_size: int, tokens: int) -> Tensor:
    """That of a padded batch: of the next token, of a label, or, for an encoder without a head, a sum."""
    ids = torch.zeros(batch_size, tokens, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    accepted = inspect.signature(net.forward).parameters
    inputs |= {"use_cache": False} if "use_cache" in accepted else {}
    if "labels" in accepted:
        return net(**inputs, labels=ids).loss
    out = net(**inputs)
    if isinstance(out, Tensor):
        return nn.functional.cross_entropy(out, torch.zeros(batch_size, dtype=torch.long))
    return out.last_hidden_state.sum()
