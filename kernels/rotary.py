"""Rotary embedding of queries and keys in one launch, with transformers' roundings.

transformers' rotate-half form is fourteen kernels: 38 us of a 235 us layer at
one token (Llama-3.1-8B shape, H100, profile of a decode step).
"""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED
from .early_launch import early_launch, wait_for_inputs


def rotate_reference(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, Hq, T, D] and key [B, Hkv, T, D] turned by cos and sin [B or 1, T, D] (rotate-half form)."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]

    return turn(query), turn(key)


def rotate_triton(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """rotate_reference as one program a (token, head)."""
    batch, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    assert query.stride(3) == key.stride(3) == cos.stride(2) == sin.stride(2) == 1
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    out_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    out_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    _rotate_kernel[(batch * tokens, heads + kv_heads)](
        query, key, cos, sin, out_query, out_key,
        query.stride(0), query.stride(1), query.stride(2), key.stride(0), key.stride(1), key.stride(2),
        cos.stride(0), cos.stride(1), sin.stride(0), sin.stride(1), tokens,
        HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2), num_warps=1,
        **early_launch(query), **FUSED,
    )  # fmt: skip
    return out_query, out_key


@triton.jit
def _rotate_kernel(
    query, key, cos, sin, out_query, out_key,
    query_b, query_h, query_t, key_b, key_h, key_t, cos_b, cos_t, sin_b, sin_t, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    i_b = (tl.program_id(0) // tokens).to(tl.int64)
    i_t = (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    p_cos, p_sin = cos + i_b * cos_b + i_t * cos_t, sin + i_b * sin_b + i_t * sin_t
    if head < HEADS:
        p_in = query + i_b * query_b + head * query_h + i_t * query_t
        p_out = out_query + ((i_b * HEADS + head) * tokens + i_t) * (2 * HALF)
        _turn(p_in, p_out, p_cos, p_sin, HALF, BLOCK)
    else:
        p_in = key + i_b * key_b + (head - HEADS) * key_h + i_t * key_t
        p_out = out_key + ((i_b * KV_HEADS + head - HEADS) * tokens + i_t) * (2 * HALF)
        _turn(p_in, p_out, p_cos, p_sin, HALF, BLOCK)


@triton.jit
def _turn(p_in, p_out, p_cos, p_sin, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """One head: each product is rounded to the tensor's type before the sum, as transformers does."""
    o = tl.arange(0, BLOCK)
    m = o < HALF
    kind = p_out.dtype.element_ty
    low = tl.load(p_in + o, mask=m, other=0.0).to(tl.float32)
    high = tl.load(p_in + HALF + o, mask=m, other=0.0).to(tl.float32)
    cos_low = tl.load(p_cos + o, mask=m, other=0.0).to(tl.float32)
    cos_high = tl.load(p_cos + HALF + o, mask=m, other=0.0).to(tl.float32)
    sin_low = tl.load(p_sin + o, mask=m, other=0.0).to(tl.float32)
    sin_high = tl.load(p_sin + HALF + o, mask=m, other=0.0).to(tl.float32)
    straight, crossed = (low * cos_low).to(kind).to(tl.float32), (-high * sin_low).to(kind).to(tl.float32)
    tl.store(p_out + o, (straight + crossed).to(kind), mask=m)
    straight, crossed = (high * cos_high).to(kind).to(tl.float32), (low * sin_high).to(kind).to(tl.float32)
    tl.store(p_out + HALF + o, (straight + crossed).to(kind), mask=m)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """rotate_reference, in one launch on a GPU."""
    return (rotate_triton if query.is_cuda else rotate_reference)(query, key, cos, sin)
