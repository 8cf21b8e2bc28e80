"""Prefill: exact dense attention over the prompt, layer by layer, in chunks of tokens.

transformers' own forward runs the model over the whole prompt; only inside a
decoder layer is the work cut into chunks, so embeddings, rotary tables and the
order of the layers stay the model's. Peak memory is the hidden states [S, E],
one layer's rows [Hkv, capacity, row] and one chunk's activations. Nothing in it
waits for the GPU, so the host queues work well ahead while pinned memory is made.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .adapter import AttentionCall, ModelAdapter
from .cache.layer_cache import LayerCache
from .cache.window_cache import WindowCache
from .errors import UserError
from .kernels.prefill_attention import prefill_attention
from .prefetch.row_writer import RowWriter
from .prefill_backend import PrefillBackend
from .prefill_memory import staging_rows

# 0.42 GB of MLP activations at 14,336 wide; a matmul of it does 1.8e12 flop a layer (Llama-3.1-8B shape),
# 2.6 ms at 700 TFLOP/s, against some 70 launches of 5 us (arithmetic).
GPU_CHUNK_TOKENS = 4096
# A prefill of more tokens than this takes the slots' memory for its own work. It lasts half a second and
# more (8B shape, H100), so capturing the decode graph again (about 0.2 s, an estimate) shows little.
KEEP_SLOTS_TOKENS = 16384
CPU_CHUNK_TOKENS = 1024  # keeps a block of logits in a few hundred MB

Progress = Callable[[int, int], None]  # (tokens x layers done, tokens x layers in all)


class PrefillRun:
    """The prefill of one sequence of a batch, continuing after `kept` tokens that are cached already."""

    def __init__(
        self,
        adapter: ModelAdapter,
        caches: Sequence[LayerCache | WindowCache],
        sequence: int,
        total: int,
        kept: int,
        chunk_tokens: int | None,
        on_progress: Progress | None,
        backend: PrefillBackend,
    ) -> None:
        """total: tokens of the sequence, the kept ones included."""
        self.adapter, self.caches, self.sequence = adapter, caches, sequence
        self.total, self.kept = total, kept
        device = adapter.device
        default = GPU_CHUNK_TOKENS if device.type == "cuda" else CPU_CHUNK_TOKENS
        self.chunk_tokens = chunk_tokens or default
        self.on_progress, self.done = on_progress, 0
        self.backend = backend
        self.rows = torch.empty(0, device=device)  # one layer's [Hkv, total, row], made when first needed
        # [total, 4]: row p holds position p, where a chunk may start. In GPU memory, so that no chunk copies
        # its own there; 16 bytes a row, because Triton compiles a kernel again for another alignment.
        self.places = torch.arange(total, dtype=torch.int32, device=device)[:, None].repeat(1, 4)
        self.pinned_wait_s = 0.0  # that the host waited for rows' memory
        self.writer = RowWriter(device)
        self.position = kept  # of the next chunk, within the layer at work

    def run(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Prefill token_ids [1, total - kept]; returns the last token's logits [1, V]."""
        positions = torch.arange(self.kept, self.total, device=token_ids.device)[None]
        handlers = [self._handler(index) for index in range(len(self.caches))]
        with self.adapter.handled_by(handlers), self._chunked_layers(), self._last_token_norm():
            try:
                logits = self.adapter.model(
                    input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=1
                ).logits
            finally:
                self.writer.finish()  # also when interrupted: what comes next writes the same host rows
        if not self._finished:
            name = type(self.adapter.attentions[0]).__name__
            raise UserError(f"{name} is not supported: it does not use transformers' attention interface")
        return logits[:, -1]

    @property
    def _finished(self) -> bool:
        """Whether every layer has attended for every token."""
        return self.done == (self.total - self.kept) * len(self.caches)

    def _handler(self, index: int) -> Callable[[AttentionCall], torch.Tensor]:
        def handle(call: AttentionCall) -> torch.Tensor:
            self.adapter.check_call(index, call)
            return self._attend(self.caches[index], call)

        return handle

    def _make_staging(self) -> torch.Tensor:
        """One layer's rows [Hkv, total, row] on the device.

        A head lies a power of two of rows from the next, so that cuDNN's plans, which are made for strides
        and take 1.2 s, serve prompts of other lengths too. Made after the rotary tables, whose making takes
        more.
        """
        layout = self.caches[0].layout
        shape = (layout.kv_heads, staging_rows(layout.capacity), layout.row_elements)
        staging = torch.zeros(shape, dtype=layout.dtype, device=self.adapter.device)
        tokens = self.total - self.kept
        self.backend.choose(staging, layout.query_heads, self.chunk_tokens, tokens)
        return staging[:, : self.total]

    def _attend(self, cache: LayerCache | WindowCache, call: AttentionCall) -> torch.Tensor:
        """Stage one chunk's rows; those of an offloaded layer get labels and go out; attend."""
        if self.rows.numel() == 0:
            self.rows = self._make_staging()
        if self.position == self.kept and self.kept:
            self._load_kept_rows(cache)
        count = call.key.shape[2]
        span = slice(self.position, self.position + count)
        self.writer.before_reuse(span.start)
        dim = call.key.shape[-1]
        self.rows[:, span, :dim] = call.key[0]
        self.rows[:, span, dim : 2 * dim] = call.value[0]
        if isinstance(cache, LayerCache):
            self._offload(cache, call, span)
        window = cache.window if isinstance(cache, WindowCache) else 0
        out = prefill_attention(
            call.query,
            self.rows[:, : span.stop],
            call.scale,
            window,
            call.softcap,
            call.sink_logits,
            self.backend.attend,
        )
        self._advance(cache, count)
        return out

    def _offload(self, cache: LayerCache, call: AttentionCall, span: slice) -> None:
        cache.labels.write(call.key, cache.maps, self.places[span.start, :1], self.sequence)
        began = time.perf_counter()
        host = cache.host.link_rows  # may still be in the making
        self.pinned_wait_s += time.perf_counter() - began
        self.writer.write(self.rows[:, span], host[self.sequence, :, span], span.start)

    def _load_kept_rows(self, cache: LayerCache | WindowCache) -> None:
        """Bring the rows of the tokens that are cached already: [Hkv, kept, row]."""
        self.writer.finish()
        if isinstance(cache, WindowCache):
            cache.restore(self.sequence, self.rows[:, : self.kept])
            return
        kept = cache.host.link_rows[self.sequence, :, : self.kept]
        # Head by head: each [kept, row] is contiguous, so pinned rows go straight to the copy engine. As
        # one strided copy PyTorch would first gather them in pageable memory.
        for source, target in zip(kept, self.rows[:, : self.kept], strict=True):
            target.copy_(source, non_blocking=True)

    def _advance(self, cache: LayerCache | WindowCache, count: int) -> None:
        self.position += count
        if self.position == self.total:
            if isinstance(cache, WindowCache):
                cache.load(self.sequence, self.rows)
            else:
                cache.resident.load_fixed(self.sequence, self.rows)
            self.position = self.kept
        self.done += count
        if self.on_progress is not None:
            self.on_progress(self.done, (self.total - self.kept) * len(self.caches))

    @contextmanager
    def _chunked_layers(self) -> Iterator[None]:
        layers = self.adapter.layers
        try:
            for layer in layers:
                layer.forward = in_chunks(layer.forward, self.chunk_tokens)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    @contextmanager
    def _last_token_norm(self) -> Iterator[None]:
        """Only the last token's logits are needed: spare the final norm's float32 copy of [S, E]."""
        norm = self.adapter.final_norm
        if norm is None:
            yield
            return

        def last_token(_: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
            # NanoChat's norm comes before the layers too.
            return (arguments[0][:, -1:],) if self._finished else None

        handle = norm.register_forward_pre_hook(last_token)
        try:
            yield
        finally:
            handle.remove()


def in_chunks(forward: Callable[..., Any], chunk_tokens: int) -> Callable[..., Any]:
    """A decoder layer's forward that works through hidden [1, S, E] in place, chunk by chunk.

    The chunk that is not full comes first, where its attention has the fewest keys.
    """

    def chunked(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        tokens = hidden.shape[1]
        if tokens <= chunk_tokens:
            return forward(hidden, *arguments, **keywords)
        edges = [0, *range(tokens % chunk_tokens or chunk_tokens, tokens + 1, chunk_tokens)]
        for start, end in itertools.pairwise(edges):
            span = slice(start, end)
            part = {name: take_tokens(value, tokens, span) for name, value in keywords.items()}
            out = forward(hidden[:, span], *arguments, **part)
            hidden[:, span] = out[0] if isinstance(out, tuple) else out
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    return chunked


def take_tokens(value: Any, tokens: int, span: slice) -> Any:
    """The chunk's part of a layer argument: its token dimension is the first one of that size."""
    if isinstance(value, tuple):
        return tuple(take_tokens(item, tokens, span) for item in value)
    if not isinstance(value, torch.Tensor) or tokens not in value.shape:
        return value
    index = [slice(None)] * value.dim()
    index[list(value.shape).index(tokens)] = span
    return value[tuple(index)]
