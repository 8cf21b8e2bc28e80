"""PyTorch's flex attention as a prefill attention, to be timed beside the others.

It is not in the runtime's trial: every shape is compiled for seconds, which a first
token would have to wait for in every process.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from offload_runtime.kernels.split_attention import split_attention


@functools.cache
def compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def causal_mask(count: int, device: torch.device) -> BlockMask:
    """Of a chunk's queries over its own keys."""
    return create_block_mask(lambda _b, _h, q, k: q >= k, None, None, count, count, device=device)


def attend_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As split_attention.Attend; compiled on a GPU only."""
    plain: Any = flex_attention
    run = compiled() if query.is_cuda else plain
    mask = causal_mask(query.shape[2], query.device) if causal else None
    out, more = run(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    return out, more.lse


def flex_prefill_attention(query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """As split_attention.Attention."""
    return split_attention(query, rows, scale, attend_flex)
