"""Load a model and its tokenizer: safetensors only, no code from the model's folder, eval mode, no noise.

The tiers, and what is checked in each, are in sources.py.
"""

import contextlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub.utils
import torch
import transformers.utils.logging

from qlab.models.guard import guard_bitsandbytes
from qlab.models.quantized import is_quantized_folder, open_quantized
from qlab.models.sources import download, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    name_or_path: str | Path = "qlab-mini",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization_config=None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """(model, tokenizer), the model in eval mode on `device` with its floating-point weights in `dtype`.

    Causal LMs come with their head (AutoModelForCausalLM), BERT-type encoders without one (AutoModel). The
    bitsandbytes guard goes on first, so a folder saved in 4 bit is safe to evaluate. A folder that `save_quantized` wrote comes
    back with its QuantLinear layers; their weights follow the dtype of what they are multiplied with.

    quantization_config : transformers' (BitsAndBytesConfig), which then quantizes tensor by tensor on `device`: the whole model is
        never in memory in floating point.

    Raises what `locate` and `open_quantized` raise; ValueError for a device that is not there, a `dtype` that is not floating
    point, an architecture that is neither, and a checkpoint that lacks weights.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device="{device}", but torch finds no CUDA device here: use device="cpu"')
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: pass a floating-point torch dtype, such as torch.float32 or torch.bfloat16")
    guard_bitsandbytes()
    source = locate(name_or_path)
    with quiet():
        # This imports every quantization library that is installed, with its notices: so inside quiet().
        from transformers import AutoTokenizer

        folder = download(source)
        safe = {"local_files_only": True, "trust_remote_code": False}
        if is_quantized_folder(folder):
            model = open_quantized(folder, device, dtype)
            return model, AutoTokenizer.from_pretrained(folder, config=model.config, **safe)
        auto_class = _auto_class(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        if quantization_config is not None:  # places the weights by itself
            safe |= {"quantization_config": quantization_config, "device_map": {"": device}}
        model, report = auto_class.from_pretrained(
            folder, use_safetensors=True, dtype=dtype, output_loading_info=True, **safe
        )
    _refuse_random_weights(model, report)
    return (model if quantization_config is not None else model.to(device)).eval(), tokenizer


def _auto_class(folder):
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto import modeling_auto

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = set(config.get("architectures") or ())
    if named & set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return AutoModelForCausalLM
    encoders = (
        modeling_auto.MODEL_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    )
    if any(named & set(mapping.values()) for mapping in encoders):
        return AutoModel
    raise ValueError(
        f"config.json of {folder.name} names the architectures {sorted(named) or 'none'}: qlab loads causal "
        "LMs and BERT-type encoders. Load a model with another head through its own transformers class"
    )


def _refuse_random_weights(model, report):
    """transformers fills weights that the file lacks with random numbers and goes on: refuse that."""
    missing = set(report["missing_keys"])
    pooler = {name for name in missing if name.startswith("pooler.")}
    if pooler:
        model.pooler = None  # checkpoints of masked LMs have none; without it the token outputs are unchanged
    if lost := sorted(missing - pooler) + [str(key) for key in report["mismatched_keys"]]:
        raise ValueError(
            f"the checkpoint lacks {len(lost)} weight(s) of {type(model).__name__}, or has another shape for "
            f"them: {', '.join(lost[:5])}{', …' if len(lost) > 5 else ''}. They would be random numbers"
        )


@contextlib.contextmanager
def quiet():
    """No progress bars and no log lines below ERROR during a load; what was set before comes back."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    hub_bars = not huggingface_hub.utils.are_progress_bars_disabled()
    disabled = logging.root.manager.disable
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        if hub_bars:
            huggingface_hub.utils.enable_progress_bars()
        if bars:
            transformers.utils.logging.enable_progress_bar()
