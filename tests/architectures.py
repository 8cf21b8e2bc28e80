"""Tiny random models of many families, each with what sets the family apart switched on."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from .models import VOCABULARY

WINDOW = 24  # shorter than every test's prompt, so that sliding layers slide
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # sharper than the default, so that selection matters
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 32}  # other than hidden / heads = 12
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LONG = [1.0 + i for i in range(3)]  # longrope factors of Phi-3's 6 rotary dimensions
EXPERTS = {"num_experts_per_tok": 2}

# name: (config class, what to set besides BASE)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2, MHA": ("LlamaConfig", {"num_key_value_heads": 4, "num_hidden_layers": 2}),
    "llama3 rope": (
        "LlamaConfig",
        HEAD | {
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral, full": ("MistralConfig", HEAD | {"sliding_window": None}),
    "mistral, sliding": ("MistralConfig", HEAD | {"sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", HEAD | EXPERTS | {"num_local_experts": 4, "num_key_value_heads": 1}),
    "qwen2, biases": ("Qwen2Config", {"num_hidden_layers": 4, "use_sliding_window": False}),
    "qwen2, sliding": (
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen2.5, yarn": (
        "Qwen2Config",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("Qwen3Config", HEAD),
    "qwen3 moe": ("Qwen3MoeConfig", HEAD | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32}),
    "phi3": ("Phi3Config", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
    "phi4, partial rotary": (
        "Phi3Config",
        {
            "num_key_value_heads": 1, "hidden_size": 64,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ),
    "phi3, longrope": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6,
                "long_factor": LONG + LONG, "original_max_position_embeddings": 64,
            },
        },
    ),
    "gemma2": (
        "Gemma2Config",
        HEAD | {"sliding_window": WINDOW, "query_pre_attn_scalar": 20, "num_hidden_layers": 4,
                "layer_types": MIXED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        HEAD | {"sliding_window": WINDOW, "query_pre_attn_scalar": 20, "num_hidden_layers": 4,
                "layer_types": MIXED,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                }},
    ),
    "smollm3, NoPE": ("SmolLM3Config", {"no_rope_layers": [1, 1, 0, 1], "num_hidden_layers": 4}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5,
         "logits_scaling": 2.0},
    ),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 2}),
    "gpt-oss": (
        "GptOssConfig",
        HEAD | EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW, "num_hidden_layers": 4,
                          "layer_types": MIXED},
    ),
    "glm4": (
        "Glm4Config",
        HEAD | {"attention_bias": True,
                "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default",
                                    "partial_rotary_factor": 0.5}},
    ),
}  # fmt: skip


def random_model(name: str, device: torch.device | str = "cpu", **changes: Any) -> PreTrainedModel:
    """The family's tiny model in float32, with every parameter drawn at random (biases and sinks too)."""
    class_name, settings = FAMILIES[name]
    torch.manual_seed(11)
    config = getattr(transformers, class_name)(**{**BASE, **settings, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "bias" in parameter_name or "sinks" in parameter_name:
                parameter.normal_(std=0.5)
    return model.to(device)
