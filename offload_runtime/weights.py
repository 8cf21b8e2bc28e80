"""The size of a model's weights, without loading them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from .errors import UserError
from .model_check import first_line


@dataclass(frozen=True)
class Weights:
    """Parameter counts. active: those that one token uses (fewer in a mixture of experts).

    kept: parameters that quantisers leave in the model's dtype: embeddings, the
    output projection, norms and biases. bits: of each other one when quantised, scales
    included; None for weights in the model's dtype. embedding: parameters of the input embedding
    where nothing else uses them: a token reads one row of it. stacked: parameters of experts that
    are one tensor a layer. largest: those of the largest matrix that a quantiser packs.
    """

    total: int
    active: int
    kept: int = 0
    bits: float | None = None
    embedding: int = 0
    stacked: int = 0
    largest: int = 0

    def quantised(self, bits: float) -> "Weights":
        """As --quantize leaves them. Its packages pack linear layers; experts in one tensor are none."""
        return replace(self, bits=bits, kept=self.kept + self.stacked)

    def unpacked_bytes_in(self, dtype: torch.dtype) -> int:
        """Of the copy in the model's dtype that a product of many tokens makes of one packed matrix."""
        return 0 if self.bits is None else self.largest * dtype.itemsize

    def bytes_in(self, dtype: torch.dtype) -> int:
        if self.bits is None:
            return self.total * dtype.itemsize
        return self.kept * dtype.itemsize + int((self.total - self.kept) * self.bits / 8)

    def active_bytes_in(self, dtype: torch.dtype) -> int:
        return self.bytes_in(dtype) * self.active // self.total

    def read_bytes_in(self, dtype: torch.dtype) -> int:
        """What a decode step reads: the active ones but for the input embedding."""
        return self.active_bytes_in(dtype) - self.embedding * dtype.itemsize

    @property
    def multiplied(self) -> int:
        """Parameters of the layers' matrices that each token of a prefill is multiplied with."""
        return self.active - self.kept


def count_weights(config: PretrainedConfig) -> Weights:
    """Build the model on the meta device, where parameters have shapes but no memory, and count."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, ImportError) as error:
        reason = first_line(error)
        raise UserError(f"cannot build a model of type {config.model_type!r}: {reason}") from error
    total = active = kept = stacked = 0
    share = expert_share(config)
    outer = [part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part]
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.dim() < 2 or any(parameter is weight for weight in outer):
            kept += parameter.numel()
        elif parameter.dim() > 2:
            stacked += parameter.numel()
        active += int(parameter.numel() * share) if ".experts." in name else parameter.numel()
    embedding = outer[0].numel() if len(outer) == 2 and outer[0] is not outer[1] else 0
    return Weights(total, active, kept, quantised_bits(config), embedding, stacked, largest_matrix(model))


def loaded_weights(model: Any) -> Weights:
    """Of a model whose weights are in memory already: only what its packed ones need to work in."""
    return Weights(0, 0, bits=quantised_bits(model.config), largest=largest_matrix(model))


def largest_matrix(model: Any) -> int:
    """Parameters of the largest linear layer but the output projection, packed or not."""
    output = model.get_output_embeddings()
    linear = [part for part in model.modules() if hasattr(part, "in_features") and part is not output]
    return max((part.in_features * part.out_features for part in linear), default=0)


def expert_share(config: PretrainedConfig) -> float:
    """The part of a mixture's experts that one token visits; 1 for a dense model."""
    text = config.get_text_config(decoder=True)
    experts = next(
        (getattr(text, name) for name in ("num_local_experts", "num_experts", "n_routed_experts")
         if getattr(text, name, None)), None
    )  # fmt: skip
    visited = getattr(text, "num_experts_per_tok", None)
    return visited / experts if experts and visited else 1.0


def quantised_bits(config: PretrainedConfig) -> float | None:
    """Bits of a quantised checkpoint's parameters as its config says; None when it is not quantised."""
    quantisation = getattr(config, "quantization_config", None)
    if not quantisation:
        return None
    fields = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    if fields.get("load_in_4bit") or fields.get("quant_method") == "mxfp4":
        return 4.5  # 4 bits and a scale: 32 bits of every 64 weights, 8 of every 32 in mxfp4
    return float(fields.get("bits") or fields.get("w_bit") or 8)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a loaded model's parameters, packed ones with their scales."""
    return sum(parameter_bytes(parameter) for parameter in model.parameters())


def parameter_bytes(parameter: torch.Tensor) -> int:
    if hasattr(parameter, "__tensor_flatten__"):  # torchao: a tensor made of tensors
        names, _ = parameter.__tensor_flatten__()
        return sum(parameter_bytes(getattr(parameter, name)) for name in names)
    scales = getattr(getattr(parameter, "quant_state", None), "absmax", None)  # bitsandbytes
    return parameter.nbytes + (0 if scales is None else scales.nbytes)
