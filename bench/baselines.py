"""What ours is compared with, each the best simple version of itself, with random cache contents.

dense: all KV on the GPU, flash decode, the whole step in a CUDA graph: the limit of any exact decode.
streaming: each layer's whole KV over the link, double-buffered, flash decode: FlexGen's idea, perfect.
hf-dense, hf-offloaded: transformers' DynamicCache as users call it, with and without offloading.

dense and streaming get the fused norms, rotary embedding and products that ours has. Streaming is not
in a graph: it waits for the link, not for Python.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from offload_runtime.adapter import AttentionCall, ModelAdapter
from offload_runtime.architectures import capturable_experts
from offload_runtime.bench.driven import TOKEN_IDS
from offload_runtime.bench.timing import step_ms
from offload_runtime.cache.pinned import pinned_empty
from offload_runtime.fusion import Fusion

WARM_STEPS = 2
STREAMED_REGIONS = 4  # of host memory, which the layers take turns with: a step copies as many bytes


def flash_decode(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """Dense attention of call.query [B, Hq, 1, D] over rows [B, Hkv, N, 2 D]; [B, 1, Hq, D]."""
    dim = call.query.shape[-1]
    keys, values = rows[..., :dim], rows[..., dim:]
    if rows.is_cuda:  # splits the keys for one query token; 2.7 TB/s measured on an H100
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            call.query, keys, values, 0.0, False, False, scale=call.scale
        )[0]
    else:
        out = scaled_dot_product_attention(call.query, keys, values, scale=call.scale, enable_gqa=True)
    return out.transpose(1, 2)


def append(call: AttentionCall, rows: torch.Tensor) -> None:
    """The current token's row takes the last place."""
    dim = call.query.shape[-1]
    rows[:, :, -1, :dim] = call.key[:, :, 0]
    rows[:, :, -1, dim:] = call.value[:, :, 0]


def forward(adapter: ModelAdapter, tokens: torch.Tensor, positions: torch.Tensor) -> None:
    adapter.model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1)


def step_inputs(adapter: ModelAdapter, ctx: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions [B, 1] of a step at the end of the context."""
    tokens = torch.randint(0, TOKEN_IDS, (batch, 1), device=adapter.device)
    return tokens, torch.full_like(tokens, ctx - 1)


@contextmanager
def decoding(
    adapter: ModelAdapter, handlers: list[Callable[[AttentionCall], torch.Tensor]], batch: int
) -> Iterator[None]:
    """The model with these attention handlers and what else our own decode step does to it."""
    fusion = Fusion(adapter, batch)
    _ = fusion.for_steps
    with adapter.handled_by(handlers), fusion.applied(), capturable_experts(adapter.model):
        yield


def dense_times(adapter: ModelAdapter, ctx: int, batch: int, steps: int) -> list[float]:
    """Milliseconds of decode steps with the whole KV on the GPU, in a CUDA graph where there is a GPU."""
    shape = (batch, adapter.kv_heads, ctx, 2 * adapter.head_dim)
    caches = [torch.randn(shape, dtype=adapter.dtype, device=adapter.device) for _ in adapter.layers]

    def handler_for(rows: torch.Tensor) -> Callable[[AttentionCall], torch.Tensor]:
        def handle(call: AttentionCall) -> torch.Tensor:
            append(call, rows)
            return flash_decode(call, rows)

        return handle

    inputs = step_inputs(adapter, ctx, batch)
    with decoding(adapter, [handler_for(rows) for rows in caches], batch):
        for _ in range(WARM_STEPS):
            forward(adapter, *inputs)
        if adapter.device.type != "cuda":
            return [step_ms(lambda: forward(adapter, *inputs), adapter.device) for _ in range(steps)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward(adapter, *inputs)
    graph.replay()
    return [step_ms(graph.replay, adapter.device) for _ in range(steps)]


class Streaming:
    """Two buffers on the device; while one layer's rows are attended to, the next layer's arrive.

    host: every layer's rows [B, Hkv, N, 2 D].
    """

    def __init__(self, host: list[torch.Tensor], device: torch.device) -> None:
        self.host = host
        self.buffers = [torch.empty_like(host[0], device=device) for _ in range(2)]
        self.fetched = self.attended = 0  # layers so far; either's buffer is its count modulo 2
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.stream = torch.cuda.Stream(device)
            self.copied = [torch.cuda.Event(), torch.cuda.Event()]
            self.used = [torch.cuda.Event(), torch.cuda.Event()]

    def fetch(self, layer: int) -> None:
        """Start to copy a layer's rows into the buffer that was attended to last but one."""
        place = self.fetched % 2
        self.fetched += 1
        if not self.on_gpu:
            self.buffers[place].copy_(self.host[layer])
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.used[place])
            self.buffers[place].copy_(self.host[layer], non_blocking=True)
            self.copied[place].record()

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Attention over a layer's rows, the next layer's copy started before it."""
        self.fetch((layer + 1) % len(self.host))
        place = self.attended % 2
        self.attended += 1
        if self.on_gpu:
            torch.cuda.current_stream().wait_event(self.copied[place])
        append(call, self.buffers[place])
        out = flash_decode(call, self.buffers[place])
        if self.on_gpu:
            self.used[place].record()
        return out


def streamed_rows(adapter: ModelAdapter, ctx: int, batch: int) -> list[torch.Tensor]:
    """Every layer's rows: of random numbers, in registered memory, which whole copies are fastest from."""
    shape = (batch, adapter.kv_heads, ctx, 2 * adapter.head_dim)
    make = pinned_empty if adapter.device.type == "cuda" else torch.empty
    regions = [make(shape, dtype=adapter.dtype) for _ in range(STREAMED_REGIONS)]
    for region in regions:
        region.copy_(torch.randn(shape, dtype=adapter.dtype, device=adapter.device))
    return [regions[layer % STREAMED_REGIONS] for layer in range(len(adapter.layers))]


def streaming_times(adapter: ModelAdapter, ctx: int, batch: int, steps: int) -> list[float]:
    """Milliseconds of decode steps that copy every layer's whole KV over the link."""
    streaming = Streaming(streamed_rows(adapter, ctx, batch), adapter.device)

    def handler_for(layer: int) -> Callable[[AttentionCall], torch.Tensor]:
        return lambda call: streaming.attend(layer, call)

    inputs = step_inputs(adapter, ctx, batch)
    streaming.fetch(0)
    with decoding(adapter, [handler_for(layer) for layer in range(len(adapter.layers))], batch):
        forward(adapter, *inputs)
        times = [step_ms(lambda: forward(adapter, *inputs), adapter.device) for _ in range(steps)]
    if streaming.on_gpu:
        torch.cuda.synchronize()
    return times


def hf_times(adapter: ModelAdapter, ctx: int, batch: int, steps: int, offloading: bool) -> list[float]:
    """Milliseconds of model(...) with a DynamicCache that was filled layer by layer with random KV.

    transformers moves an offloaded layer to the GPU whole, and whole back to pinned memory
    that PyTorch's allocator rounds up to a power of two.
    """
    warm = 1
    cache: Any = DynamicCache(config=adapter.model.config, offloading=offloading)
    shape = (batch, adapter.kv_heads, ctx - steps - warm, adapter.head_dim)
    for layer in range(len(adapter.layers)):
        keys = torch.randn(shape, dtype=adapter.dtype, device=adapter.device)
        cache.update(keys, torch.randn_like(keys), layer)
    tokens, _ = step_inputs(adapter, ctx, batch)

    def step() -> None:
        adapter.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    for _ in range(warm):
        step()
    return [step_ms(step, adapter.device) for _ in range(steps)]


def hf_pinned_bytes(adapter: ModelAdapter, ctx: int, batch: int) -> int:
    """Host bytes of an offloaded DynamicCache: K and V of every layer, each rounded up to a power of two."""
    size = batch * adapter.kv_heads * ctx * adapter.head_dim * adapter.dtype.itemsize
    return 2 * len(adapter.layers) * (1 << (size - 1).bit_length())
