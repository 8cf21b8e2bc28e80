"""Model shapes with random weights, for measuring time and memory (never quality)."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)


def shape_config(name: str, positions: int) -> PretrainedConfig:
    """The config of a published model, its trained positions stretched to `positions`."""
    common: dict[str, Any] = {"max_position_embeddings": positions}
    if name == "toy":  # to try a benchmark out, on a CPU too
        return LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
            num_attention_heads=4, num_key_value_heads=2, **common,
        )  # fmt: skip
    if name == "llama-3.1-8b":
        return LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, **common,
        )  # fmt: skip
    if name == "llama-2-7b":
        return LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, **common,
        )  # fmt: skip
    if name == "qwen2.5-7b":
        return Qwen2Config(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, **common,
        )  # fmt: skip
    if name == "mixtral-8x7b":
        return MixtralConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
            **common,
        )  # fmt: skip
    raise SystemExit(f"unknown shape {name!r}; choose llama-3.1-8b, llama-2-7b, qwen2.5-7b or mixtral-8x7b")


def random_model(name: str, positions: int) -> PreTrainedModel:
    """A bf16 model of that shape on the GPU (the toy on a CPU without one), drawn with a fixed seed."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cpu" if name == "toy" and not torch.cuda.is_available() else "cuda"):
            return AutoModelForCausalLM.from_config(shape_config(name, positions)).eval()
    finally:
        torch.set_default_dtype(before)
