"""Which models are refused, and why, from their configs alone."""

import pytest
from transformers import CONFIG_MAPPING

from offload_runtime.errors import UserError
from offload_runtime.model_check import check_config

SUPPORTED = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt_oss"]
REFUSED = [
    ("bart", "encoder-decoder"),
    ("mamba", "state-space"),
    ("rwkv", "no attention heads"),
    ("qwen3_next", "linear-attention"),
    ("jamba", "state-space"),
    ("deepseek_v3", "MLA"),
    ("llama4_text", "chunked_attention"),
    ("gemma3n_text", "not their own"),
    ("mimo_v2_flash", "another head size"),
    ("gpt2", "RoPE"),
    ("bloom", "RoPE"),
    ("vit", "RoPE"),
]


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name: str) -> None:
    shape = check_config(CONFIG_MAPPING[name]())
    assert shape.layers > 0
    assert shape.query_heads % shape.kv_heads == 0


@pytest.mark.parametrize(("name", "reason"), REFUSED)
def test_refused(name: str, reason: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(UserError, match=reason) as refusal:
        check_config(CONFIG_MAPPING[name]())
    assert name in str(refusal.value)


def test_head_dim_that_differs_by_layer_is_refused() -> None:
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no gemma4_text")
    with pytest.raises(UserError, match="gemma4_text"):
        check_config(CONFIG_MAPPING["gemma4_text"]())
