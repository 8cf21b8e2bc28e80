"""Loading weights: directories, hub names and GGUF files; RoPE scaling and quantisation on the way.

Everything is transformers' own loader; what can go wrong there becomes one line.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoHfQuantizer

from .errors import RunError, UserError
from .model_check import check_config, first_line, load_config

# --quantize: (package it needs, bits a weight; bitsandbytes keeps a float32 scale of every 64)
QUANTISERS = {"bnb-4bit": ("bitsandbytes", 4.5), "torchao-int8": ("torchao", 8)}
# What transformers reads a quantised checkpoint with, where it does not itself name all that is missing.
CHECKPOINT_PACKAGES = {"gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",)}
ROPE_SCALINGS = ("yarn", "linear")  # those that need no more than a factor and do not change with length


def locate(name_or_path: str | Path, gguf_file: str | None = None) -> tuple[str, dict[str, str]]:
    """Where transformers looks: a directory or hub name, and gguf_file=... for a GGUF file."""
    path = Path(name_or_path)
    if gguf_file is None and path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(
                f"there is no file {path}; for one on the hub give its repository and --gguf-file"
            )
        return str(path.parent), {"gguf_file": path.name}
    if gguf_file is not None and path.is_dir() and not (path / gguf_file).is_file():
        raise UserError(f"there is no file {gguf_file} in {path}")
    return str(name_or_path), {} if gguf_file is None else {"gguf_file": gguf_file}


def read_config(name_or_path: str | Path, gguf_file: str | None = None, **hub: Any) -> PretrainedConfig:
    """The config of a model in any form; UserError in one line."""
    place, gguf = locate(name_or_path, gguf_file)
    if gguf:
        require_package("gguf", "to read GGUF files")
        require_package("accelerate", "to read GGUF files")
    config = load_config(place, **hub, gguf_file=gguf.get("gguf_file"))
    if gguf and config.dtype is None:
        config.dtype = (
            torch.bfloat16
        )  # GGUF weights are unpacked; two bytes hold every kind transformers reads
    return config


def load_model(
    name_or_path: str | Path,
    place: torch.device,
    *,
    dtype: str | torch.dtype | None = None,
    rope_scaling: str | None = None,
    quantize: str | None = None,
    quantization_config: Any = None,
    gguf_file: str | None = None,
    **hub: Any,
) -> PreTrainedModel:
    """The model on `place`. dtype: default the checkpoint's own on CUDA and float32 on CPU.

    quantization_config: one of transformers' own, instead of a name in quantize.
    """
    config = read_config(name_or_path, gguf_file, **hub)
    check_config(config)
    if rope_scaling is not None:
        warnings.warn(scale_rope(config, rope_scaling), stacklevel=3)
    folder, gguf = locate(name_or_path, gguf_file)
    if dtype is None:
        dtype = (config.dtype if gguf else "auto") if place.type == "cuda" else torch.float32
    options: dict[str, Any] = {"config": config, "dtype": dtype, **hub, **gguf}
    if quantize is not None:
        quantization_config = quantisation(quantize, config, compute_type(dtype, config))
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    quantised = quantization_config is not None or getattr(config, "quantization_config", None) is not None
    if quantised:
        check_quantisation(config)
        options["device_map"] = {"": place}  # packed weights are made where they stay
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError, SafetensorError) as error:
        raise RunError(f"cannot load model {name_or_path}: {first_line(error)}") from error
    except RuntimeError as error:  # sizes that differ from the config's, or no GPU for its quantisation
        if out_of_memory(error):
            raise  # the caller's to explain
        reason = "its weights have other shapes than its config says"
        reason = reason if "mismatched" in str(error) else first_line(error)
        raise RunError(f"cannot load model {name_or_path}: {reason}") from error
    model, report = loaded
    if quantised:
        return model
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would draw them at random, and warn
        raise RunError(
            f"cannot load model {name_or_path}: its files lack {len(missing)} weights, {missing[0]} for one"
        )
    return model.to(place)


def load_tokenizer(name_or_path: str | Path, gguf_file: str | None = None, **hub: Any) -> Any:
    """The model's tokenizer; UserError when it has none."""
    folder, gguf = locate(name_or_path, gguf_file)
    try:
        return AutoTokenizer.from_pretrained(folder, **hub, **gguf)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = first_line(error)
        if reason.endswith(":"):  # a list of ways to make one follows, which says nothing of this model
            reason = "none of its files is one (tokenizer.json, tokenizer.model)"
        raise UserError(f"model {name_or_path} has no usable tokenizer: {reason}") from error


def scale_rope(config: PretrainedConfig, wanted: str) -> str:
    """Set "yarn:4" or "linear:4" in a config; returns the warning that goes with it."""
    kind, _, number = wanted.partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if kind not in ROPE_SCALINGS or factor <= 1:
        kinds = " or ".join(f"{name}:4" for name in ROPE_SCALINGS)
        raise UserError(f"rope_scaling is {wanted!r}; give a kind and a factor above 1: {kinds}")
    text = config.get_text_config(decoder=True)
    rope = text.rope_parameters
    rope = rope.get("full_attention", rope)  # sliding layers never look further than they were trained to
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"this model's RoPE is scaled already ({rope['rope_type']}); leave rope_scaling out")
    trained = text.max_position_embeddings
    rope.update(rope_type=kind, factor=factor)
    if kind == "yarn":
        rope["original_max_position_embeddings"] = trained
    text.max_position_embeddings = int(trained * factor)
    return (
        f"RoPE scaling {wanted} stretches {trained} trained positions to {text.max_position_embeddings}; "
        "expect lower quality, on short prompts too, unless the model was trained for it"
    )


def quantisation(wanted: str, config: PretrainedConfig, compute: torch.dtype = torch.bfloat16) -> Any:
    """transformers' quantization config for "bnb-4bit" or "torchao-int8". compute: type of the products."""
    if wanted not in QUANTISERS:
        raise UserError(f"quantize is {wanted!r}; choose one of {', '.join(QUANTISERS)}")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError("this checkpoint is quantised already; leave quantize out")
    require_package(QUANTISERS[wanted][0], f"for quantize {wanted}")
    if wanted == "bnb-4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def compute_type(dtype: str | torch.dtype | None, config: PretrainedConfig) -> torch.dtype:
    """The type that products with packed weights are made in: the model's."""
    if isinstance(dtype, torch.dtype):
        return dtype
    named: str | torch.dtype | None = config.dtype if dtype in (None, "auto") else dtype
    if isinstance(named, str):
        named = getattr(torch, named)
    return named if isinstance(named, torch.dtype) else torch.bfloat16


def check_quantisation(config: PretrainedConfig) -> None:
    """UserError when a checkpoint is quantised in a way that transformers does not know.

    It would warn and take the packed numbers for weights. Or when packages for it are missing.
    """
    own = getattr(config, "quantization_config", None) or {}
    fields = own if isinstance(own, dict) else own.to_dict()
    if "quant_method" in fields and not AutoHfQuantizer.supports_quant_method(fields):
        raise UserError(
            f"this checkpoint is quantised with {fields['quant_method']!r}, which this version of "
            "transformers does not read; take another checkpoint of the model"
        )
    method = str(fields.get("quant_method", "quantised"))
    require_package(("accelerate", *CHECKPOINT_PACKAGES.get(method, ())), f"to load {method} weights")


def require_package(names: str | tuple[str, ...], purpose: str) -> None:
    """UserError naming every package of these that is not installed."""
    wanted = (names,) if isinstance(names, str) else names
    absent = [name for name in wanted if importlib.util.find_spec(name) is None]
    if absent:
        what = (
            "package " + absent[0] + " is"
            if len(absent) == 1
            else "packages " + " and ".join(absent) + " are"
        )
        raise UserError(f"the {what} needed {purpose}: pip install {' '.join(absent)}")


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
