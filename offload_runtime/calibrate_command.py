"""`ds-offload calibrate`: run a model over text files and write its calibration file."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .adapter import ModelAdapter
from .calibration import Calibration
from .calibration_collect import collect, make_blocks, make_calibration
from .calibration_maps import METHODS, check_request
from .config import DEFAULT_LABEL_CHANNELS
from .engine import CALIBRATION_FILE, choose_device
from .errors import UserError
from .loading import load_tokenizer
from .model_check import first_line

DEFAULT_TOKENS = 32768  # measured: 8,192 give the mass that 16,384 give; four times that to be safe
BLOCK_TOKENS = 4096  # one forward pass: long enough for N/16 to be a choice, small beside the weights


def calibrate(
    model: str | Path,
    text_files: Sequence[str | Path],
    method: str = "projection",
    channels: int = DEFAULT_LABEL_CHANNELS,
    out: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Calibrate a model directory or hub name on UTF-8 text files; returns the file written.

    method: one of METHODS; channels: R. out: default calibration.safetensors in the
    model's directory. tokens: how many of the text's tokens to run, in blocks spread
    over it. progress(done, total) counts layers x blocks. UserError in one line.
    """
    if method not in METHODS:
        raise UserError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    target = output_path(model, out)
    text = read_texts(text_files)
    place = choose_device(device)
    loaded = load_model(model, place)
    tokenizer = load_tokenizer(model)
    adapter, name = ModelAdapter(loaded), Path(model).name
    made = calibrate_text(adapter, tokenizer, text, name, method, channels, tokens, seed, progress)
    made.save(target)
    return target


def calibrate_text(
    adapter: ModelAdapter,
    tokenizer: Any,
    text: str,
    name: str,
    method: str,
    channels: int,
    tokens: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Calibration:
    """calibrate() for a loaded model and text; name is what the file calls the model."""
    check_request(channels, method, adapter.head_dim)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    if min(len(ids), tokens) < 2 * channels:
        raise UserError(
            f"{min(len(ids), tokens)} tokens of text are too few for {channels} label channels; "
            f"give at least {2 * channels}, better {DEFAULT_TOKENS}"
        )
    prefix = torch.tensor(tokenizer("").input_ids, dtype=torch.long)  # <bos> for most models
    room = adapter.trained_positions or BLOCK_TOKENS
    blocks = make_blocks(ids, prefix, tokens, max(1, min(BLOCK_TOKENS, room - len(prefix))), seed)
    collection = collect(adapter, blocks, room, seed, progress)
    facts = {
        "model": name,
        "text_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
        "tokens": str(sum(len(block) for block in blocks)),
        "positions": str(room),
        "seed": str(seed),
    }
    return make_calibration(adapter, collection, channels, method, facts)


def output_path(model: str | Path, out: str | Path | None) -> Path:
    """Where the file goes; UserError when that is nowhere or cannot be written to."""
    if out is None and not Path(model).is_dir():
        raise UserError(f"{model} is not a directory, so say where the calibration file goes: --out FILE")
    target = Path(model) / CALIBRATION_FILE if out is None else Path(out)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"cannot write {target}: give a file in a directory that exists")
    return target


def read_texts(text_files: Sequence[str | Path]) -> str:
    """All files in one string; UserError when one is missing or not UTF-8 text."""
    if not text_files:
        raise UserError("calibration needs a text; give one UTF-8 file or more with --text")
    texts = []
    for path in text_files:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
        except OSError as error:
            raise UserError(f"cannot read text file {path}: {error.strerror}") from error
    return "\n\n".join(texts)


def load_model(model: str | Path, place: torch.device) -> PreTrainedModel:
    """The model in its own dtype on CUDA, in float32 on CPU."""
    dtype: str | torch.dtype = "auto" if place.type == "cuda" else torch.float32
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load model {model}: {first_line(error)}") from error
    torch.nn.Module.to(loaded, place)
    return loaded.eval()
