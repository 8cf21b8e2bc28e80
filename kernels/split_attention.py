"""Prefill attention in two parts: a chunk's queries over the keys before it, and causally over its own.

cuDNN's causal mask is aligned to the first key, so a chunk in the middle of a prompt
needs the split; both parts are merged by their log-sum-exps. cuDNN takes grouped
query heads as they are: keys are never copied.
"""

from collections.abc import Callable
from functools import cache

import torch

from .merge_attention import merge_attention

# Fewer queries than this take no noticeable time, and every new shape costs cuDNN a plan.
LEAST_TOKENS = 1024
# Trial inputs: small and odd for agreement; for time, long enough to fill a GPU (about 1 ms on an H100).
AGREE_TOKENS, AGREE_PREFIX = 1027, 517
TIMED_TOKENS, TIMED_PREFIX, TIMED_RUNS = 2048, 16384, 5
# Two kernels round softmax weights at other places: two roundings of the type at most, in the mean.
TRIAL_ROUNDINGS = 2

# (query [1, Hq, T, D], key and value [1, Hkv, S, D], scale, causal) -> (output as query, lse [1, Hq, T])
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool], tuple[torch.Tensor, torch.Tensor]]


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


def split_attention(query: torch.Tensor, rows: torch.Tensor, scale: float, attend: Attend) -> torch.Tensor:
    """Attend with the last T of E positions: query [1, Hq, T, D], rows [Hkv, E, >= 2 D]; as query."""
    count, dim = query.shape[2:]
    start = rows.shape[1] - count
    keys, values = rows[None, :, :, :dim], rows[None, :, :, dim : 2 * dim]
    out, lse = attend(query, keys[:, :, start:], values[:, :, start:], scale, True)
    if start == 0:
        return out
    before, before_lse = attend(query, keys[:, :, :start], values[:, :, :start], scale, False)
    return merge_attention(out, lse, before, before_lse)


def cudnn_attention(query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    return split_attention(query, rows, scale, attend_cudnn)


def flash_attention(query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """PyTorch's flash attention, whose causal mask is aligned to the last key."""
    dim = query.shape[-1]
    keys, values = rows[None, :, :, :dim], rows[None, :, :, dim : 2 * dim]
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, True, False, scale=scale
    )[0]


def fastest_attention(query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Whichever of the two is faster on this GPU at this shape of heads; flash where cuDNN fails."""
    heads, kv_heads, dim = query.shape[1], rows.shape[0], query.shape[3]
    long = query.shape[2] >= LEAST_TOKENS
    if long and cudnn_is_faster(query.device.index or 0, query.dtype, heads, kv_heads, dim):
        try:
            return cudnn_attention(query, rows, scale)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # a length that cuDNN has no plan for: flash attention has no such limit
            return flash_attention(query, rows, scale)
    return flash_attention(query, rows, scale)


@cache
def cudnn_is_faster(index: int, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> bool:
    """One trial a GPU, type and shape of heads: cuDNN must agree with flash, then beat it."""
    device = torch.device("cuda", index)
    generator = torch.Generator(device).manual_seed(0)

    def draw(tokens: int, prefix: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        query = torch.randn(1, tokens, heads, dim, generator=generator, device=device, dtype=dtype)
        shape = (kv_heads, prefix + tokens, 2 * dim)
        rows = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        rows[:, prefix:, dim:] += 1  # so that a wrong merge shows in every number
        return query.transpose(1, 2), rows, dim**-0.5

    try:
        trial = draw(AGREE_TOKENS, AGREE_PREFIX)
        expected, got = flash_attention(*trial).float(), cudnn_attention(*trial).float()
        rounding = TRIAL_ROUNDINGS * torch.finfo(dtype).eps
        if not (got - expected).abs().mean() <= rounding * expected.abs().mean():  # NaN fails too
            return False
        trial = draw(TIMED_TOKENS, TIMED_PREFIX)
        return shortest_ms(cudnn_attention, trial) < shortest_ms(flash_attention, trial)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return False


def shortest_ms(
    attention: Callable[..., torch.Tensor], trial: tuple[torch.Tensor, torch.Tensor, float]
) -> float:
    """Milliseconds of the fastest of a few runs, after one that makes the plan."""
    times = []
    for _ in range(1 + TIMED_RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        attention(*trial)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[1:])
