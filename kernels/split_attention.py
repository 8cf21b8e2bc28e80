"""Prefill attention in parts: a chunk's queries over pieces of the keys before it, and causally over its own.

cuDNN's causal mask is aligned to the first key, so a chunk in the middle of a prompt
needs the split; the parts are merged by their log-sum-exps. cuDNN takes grouped
query heads as they are: keys are never copied.

cuDNN makes a plan for every new shape, reported at 42 ms (pytorch PR 191576) to 400 ms
(sglang PR 4650). So the keys before a chunk are not one part, whose length would be new
for every chunk, but pieces of 1, 2, 4, ... chunks: 262,144 tokens in chunks of 4,096 need
8 plans instead of 64.
"""

from collections.abc import Callable

import torch

from .merge_attention import merge_attention

# Fewer keys than this take no noticeable time, and cuDNN need not have a plan for them.
LEAST_KEYS = 1024

# (query [1, Hq, T, D], key and value [1, Hkv, S, D], scale, causal) -> (output as query, lse [1, Hq, T])
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool], tuple[torch.Tensor, torch.Tensor]]
# (query [1, Hq, T, D], rows [Hkv, E, >= 2 D], scale) -> output as query: the last T of E positions attend
Attention = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def attend_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp. causal: query t sees keys 0..t."""
    _, heads, count, dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    q = query.float().view(1, kv_heads, -1, count, dim)  # [1, Hkv, G, T, D]
    logits = scale * q @ key.float()[:, :, None].transpose(3, 4)  # [1, Hkv, G, T, S]
    if causal:
        hidden = torch.ones(count, tokens, dtype=torch.bool, device=query.device).triu(1)
        logits.masked_fill_(hidden, float("-inf"))
    lse = logits.logsumexp(-1)
    out = (logits - lse[..., None]).exp() @ value.float()[:, :, None]  # [1, Hkv, G, T, D]
    return out.view_as(query).to(query.dtype), lse.view(1, heads, count)


def attend_cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out, lse.view(query.shape[:3])  # [1, Hq, T, 1] to [1, Hq, T]


def attend_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's flash attention, whose causal mask is aligned to the last key."""
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )[:2]


def attend_cudnn_or_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    attend = attend_cudnn if key.shape[2] >= LEAST_KEYS else attend_flash
    return attend(query, key, value, scale, causal)


def prefix_pieces(prefix: int, count: int) -> list[tuple[int, int]]:
    """Cut `prefix` keys into (start, end): what is no whole chunk of `count`, then 1, 2, 4, ... chunks."""
    start = prefix % count
    pieces = [(0, start)] if start else []
    chunks = prefix // count
    for power in range(chunks.bit_length()):
        if chunks >> power & 1:
            pieces.append((start, start + (count << power)))
            start = pieces[-1][1]
    return pieces


def split_attention(query: torch.Tensor, rows: torch.Tensor, scale: float, attend: Attend) -> torch.Tensor:
    """Attend with the last T of E positions: query [1, Hq, T, D], rows [Hkv, E, >= 2 D]; as query."""
    count, dim = query.shape[2:]
    before = rows.shape[1] - count
    keys, values = rows[None, :, :, :dim], rows[None, :, :, dim : 2 * dim]
    out, lse = attend(query, keys[:, :, before:], values[:, :, before:], scale, True)
    pieces = prefix_pieces(before, count)
    total = out  # what is merged so far; float32 between merges, so that it is rounded once
    for index, (start, end) in enumerate(pieces):
        other, other_lse = attend(query, keys[:, :, start:end], values[:, :, start:end], scale, False)
        last = index == len(pieces) - 1
        into = out if last else torch.empty_like(out, dtype=torch.float32) if index == 0 else total
        total = merge_attention(total, lse, other, other_lse, into)
        if not last:
            lse = torch.logaddexp(lse, other_lse)
    return total


def cudnn_attention(query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    return split_attention(query, rows, scale, attend_cudnn_or_flash)


def flash_attention(query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    dim = query.shape[-1]
    keys, values = rows[None, :, :, :dim], rows[None, :, :, dim : 2 * dim]
    return attend_flash(query, keys, values, scale, True)[0]
