"""The one place that knows how a transformers model is put together.

Decoder layers are called as they are. Attention comes in through transformers'
AttentionInterface: every attention module of the model carries a handler for
the time of a run. A layer-ahead query is the next layer's own attention module,
run on this layer's input until it hands over its query.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .architectures import length_rotary, rotary_kinds
from .errors import UserError
from .forwards import replaced
from .input_guess import InputCorrection
from .model_check import check_config

IMPLEMENTATION = "ds_offload"
FINAL_NORMS = ("norm", "final_layernorm", "ln_f")  # names that transformers' decoders give it


def unfilled_output(projection: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A stand-in for a projection whose output nobody reads: the right shape, no matrix product."""
    return lambda hidden: hidden.new_empty(*hidden.shape[:-1], projection.out_features)


@dataclass
class AttentionCall:
    """What a layer hands to its attention: query [B, Hq, T, D], key and value [B, Hkv, T, D] after RoPE."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    softcap: float = 0.0
    window: int = 0
    sink_logits: torch.Tensor | None = None


Handler = Callable[[AttentionCall], torch.Tensor]  # returns [B, T, Hq, D]


class QueryReady(Exception):
    """Carries a query out of an attention module before the module does anything with it."""

    def __init__(self, query: torch.Tensor, scale: float) -> None:
        self.query, self.scale = query, scale


def stop_at_query(call: AttentionCall) -> torch.Tensor:
    raise QueryReady(call.query, call.scale)


def offloaded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: pass the call to the module's handler."""
    handler: Handler = module.offload_handler  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(query, key, value, scale, softcap or 0.0, sliding_window or 0, s_aux)
    return handler(call).contiguous(), None  # as transformers' own; some families view it


def no_mask(*_: Any, **__: Any) -> None:
    """transformers' mask function: sequences are stored without padding, so none is needed."""


AttentionInterface.register(IMPLEMENTATION, offloaded_attention)
AttentionMaskInterface.register(IMPLEMENTATION, no_mask)


class ModelAdapter:
    """A transformers causal LM seen as a list of decoder layers with attention modules."""

    def __init__(self, model: PreTrainedModel) -> None:
        # The sizes, as the plan reads them; the dtype is the loaded one's.
        self.shape = replace(check_config(model.config), dtype=model.dtype)
        self.model = model
        self.base = model.get_decoder()
        layers = getattr(self.base, "layers", None)
        if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
            raise UserError(
                f"{type(model).__name__} is not supported: its decoder has no list `layers` "
                "of blocks with a `self_attn`"
            )
        self.layers: Sequence[nn.Module] = list(layers)
        self.attentions: list[Any] = [layer.self_attn for layer in self.layers]
        norms = [getattr(self.base, name) for name in FINAL_NORMS if hasattr(self.base, name)]
        self.final_norm: nn.Module | None = norms[0] if norms else None
        self.query_heads, self.kv_heads = self.shape.query_heads, self.shape.kv_heads
        self.head_dim, self.windows = self.shape.head_dim, self.shape.windows
        config = model.config.get_text_config(decoder=True)
        self.trained_positions: int = getattr(config, "max_position_embeddings", 0) or 0
        self.rotary_kinds = rotary_kinds(model.config)
        self.rotary_tables: dict[str, Any] = {}  # of the step at work, where they differ by layer
        self.length_rotary = length_rotary(self.base, model.config)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @contextmanager
    def handled_by(self, handlers: Sequence[Handler]) -> Iterator[None]:
        """Route every layer's attention to its handler; afterwards to where it went before.

        May be entered within itself: a decode step between two chunks of a prefill.
        """
        before = self.model.config._attn_implementation
        outer = [getattr(attention, "offload_handler", None) for attention in self.attentions]
        self.model.set_attn_implementation(IMPLEMENTATION)
        held = nullcontext() if self.length_rotary is None else self.length_rotary.held()
        try:
            for attention, handler in zip(self.attentions, handlers, strict=True):
                attention.offload_handler = handler
            with held:
                yield
        finally:
            for attention, before_it in zip(self.attentions, outer, strict=True):
                if before_it is not None:
                    attention.offload_handler = before_it
                elif hasattr(attention, "offload_handler"):
                    del attention.offload_handler
            self.model.set_attn_implementation(before)

    @contextmanager
    def observed_by(self, observer: Callable[[int, torch.Tensor, dict[str, Any]], None]) -> Iterator[None]:
        """Call observer(layer index, its input [B, T, E], its keyword arguments) before every layer."""

        def hook_for(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                observer(index, arguments[0], keywords)

            return hook

        handles = [
            layer.register_forward_pre_hook(hook_for(index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        if any(self.rotary_kinds):
            rotary = self.base.get_submodule("rotary_emb")
            handles.append(rotary.register_forward_hook(self._keep_table, with_kwargs=True))
        try:
            yield
        finally:
            self.rotary_tables = {}
            for handle in handles:
                handle.remove()

    def _keep_table(
        self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any
    ) -> None:
        kind = keywords["layer_type"] if "layer_type" in keywords else arguments[2]
        self.rotary_tables[kind] = out

    def check_call(self, index: int, call: AttentionCall) -> None:
        """UserError when a layer's attention has another shape or window than the config says."""
        heads = (call.query.shape[1], call.key.shape[1], call.value.shape[1])
        dims = {part.shape[3] for part in (call.query, call.key, call.value)}
        name = type(self.attentions[index]).__name__
        if heads != (self.query_heads, self.kv_heads, self.kv_heads) or dims != {self.head_dim}:
            raise UserError(
                f"{name} is not supported: queries, keys and values of layer {index} have {heads} heads of "
                f"{sorted(dims)} numbers where the config says {self.query_heads} and {self.kv_heads} of "
                f"{self.head_dim}"
            )
        if call.window != self.windows[index]:
            raise UserError(
                f"{name} is not supported: layer {index} attends to {call.window or 'all'} tokens where the "
                f"config says {self.windows[index] or 'all'}"
            )

    def normed_input(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What layer `index`'s attention module would be given for an input [..., E]."""
        norm = getattr(self.layers[index], "input_layernorm", None)
        return hidden if norm is None else norm(hidden)

    def predicted_query(
        self,
        index: int,
        hidden: torch.Tensor,
        keywords: dict[str, Any],
        correction: InputCorrection | None = None,
    ) -> tuple[torch.Tensor, float]:
        """Layer `index`'s query [B, Hq, T, D] and softmax scale, from its predecessor's input [B, T, E]."""
        attention = self.attentions[index]
        if correction is not None:
            hidden = correction.shift_input(index, hidden)
        normed = self.normed_input(index, hidden)
        if correction is not None:
            normed = correction.guess(index, normed)
        handler = attention.offload_handler
        kind = self.rotary_kinds[index]
        if kind is not None and kind != self.rotary_kinds[index - 1]:
            keywords = {**keywords, "position_embeddings": self.rotary_tables[kind]}
        attention.offload_handler = stop_at_query
        projections = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
        # nn.Linear and the packed forms of bitsandbytes and torchao say how wide their output is.
        unused: list[Any] = [part for part in projections if hasattr(part, "out_features")]
        forwards = [(projection, unfilled_output(projection)) for projection in unused]
        if correction is not None and index in correction.projections:
            forwards.append((attention.q_proj, lambda x: correction.project(index, x)))
        try:
            with replaced(forwards):
                attention(hidden_states=normed, **keywords)
        except QueryReady as ready:
            return ready.query, ready.scale
        finally:
            attention.offload_handler = handler
        raise UserError(f"{type(attention).__name__} does not use transformers' attention interface")
