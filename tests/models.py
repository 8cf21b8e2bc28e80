"""Tiny random models and helpers that compare the runtime with untouched transformers."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from offload_runtime import OffloadedModel, RuntimeConfig
from offload_runtime.calibration import Calibration

VOCABULARY = 128


def random_llama(
    query_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """A Llama with random weights, sharper than the default initialisation so that selection matters."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().to(device=device, dtype=dtype)


def random_ids(
    length: int, batch: int = 1, seed: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator).to(device)


def offloaded(model: PreTrainedModel, **settings: object) -> OffloadedModel:
    """An OffloadedModel of small windows, so that short prompts reach every boundary."""
    small = {"ctx": 4096, "sinks": 4, "recent": 16, "chunk_tokens": 64, **settings}
    return OffloadedModel(model, RuntimeConfig(**small))


def logits_of(
    generate, ids: torch.Tensor, new_tokens: int, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy output ids [B, T + new] and logits [new, B, V] of transformers' or the runtime's generate."""
    out = generate(
        ids,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return out.sequences, torch.stack(out.logits).float()


def identity_calibration(model: PreTrainedModel, channels: int = 16) -> Calibration:
    """The first channels of every key as its label; every layer but the first is predicted."""
    config = model.config
    layers, heads, kv_heads = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    unit = torch.eye(config.head_dim)[:channels]
    return Calibration(
        query_map=unit.expand(layers, heads, -1, -1),
        key_map=unit.expand(layers, kv_heads, -1, -1),
        key_mean=torch.zeros(layers, kv_heads, config.head_dim),
        unpredicted_layers=(0,),
        provenance={},
    )


def check_predictions_matter_to_predict_only(
    model: PreTrainedModel, ids: torch.Tensor, calibration: Calibration
) -> None:
    """With this calibration "correct" gives the bits of "off", and "predict" others."""

    def logits(prefetch: str) -> torch.Tensor:
        runtime = offloaded(model, budget=24, prefetch=prefetch)
        runtime.calibration = calibration
        return logits_of(runtime.generate, ids, 8)[1]

    assert torch.equal(logits("correct"), logits("off"))
    assert not torch.equal(logits("predict"), logits("off"))
