"""Decode: one token through all layers, replayed as one CUDA graph where there is a GPU."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .adapter import AttentionCall, ModelAdapter
from .architectures import capturable_experts
from .audit import Audit
from .cache.layer_cache import BatchState, LayerCache
from .cache.window_cache import WindowCache
from .capture import capture
from .fusion import Fusion
from .input_guess import InputCorrection
from .model_check import first_line
from .prefetch.scheduler import Prefetcher


class DecodeLoop:
    """Steps a batch by one token at a time. All state is in the caches and in GPU memory.

    The first step runs as it is (kernels compile, the allocator warms up), the
    second is captured and every later one is a replay of that graph. A step that is
    audited runs as it is; the graph stays for the others. A model whose step cannot be
    captured runs every step as it is, and says so.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        caches: list[LayerCache | WindowCache],
        state: BatchState,
        prefetcher: Prefetcher,
        use_graph: bool,
        audit: Audit | None = None,
    ) -> None:
        self.audit = audit
        self.adapter, self.caches, self.state, self.prefetcher = adapter, caches, state, prefetcher
        batch = state.lengths.shape[0]
        self.token_ids = torch.zeros(batch, 1, dtype=torch.long, device=adapter.device)
        self.fusion = Fusion(adapter, batch)
        self.use_graph = use_graph and adapter.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False
        self.logits: torch.Tensor | None = None

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Append token_ids [B] and return the next token's logits [B, V] (reused by the next step)."""
        self.token_ids.copy_(token_ids[:, None])
        if self.graph is None:
            self._make_slots()
            _ = self.fusion.for_steps  # before the model's attention is handled and its layers are observed
        if self.audit is not None and self.audit.due():
            with self.audit.watching():
                return self._forward()
        if self.graph is not None:
            self.graph.replay()
        elif self.use_graph and self.warm:
            self._capture()
        else:
            with self._experts():
                self.logits = self._forward()
            self.warm = True
        assert self.logits is not None
        return self.logits

    def forget_graph(self) -> None:
        """The next step is captured anew: tensors that the graph used are gone."""
        self.graph = self.logits = None

    def _make_slots(self) -> None:
        """Before the step: within it, another stream would make them from memory that this one takes back."""
        for cache in self.caches:
            if isinstance(cache, LayerCache):
                cache.make_slots()

    def _capture(self) -> None:
        try:
            with self._experts():
                self.graph = capture(self._record, self.adapter.device, self.prefetcher.capture_stream)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._run_without_graph(error)
            return
        self.graph.replay()  # capturing records the step without running it

    def _record(self) -> None:
        self.logits = self._forward()

    def _run_without_graph(self, error: RuntimeError) -> None:
        """A capture runs nothing, so caches and lengths are as they were.

        The warning's 20 ms: Llama-3.1-8B's layers take 31 ms step by step and 8 in a graph (H100, measured).
        """
        self.use_graph = False
        warnings.warn(
            f"the decode step of {type(self.adapter.model).__name__} cannot be captured in a CUDA graph "
            f"({first_line(error)}); steps run one by one, some 20 ms slower in a model of 32 layers",
            stacklevel=2,
        )
        with self._experts():
            self.logits = self._forward()

    def _experts(self) -> AbstractContextManager[None]:
        """On a GPU every step runs as the captured one does."""
        return capturable_experts(self.adapter.model) if self.token_ids.is_cuda else nullcontext()

    def _forward(self) -> torch.Tensor:
        self.state.advance()
        handlers = [self._handler(index) for index in range(len(self.caches))]
        observed = self.adapter.observed_by(self.prefetcher.before_layer)
        with self.adapter.handled_by(handlers), observed, self.fusion.applied():
            logits = self.adapter.model(
                input_ids=self.token_ids,
                position_ids=self.state.positions.long().clamp_min(0)[
                    :, None
                ],  # [B, 1]; an empty place has -1
                use_cache=False,
                logits_to_keep=1,
            ).logits
        return logits[:, -1]

    def _handler(self, index: int) -> Callable[[AttentionCall], torch.Tensor]:
        def handle(call: AttentionCall) -> torch.Tensor:
            cache = self.caches[index]
            query = call.query[:, :, 0]  # [B, Hq, D]
            cache.append(call.key[:, :, 0], call.value[:, :, 0])
            if isinstance(cache, WindowCache):
                out = cache.attend(query, call.scale, call.softcap, call.sink_logits)
            else:
                choice = self.prefetcher.selection_for(index, query, call.scale)
                early = cache.attend_early(query, choice, call.scale, call.softcap)
                cache.append_label(call.key[:, :, 0])  # while rows are on their way
                self.prefetcher.wait_for_rows(index)
                out = cache.attend(query, choice, call.scale, call.softcap, call.sink_logits, early)
                if self.audit is not None and self.audit.active:
                    self.audit.look(index, query, choice.selection, call, out)
            return out[:, None]  # [B, 1, Hq, D]

        return handle


def query_predictor(
    adapter: ModelAdapter, correction: InputCorrection
) -> Callable[..., tuple[torch.Tensor, float]]:
    """The prefetcher's view of the adapter: one predicted query [B, Hq, D] and its scale."""

    def predict(index: int, hidden: torch.Tensor, keywords: dict[str, Any]) -> tuple[torch.Tensor, float]:
        query, scale = adapter.predicted_query(index, hidden, keywords, correction)
        return query[:, :, 0], scale

    return predict
