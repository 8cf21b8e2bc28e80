"""What differs between architectures beyond the usual decoder layer. Everything of that kind is here.

The usual layer needs nothing: its own module projects, normalises and rotates,
and hands query, key and value to transformers' attention interface. Four
things reach beyond one layer:

- which layers slide, and how far they see (`layer_windows`);
- rotary tables that differ by layer type (`rotary_kinds`: Gemma 3, OLMo 3);
- rotary frequencies that change with the sequence's length (`LengthRotary`:
  longrope of Phi-3, dynamic NTK);
- mixtures of experts whose grouped matrix product waits for the GPU
  (`capturable_experts`).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .errors import UserError

LENGTH_DEPENDENT = ("dynamic", "longrope")  # kinds of RoPE, as transformers names them


def layer_windows(config: Any) -> tuple[int, ...]:
    """Tokens that each layer sees, the current one included; 0 for all of them.

    Families with layer_types slide in those of type "sliding_attention"; families
    without (Mistral, Mixtral, Phi-3, Qwen3-MoE) slide in every layer if the config has a window.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None) or 0
    if getattr(text, "use_sliding_window", True) is False:
        window = 0
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def rotary_kinds(config: Any) -> tuple[str | None, ...]:
    """Each layer's kind of rotary table, None for every layer where there is one table for all."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or [None] * text.num_hidden_layers
    groups = getattr(text, "rope_parameters", None) or {}
    by_kind = all(isinstance(groups.get(kind), dict) for kind in kinds)
    return tuple(kinds) if by_kind else (None,) * len(kinds)


class LengthRotary:
    """A rotary module whose frequencies depend on length, held at one choice for a whole sequence.

    transformers chooses by the largest position of every forward call. Keys of
    one sequence would turn by different frequencies, and dynamic NTK makes the
    host wait for the GPU. Here `choose` decides once, before prefill, by the
    longest that the sequence can become, and the forward function is transformers'
    own without its length check. The frequencies stay where they are, because
    CUDA graphs read them.
    """

    def __init__(self, rotary: nn.Module, config: Any) -> None:
        self.rotary, self.config = rotary, config
        rope = config.rope_parameters
        self.kind: str = rope["rope_type"]
        self.trained = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        self.long = False
        self.frequencies = self._frequencies(self.trained)

    def _frequencies(self, tokens: int) -> torch.Tensor:
        device = self.rotary.inv_freq.device
        frequencies, _ = ROPE_INIT_FUNCTIONS[self.kind](self.config, device, seq_len=tokens)
        return frequencies.clone()

    def choose(self, tokens: int) -> None:
        """Set the frequencies for sequences of up to `tokens`."""
        long = tokens > self.trained
        if long and self.kind == "dynamic":
            raise UserError(
                f"{tokens} tokens are beyond the {self.trained} that this model was trained for, and its "
                "dynamic RoPE turns all keys anew when the sequence grows; choose a fixed one in its config"
            )
        if long != self.long:
            self.frequencies.copy_(self._frequencies(self.trained + int(long)))
            self.long = long

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the rotary module use the chosen frequencies, without its length check."""
        rotary: Any = self.rotary
        before, plain = rotary.inv_freq, inspect.unwrap(type(rotary).forward)
        rotary.inv_freq, rotary.forward = self.frequencies, MethodType(plain, rotary)
        try:
            yield
        finally:
            rotary.inv_freq = before
            rotary.__dict__.pop("forward", None)


def has_length_rotary(config: Any) -> bool:
    """Whether the model's rotary frequencies depend on a sequence's length."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return rope.get("rope_type") in LENGTH_DEPENDENT


def length_rotary(base: nn.Module, config: Any) -> LengthRotary | None:
    """The model's rotary module where its frequencies depend on length, else None."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    groups = [group for group in rope.values() if isinstance(group, dict)]
    if any(group.get("rope_type") in LENGTH_DEPENDENT for group in groups):
        raise UserError(
            f"model type {text.model_type!r} is not supported with RoPE that depends on length and layer type"
        )
    if rope.get("rope_type") not in LENGTH_DEPENDENT:
        return None
    return LengthRotary(base.get_submodule("rotary_emb"), text)


# Compute capabilities for which torch's grouped product stays on the GPU (GroupedBlas.cpp, use_fast_path:
# H100, H200, B200); elsewhere it asks the GPU for the groups' sizes.
GROUPED_ON_GPU = (9, 10)


@contextmanager
def capturable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Let a mixture's experts run without waiting for the GPU, as a CUDA graph must.

    torch's grouped product does so in bfloat16 on some GPUs; otherwise it, like
    transformers' loop over experts, asks the GPU for the groups' sizes. transformers'
    batched product never does, at the price of a copy of the visited experts' weights.
    For a few tokens a step, not for prefill.
    """
    before: Any = getattr(model.config, "_experts_implementation", None)
    waits = before == "eager" or (before == "grouped_mm" and not grouped_stays_on_gpu(model))
    if not waits or not type(model)._can_set_experts_implementation():
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def grouped_stays_on_gpu(model: PreTrainedModel) -> bool:
    if model.dtype != torch.bfloat16:
        return False
    on_gpu = model.device.type == "cuda"
    return not on_gpu or torch.cuda.get_device_capability(model.device)[0] in GROUPED_ON_GPU
