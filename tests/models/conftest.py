"""Tiny random-weight models of the architectures that the suite meets, built from their configs."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 40


def build(architecture):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4}
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **depth, num_key_value_heads=2)).eval()
    if architecture.startswith("qwen2"):
        tied = architecture == "qwen2-tied"
        config = Qwen2Config(**sizes, **depth, num_key_value_heads=2, tie_word_embeddings=tied)
        return Qwen2ForCausalLM(config).eval()
    if architecture == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return GPT2LMHeadModel(config).eval()
    config = BertConfig(**sizes, **depth)
    return (BertForMaskedLM if architecture == "bert-mlm" else BertModel)(config).eval()


@pytest.fixture
def tiny():
    """tiny(architecture) → a model in eval mode: llama, qwen2, qwen2-tied, gpt2 (tied), bert, bert-mlm (tied)."""
    return build


@pytest.fixture(scope="session")
def tokenizer():
    words = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(VOCABULARY - 1))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture
def saved(tmp_path, tokenizer):
    """saved(architecture) → (folder with the model and a tokenizer, the model)."""

    def save(architecture, name="model"):
        model = build(architecture)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return save


@pytest.fixture
def ids():
    return torch.arange(12).reshape(2, 6)
