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

from offload_runtime.errors import UserError

SHAPES = ("llama-3.1-8b", "llama-2-7b", "qwen2.5-7b", "mixtral-8x7b", "tiny", "toy")


def check_shape(name: str) -> None:
    """UserError for a shape there is not."""
    if name not in SHAPES:
        raise UserError(f"unknown shape {name!r}; choose one of {', '.join(SHAPES)}")


def shape_config(name: str, positions: int) -> PretrainedConfig:
    """The config of a published model, its trained positions stretched to `positions`; sizes as published.

    tiny is the shape of the model that ships here, tiny-256k.
    """
    check_shape(name)
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
    return LlamaConfig(
        vocab_size=264, hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True, **common,
    )  # fmt: skip


def shape_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where 16-bit products are slow."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_model(name: str, positions: int, device: str | None = None) -> PreTrainedModel:
    """A model of that shape on the device, the GPU if there is one; weights drawn with a fixed seed."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape_dtype(place))
    try:
        with place:
            return AutoModelForCausalLM.from_config(shape_config(name, positions)).eval()
    finally:
        torch.set_default_dtype(before)
