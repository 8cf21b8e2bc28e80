"""The Llama-3.1-8B shape, of which plans are made without its weights."""

from transformers import LlamaConfig

from offload_runtime.memory import FreeMemory

GB = 10**9
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    dtype="bfloat16",
)
PLENTY = FreeMemory(host=10**15, gpu=10**15)
