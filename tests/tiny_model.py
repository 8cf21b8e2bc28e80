"""A random Llama with the embedded model's byte tokenizer, for tests of calibration."""

import shutil

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offload_runtime.model_check import embedded_model

SIZES = {
    "vocab_size": 264, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0,
}  # fmt: skip


def tiny_llama(**changes):
    """G = 2 and head_dim 32, which is not hidden / heads = 12."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "head_dim": 32, "initializer_range": 0.15, **changes})
    return LlamaForCausalLM(config).eval()


def save_tiny_llama(folder):
    """Write tiny_llama() and the tokenizer to a new folder; gives the folder back."""
    tiny_llama().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{embedded_model()}/{name}", folder)
    return folder
