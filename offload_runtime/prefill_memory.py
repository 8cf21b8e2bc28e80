"""Bytes that a prefill works in, beside weights and caches."""

from .cache.layout import KVLayout
from .model_check import ModelShape

CPU_LOGIT_BLOCK_BYTES = 512 << 20  # the CPU prefill keeps a block of logits of a few hundred MB


def prefill_bytes(
    shape: ModelShape, layout: KVLayout, chunk: int, tokens: int, on_gpu: bool, unpacked: int = 0
) -> int:
    """Peak beside the caches while one sequence of S tokens prefills.

    Hidden states [S, E] all the time. With them first the making of the rotary tables
    (float32: angles, both halves, cosine, sine and a product of them), then the tables
    2 x [S, D], one layer's staging [Hkv, a power of two, row] and one chunk's activations, and of a
    packed model one matrix unpacked (bytes).
    """
    item = shape.dtype.itemsize
    chunk = min(tokens, chunk)
    hidden = tokens * shape.hidden * item
    making_rotary = tokens * shape.head_dim * 18  # 4 bytes x 4.5
    rows = layout.kv_heads * staging_rows(layout.capacity) * layout.row_bytes
    activations = chunk * max(mlp_bytes(shape), attention_bytes(shape))
    running = 2 * tokens * shape.head_dim * item + rows + activations + unpacked
    return hidden + max(making_rotary, running) + (0 if on_gpu else CPU_LOGIT_BLOCK_BYTES)


def staging_rows(capacity: int) -> int:
    """Rows that a head has in the staging of one layer: the power of two that holds the capacity."""
    return 1 << (capacity - 1).bit_length()


def mlp_bytes(shape: ModelShape) -> int:
    """Per token: the activated gate, the up projection and their product; input, residual."""
    item, width = shape.dtype.itemsize, shape.experts_used * shape.intermediate
    return (3 * width + 2 * shape.hidden) * item


def attention_bytes(shape: ModelShape) -> int:
    """Per token: input, q, k, v, two parts' outputs and the float32 sum of parts merged so far."""
    item, wide = shape.dtype.itemsize, shape.query_heads * shape.head_dim
    keys = 2 * shape.kv_heads * shape.head_dim
    return (2 * shape.hidden + 3 * wide + keys) * item + 4 * wide
