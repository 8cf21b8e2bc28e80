"""What a model's config says before its weights load: its shape, and whether the runtime can decode it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .architectures import layer_windows
from .errors import UserError

SUPPORTED_LAYERS = ("full_attention", "sliding_attention")
STATE_SPACE_FIELDS = (
    "ssm_state_size",
    "state_size",
    "mamba_d_state",
    "conv_L_cache",
    "rwkv_hidden_size",
    "lru_width",
)
# Attention that the config does not tell apart from the usual one.
OTHER_ATTENTION = {"diffllama": "differential attention"}
DECODERS_WANTED = "ds-offload decodes causal LMs of rotary full-attention layers (Llama, Qwen, Mistral, ...)"


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory and time follow from. trained_positions is 0 when the config does not say."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    trained_positions: int
    dtype: torch.dtype
    windows: tuple[int, ...]  # tokens each layer sees, 0 for all
    experts_used: int = 1  # by one token


def load_config(
    name_or_path: str,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> PretrainedConfig:
    """The config of a model directory or hub name; UserError in one line when there is none."""
    if Path(name_or_path).is_file():
        raise UserError(f"--model {name_or_path} is a file; give the model's directory or its hub name")
    folder = Path(name_or_path)
    if gguf_file is None and folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{name_or_path} is no model directory: it has no config.json")
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).exists():
        raise UserError(f"there is no model directory {name_or_path}")
    try:
        config = AutoConfig.from_pretrained(
            name_or_path,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            **({} if gguf_file is None else {"gguf_file": gguf_file}),
        )
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        file = name_or_path if gguf_file is None else f"{name_or_path}/{gguf_file}"
        raise UserError(f"cannot read the config of model {file}: {first_line(error)}") from error
    assert isinstance(config, PretrainedConfig)
    return config


def first_line(error: BaseException) -> str:
    """The first sentence of a library's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_config(config: PretrainedConfig) -> ModelShape:
    """The model's shape; UserError naming the reason when the runtime cannot decode it."""
    shape = None
    try:
        reason = why_unsupported(config)
        shape = None if reason else read_shape(config)
    except (AttributeError, TypeError, RuntimeError) as error:  # fields that are absent or differ by layer
        reason = first_line(error)
    if shape is None or reason:
        raise UserError(f"model type {config.model_type!r} is not supported: {reason}. {DECODERS_WANTED}")
    return shape


def read_shape(config: PretrainedConfig) -> ModelShape:
    """The shape of a supported config."""
    text = config.get_text_config(decoder=True)
    heads = int(text.num_attention_heads)
    return ModelShape(
        model_type=config.model_type,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query_heads=heads,
        kv_heads=kv_heads(text, heads),
        head_dim=head_dim(text),
        vocab=text.vocab_size,
        trained_positions=trained_positions(text),
        dtype=config_dtype(config, text),
        windows=layer_windows(config),
        experts_used=getattr(text, "num_experts_per_tok", None) or 1,
    )


def why_unsupported(config: PretrainedConfig) -> str | None:
    """One phrase, or None when nothing speaks against the model."""
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    text = config.get_text_config(decoder=True)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - set(SUPPORTED_LAYERS))
    if getattr(text, "kv_lora_rank", None):
        return "its keys and values are compressed (multi-head latent attention, MLA)"
    if any(kind in ("linear_attention", "mamba", "conv", "hybrid") for kind in others) or any(
        getattr(text, field, None) for field in STATE_SPACE_FIELDS
    ):
        return "it has state-space, convolution or linear-attention layers, which keep no rows of keys"
    if others:
        return f"it has layers of type {others[0]}"
    if getattr(text, "num_attention_heads", None) is None:
        return "it has no attention heads (state-space or recurrent model)"
    if getattr(text, "alibi", False) or not is_rotary(text):
        return "its attention has no rotary position embedding (RoPE)"
    if getattr(text, "num_kv_shared_layers", 0) or getattr(text, "cross_attention_layers", None):
        return "some of its layers attend to keys that are not their own"
    if (getattr(text, "v_head_dim", None) or head_dim(text)) != head_dim(text):
        return "its values have another head size than its keys"
    if config.model_type in OTHER_ATTENTION:
        return f"it has {OTHER_ATTENTION[config.model_type]}"
    remote = bool(getattr(config, "auto_map", None))
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote:
        return "transformers has no causal LM of this type"
    return None


def is_rotary(text: Any) -> bool:
    return bool(getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None))


def head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def kv_heads(text: Any, query_heads: int) -> int:
    """KV heads; Falcon's older configs say it with a flag."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    for field in ("num_key_value_heads", "num_kv_heads"):
        value = getattr(text, field, None)
        if value:
            return int(value)
    return query_heads


def trained_positions(text: Any) -> int:
    """Positions the model was trained or rescaled for; 0 when unknown.

    A scaling that names its original length reaches original x factor; configs
    differ in whether max_position_embeddings already says so.
    """
    stated = int(getattr(text, "max_position_embeddings", 0) or 0)
    rope = getattr(text, "rope_parameters", None) or {}
    groups = [group for group in rope.values() if isinstance(group, dict)] or [rope]
    scaled = [
        int(group["original_max_position_embeddings"] * group.get("factor", 1))
        for group in groups
        if group.get("original_max_position_embeddings") and group.get("rope_type") != "default"
    ]
    return max([stated, *scaled])


def config_dtype(config: Any, text: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_label_channels(label_channels: int | None, shape: ModelShape) -> None:
    """R label channels of a key of head_dim numbers: more would store more than the key."""
    if label_channels is not None and label_channels > shape.head_dim:
        raise UserError(
            f"label_channels is {label_channels} but this model's head_dim is {shape.head_dim}; "
            f"choose --label-channels {shape.head_dim} or less"
        )


def position_warning(tokens: int, shape: ModelShape) -> str | None:
    """A warning for more tokens than the model was trained to place, or None."""
    if not shape.trained_positions or tokens <= shape.trained_positions:
        return None
    return (
        f"{tokens} tokens are beyond the {shape.trained_positions} positions this model was trained for; "
        "expect poor text, or stretch its RoPE if it is not scaled yet: --rope-scaling "
        f"yarn:{-(-tokens // shape.trained_positions)}"
    )


def config_note(config: PretrainedConfig) -> str | None:
    """What a user should know of a supported config, or None."""
    if getattr(config.get_text_config(decoder=True), "dual_chunk_attention_config", None):
        return (
            "this model's config asks for dual chunk attention, which transformers does not compute; "
            "it runs with plain RoPE and loses quality past the length of a chunk"
        )
    return None


def embedded_model() -> str:
    """Directory of the small model that ships with the package."""
    return os.fspath(Path(__file__).parent / "data" / "tiny-256k")
