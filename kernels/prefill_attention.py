"""Exact causal attention of one chunk of queries over all keys before and in it.

Nothing of size S x S: the reference walks the keys in blocks with a running
softmax. On CUDA in 16 bits: whatever attention the caller found fastest
(attention_trial.py), flash attention with a left window for sliding layers, a Triton kernel where logits have
a softcap (masked_prefill.py). Learned sink logits need only the log-sum-exp of the
others: e^sink joins the sum, so the output shrinks by sigmoid(lse - sink).
"""

import torch

from .masked_prefill import LARGEST_DIM, masked_prefill_triton
from .split_attention import Attention, flash_attention

KEY_BLOCK = 2048  # keys a step of the reference: [Hq, T, block] logits stay small against the weights


def prefill_attention_reference(
    query: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with the last T of E positions; returns [1, T, Hq, D].

    query [1, Hq, T, D]: positions E - T .. E - 1; rows [Hkv, E, >= 2 D]: K and V of
    positions 0 .. E - 1. window: keys a query sees, itself included, 0 for all.
    softcap and sink_logits as in sparse_attention.
    """
    _, heads, count, dim = query.shape
    kv_heads, end, _ = rows.shape
    q = query[0].float().reshape(kv_heads, -1, dim) * scale  # [Hkv, G T, D]
    positions = torch.arange(end - count, end, device=query.device)  # [T]
    best = q.new_full((kv_heads, heads // kv_heads, count, 1), float("-inf"))
    mass, total = torch.zeros_like(best), q.new_zeros(kv_heads, heads // kv_heads, count, dim)
    if sink_logits is not None:
        best = sink_logits.float().view(kv_heads, -1, 1, 1).expand_as(best)
        mass = torch.ones_like(best)
    first = max(0, end - count - window + 1) if window else 0
    for start in range(first, end, KEY_BLOCK):
        block = rows[:, start : start + KEY_BLOCK].float()
        logits = (q @ block[..., :dim].transpose(1, 2)).view(kv_heads, -1, count, block.shape[1])
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        key = torch.arange(start, start + block.shape[1], device=query.device)
        hidden = key > positions[:, None]  # [T, block]
        if window:
            hidden |= key <= positions[:, None] - window
        logits.masked_fill_(hidden, float("-inf"))
        higher = torch.maximum(best, logits.amax(-1, keepdim=True))
        safe = higher.clamp_min(-1e30)  # a block may hide every key of a query
        weights, shrink = torch.exp(logits - safe), torch.exp(best - safe)
        mass = mass * shrink + weights.sum(-1, keepdim=True)
        values = block[:, None, :, dim : 2 * dim]  # [Hkv, 1, block, D]
        total = total * shrink + weights @ values
        best = higher
    out = (total / mass).view(1, heads, count, dim)
    return out.transpose(1, 2).to(query.dtype)


def prefill_attention(
    query: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
    attention: Attention = flash_attention,
) -> torch.Tensor:
    """prefill_attention_reference; on CUDA in 16 bits `attention`, or what masks and sinks need."""
    dim = query.shape[3]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if not (query.is_cuda and half and dim <= LARGEST_DIM):
        return prefill_attention_reference(query, rows, scale, window, softcap, sink_logits)
    window = window if window < rows.shape[1] else 0
    flash = not softcap and dim % 8 == 0  # what the flash kernels take
    if flash and not window and sink_logits is None:
        return attention(query, rows, scale).transpose(1, 2)
    attend = flash_window if flash else masked_prefill_triton
    out, lse = attend(query, rows, scale, window, softcap)
    return out if sink_logits is None else with_sinks(out, lse, sink_logits)


def flash_window(
    query: torch.Tensor, rows: torch.Tensor, scale: float, window: int, _: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flash attention over the last `window` keys, 0 for all: out [1, T, Hq, D] and lse [1, Hq, T].

    Its masks are aligned to the last key. window_size_left counts the keys before a query's own.
    """
    dim = query.shape[3]
    keys = rows[None, :, :, :dim].transpose(1, 2)  # [1, E, Hkv, D]
    values = rows[None, :, :, dim : 2 * dim].transpose(1, 2)
    out, lse = torch.ops.aten._flash_attention_forward(
        query.transpose(1, 2), keys, values, None, None, query.shape[2], rows.shape[1], 0.0, True, False,
        scale=scale, window_size_left=window - 1 if window else None, window_size_right=0,
    )[:2]  # fmt: skip
    return out, lse


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor) -> torch.Tensor:
    """out [1, T, Hq, D], in place, with e^sink [Hq] in every softmax's sum; lse [1, Hq, T]."""
    share = torch.sigmoid(lse - sink_logits.float()[:, None])  # [1, Hq, T]
    return out.mul_(share.transpose(1, 2)[..., None])
