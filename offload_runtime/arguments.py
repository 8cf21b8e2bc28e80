"""Arguments of generate: what is refused by name, and padding to where transformers expects it."""

from typing import Any

import torch
from transformers import GenerationConfig

from .errors import UserError

# Arguments of transformers' generate that change the loop itself, and what to say of them.
UNSUPPORTED = {
    "num_beams": "beam search",
    "num_beam_groups": "group beam search",
    "penalty_alpha": "contrastive search",
    "prompt_lookup_num_tokens": "prompt lookup decoding",
    "assistant_model": "assisted decoding",
    "assistant_early_exit": "early-exit decoding",
    "dola_layers": "DoLa decoding",
    "constraints": "constrained beam search",
    "force_words_ids": "constrained beam search",
    "output_attentions": "returning attentions",
    "output_hidden_states": "returning hidden states",
    "past_key_values": "a cache of transformers",
    "cache": "a cache of transformers",
    "cache_implementation": "a cache of transformers",
    "inputs_embeds": "embeddings as input",
    "custom_generate": "a custom generate function",
}


def refuse_unsupported(generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """UserError naming the first thing asked for that this runtime does not do."""
    for name, meaning in UNSUPPORTED.items():
        value = kwargs.get(name, getattr(generation_config, name, None))
        trivial = value is None or value is False or (name.startswith("num_beam") and value == 1)
        if not trivial:
            raise UserError(f"{meaning} ({name}={value!r}) is not supported; leave {name} out")


def pad_left(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same batch with its padding on the left, where transformers expects it."""
    if attention_mask is None or bool(attention_mask[:, -1].all()):
        return input_ids, attention_mask
    attention_mask = attention_mask.to(input_ids.device)
    order = attention_mask.long().argsort(dim=1, stable=True)  # hidden tokens first, order kept
    return input_ids.gather(1, order), attention_mask.gather(1, order)
