"""The size of a model's weights, without loading them."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from .errors import UserError
from .model_check import first_line


@dataclass(frozen=True)
class Weights:
    """Parameter counts. active: those that one token uses (fewer in a mixture of experts).

    bits: of one quantised parameter, None for weights in the model's dtype.
    """

    total: int
    active: int
    bits: int | None = None

    def bytes_in(self, dtype: torch.dtype) -> int:
        return self.total * dtype.itemsize if self.bits is None else self.total * self.bits // 8

    def active_bytes_in(self, dtype: torch.dtype) -> int:
        return self.bytes_in(dtype) * self.active // self.total


def count_weights(config: PretrainedConfig) -> Weights:
    """Build the model on the meta device, where parameters have shapes but no memory, and count."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, ImportError) as error:
        reason = first_line(error)
        raise UserError(f"cannot build a model of type {config.model_type!r}: {reason}") from error
    total = active = 0
    share = expert_share(config)
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        active += int(parameter.numel() * share) if ".experts." in name else parameter.numel()
    return Weights(total, active, quantised_bits(config))


def expert_share(config: PretrainedConfig) -> float:
    """The part of a mixture's experts that one token visits; 1 for a dense model."""
    text = config.get_text_config(decoder=True)
    experts = next(
        (getattr(text, name) for name in ("num_local_experts", "num_experts", "n_routed_experts")
         if getattr(text, name, None)), None
    )  # fmt: skip
    visited = getattr(text, "num_experts_per_tok", None)
    return visited / experts if experts and visited else 1.0


def quantised_bits(config: PretrainedConfig) -> int | None:
    """Bits of a quantised checkpoint's parameters as its config says; None when it is not quantised."""
    quantisation = getattr(config, "quantization_config", None)
    if not quantisation:
        return None
    fields = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    if fields.get("load_in_4bit") or fields.get("quant_method") == "mxfp4":
        return 4
    return int(fields.get("bits") or fields.get("w_bit") or 8)
