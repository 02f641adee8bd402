"""Random-weight checkpoints of several architectures, and PEFT adapters trained (that is, filled at random) on them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qlab.models import guard_bitsandbytes

guard_bitsandbytes()
SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TARGETS = {"gpt2": ["c_attn", "mlp.c_proj"]}


def build(architecture, seed=0, **changes):
    torch.manual_seed(seed)
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=32))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES | changes))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES | changes, tie_word_embeddings=architecture == "qwen2-tied"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at 0, which would not show that they are kept
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(architecture, sharded=False, seed=0, dtype=None, **config changes) → a folder with model and tokenizer."""
    made = {}

    def save(architecture, sharded=False, seed=0, dtype=torch.float32, **changes):
        key = (architecture, sharded, seed, dtype, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture) / "base"
            model = build(architecture, seed, **changes).to(dtype)
            model.save_pretrained(folder, **({"max_shard_size": "60KB"} if sharded else {}))
            backend = Tokenizer(models.WordLevel({"<unk>": 0, "w": 1}, unk_token="<unk>"))
            PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
            assert (folder / "model.safetensors.index.json").exists() == sharded
            made[key] = folder
        return made[key]

    return save


def open_model(folder, quant=None, dtype=torch.float32, double_quant=False):
    """The model of a folder, by transformers; quant: what bitsandbytes makes of it."""
    settings = {}
    if quant == "int8":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif quant:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings).eval()


def adapted(model, targets, size=0.05, seed=1, r=3, lora_alpha=7, **settings):
    """A PEFT model with random factors."""
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets, **settings))
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=g).to(parameter.dtype) * size
    return model.eval()


@pytest.fixture(scope="session")
def peft_adapter(checkpoint, tmp_path_factory):
    """peft_adapter(architecture, **settings of adapted) → a folder that PEFT has saved."""
    made = {}

    def save(architecture, **settings):
        key = (architecture, str(settings))
        if key not in made:
            folder = tmp_path_factory.mktemp("adapter")
            targets = settings.pop("targets", TARGETS.get(architecture, ["q_proj", "k_proj", "down_proj"]))
            adapted(open_model(checkpoint(architecture)), targets, **settings).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return save


@pytest.fixture
def opened():
    return open_model


@pytest.fixture
def trained():
    return adapted


@pytest.fixture(scope="session")
def ids():
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))
