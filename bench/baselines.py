"""What ours is compared with: a dense decode with all KV on the GPU, and a streaming offload.

Both run transformers' layers as they are and PyTorch's flash attention, which
splits the keys for one query token. Cache contents are random.
"""

import statistics
from collections.abc import Callable

import torch

from offload_runtime.adapter import AttentionCall, ModelAdapter
from offload_runtime.cache.pinned import pinned_empty

STEPS, STREAMING_STEPS, WARM_STEPS = 30, 5, 2


def flash_decode(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """Dense attention of call.query [B, Hq, 1, D] over rows [B, Hkv, N, 2 D]; [B, 1, Hq, D]."""
    dim = call.query.shape[-1]
    out = torch.ops.aten._scaled_dot_product_flash_attention(
        call.query, rows[..., :dim], rows[..., dim:], 0.0, False, False, scale=call.scale
    )[0]
    return out.transpose(1, 2)


def append(call: AttentionCall, rows: torch.Tensor) -> None:
    """The current token's row takes the last place."""
    rows[:, :, -1] = torch.cat([call.key[:, :, 0], call.value[:, :, 0]], -1)


def forward(adapter: ModelAdapter, tokens: torch.Tensor, position: int) -> None:
    positions = torch.full_like(tokens, position)
    adapter.model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1)


def median_ms(run: Callable[[], object], steps: int) -> float:
    """Median GPU milliseconds of a call."""
    times = []
    for _ in range(steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 3)


def rows_shape(adapter: ModelAdapter, ctx: int, batch: int) -> tuple[int, int, int, int]:
    return batch, adapter.kv_heads, ctx, 2 * adapter.head_dim


def dense_step_ms(adapter: ModelAdapter, ctx: int, batch: int) -> float | None:
    """A decode step with the whole KV on the GPU, in a CUDA graph; None where it does not fit."""
    shape = rows_shape(adapter, ctx, batch)
    try:
        caches = [torch.randn(shape, dtype=adapter.dtype, device=adapter.device) for _ in adapter.layers]
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None

    def handler_for(rows: torch.Tensor) -> Callable[[AttentionCall], torch.Tensor]:
        def handle(call: AttentionCall) -> torch.Tensor:
            append(call, rows)
            return flash_decode(call, rows)

        return handle

    tokens = torch.randint(0, 1000, (batch, 1), device=adapter.device)
    graph = torch.cuda.CUDAGraph()
    with adapter.handled_by([handler_for(rows) for rows in caches]):
        for _ in range(WARM_STEPS):
            forward(adapter, tokens, ctx - 1)
        with torch.cuda.graph(graph):
            forward(adapter, tokens, ctx - 1)
    result = median_ms(graph.replay, STEPS)
    del caches, graph
    torch.cuda.empty_cache()
    return result


def streaming_step_ms(adapter: ModelAdapter, ctx: int, batch: int) -> float | None:
    """A decode step that copies every layer's whole KV over the link, double-buffered (FlexGen's idea)."""
    shape, device = rows_shape(adapter, ctx, batch), adapter.device
    host = [pinned_empty(shape, adapter.dtype) for _ in adapter.layers]
    source = torch.randn(shape, dtype=adapter.dtype, device=device)
    for rows in host:
        rows.copy_(source)
    buffers = [torch.empty_like(source), torch.empty_like(source)]
    stream = torch.cuda.Stream(device)
    copied = [torch.cuda.Event() for _ in host]
    used = [torch.cuda.Event(), torch.cuda.Event()]

    def fetch(index: int) -> None:
        with torch.cuda.stream(stream):
            stream.wait_event(used[index % 2])
            buffers[index % 2].copy_(host[index], non_blocking=True)
            copied[index].record()

    def handler_for(index: int) -> Callable[[AttentionCall], torch.Tensor]:
        def handle(call: AttentionCall) -> torch.Tensor:
            fetch((index + 1) % len(host))
            torch.cuda.current_stream().wait_event(copied[index])
            append(call, buffers[index % 2])
            out = flash_decode(call, buffers[index % 2])
            used[index % 2].record()
            return out

        return handle

    tokens = torch.randint(0, 1000, (batch, 1), device=device)
    fetch(0)
    with adapter.handled_by([handler_for(index) for index in range(len(host))]):
        result = median_ms(lambda: forward(adapter, tokens, ctx - 1), STREAMING_STEPS)
    torch.cuda.synchronize()
    buffers.clear()
    host.clear()
    return result
