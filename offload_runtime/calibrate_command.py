"""`ds-offload calibrate`: run a model over text files and write its calibration file."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .adapter import ModelAdapter
from .calibration import Calibration, config_facts
from .calibration_channels import published_maps
from .calibration_collect import Collection, collect, make_blocks, make_calibration, provenance_of
from .calibration_file import CALIBRATION_FILE
from .calibration_guess import guess_units, with_guesses
from .calibration_learned import DOCUMENT_TOKENS, DOCUMENTS, learn
from .calibration_maps import METHODS, check_request
from .calibration_progress import Progress
from .config import CALIBRATION_TOKENS, DEFAULT_LABEL_CHANNELS
from .devices import choose_device
from .errors import UserError
from .loading import load_model, load_tokenizer, read_config, scale_rope
from .snapshot import weights_fingerprint

BLOCK_TOKENS = 4096  # one forward pass: long enough for N/16 to be a choice, small beside the weights
Report = Callable[[int, int], None]  # (layers x blocks done, layers x blocks in all)

log = logging.getLogger(__name__)


def calibrate(
    model: str | Path,
    text_files: Sequence[str | Path] = (),
    method: str = "projection",
    channels: int = DEFAULT_LABEL_CHANNELS,
    out: str | Path | None = None,
    tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
    device: str = "auto",
    progress: Report | None = None,
    channels_from: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    rope_scaling: str | None = None,
    quantize: str | None = None,
    **hub: Any,
) -> Path:
    """Calibrate a model directory, hub name or GGUF file on UTF-8 text files; returns the file written.

    method: one of METHODS; channels: R. out: default calibration.safetensors in the
    model's directory. tokens: how many of the text's tokens to run, in blocks spread
    over it; "learned" reads up to 98,304 more. A run that was stopped goes on where it was
    when it is started again with the same settings, but for the guesses and what "learned" does
    after the blocks. progress(done, total) counts layers x blocks, once more for the guesses, and
    layers learned. channels_from: a JSON file of channels as Double Sparsity publishes them; a text is then
    optional, and tells which layers to predict. dtype, rope_scaling, quantize, hub (gguf_file, revision,
    token, trust_remote_code): as in load_model. UserError in one line.
    """
    if method not in METHODS:
        raise UserError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    target = output_path(model, out, rope_scaling)
    maps = None
    if channels_from is not None:
        config = read_config(model, **hub)
        if rope_scaling is not None:
            scale_rope(config, rope_scaling)
        check_request(channels, method, config_facts(config)["head_dim"])
        maps = published_maps(Path(channels_from), method, channels, config_facts(config))
        if not text_files:
            facts = {"model": Path(model).name, "channels_from": Path(channels_from).name}
            provenance = {**provenance_of(config, method, channels), **facts}
            Calibration(*maps, unpredicted_layers=(0,), provenance=provenance).save(target)
            return target
    text = read_texts(text_files)
    place, forms = choose_device(device), {"rope_scaling": rope_scaling, "quantize": quantize}
    loaded = load_model(model, place, dtype=dtype, **forms, **hub)
    adapter, name = ModelAdapter(loaded), Path(model).name
    made = calibrate_text(
        adapter, load_tokenizer(model, **hub), text, name, method, channels, tokens, seed, progress, target
    )
    if maps is not None:
        facts = {**made.provenance, "channels_from": Path(str(channels_from)).name}
        made = replace(made, query_map=maps[0], key_map=maps[1], key_mean=maps[2], provenance=facts)
    made.save(target)
    side_file(target).remove()
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
    progress: Report | None,
    resumable_at: Path | None = None,
) -> Calibration:
    """calibrate() for a loaded model and text; name is what the file calls the model.

    resumable_at: where the calibration file will be; what is collected is kept beside it.
    """
    check_request(channels, method, adapter.head_dim)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    if min(len(ids), tokens) < 2 * channels:
        raise UserError(
            f"{min(len(ids), tokens)} tokens of text are too few for {channels} label channels; "
            f"give at least {2 * channels}, better {CALIBRATION_TOKENS}"
        )
    prefix = torch.tensor(tokenizer("").input_ids, dtype=torch.long)  # <bos> for most models
    room = adapter.trained_positions or BLOCK_TOKENS
    blocks = make_blocks(ids, prefix, tokens, max(1, min(BLOCK_TOKENS, room - len(prefix))), seed)
    facts = {
        "model": name,
        "text_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
        "tokens": str(sum(len(block) for block in blocks)),
        "positions": str(room),
        "seed": str(seed),
    }
    layers, learns = len(adapter.layers), method == "learned"
    units, guess_seen = layers * len(blocks), guess_units(adapter, len(blocks))

    def report(done: int, _: int = 0) -> None:
        if progress is not None:
            progress(done, units + guess_seen + layers * learns)

    if resumable_at is None:
        collection = collect(adapter, blocks, room, seed, report)
    else:
        collection = collect_resumably(adapter, blocks, room, seed, report, side_file(resumable_at, facts))
    made = make_calibration(adapter, collection, channels, method, facts)
    made = with_guesses(made, adapter, blocks, lambda done: report(units + done))
    if not learns:
        return made
    # Two at least, of the tokens that there are.
    length = max(1, min(DOCUMENT_TOKENS, room - len(prefix), -(-len(ids) // 2)))
    documents = make_blocks(ids, prefix, DOCUMENTS * length, length, seed)
    return with_learned_maps(
        made, adapter, documents, room, seed, lambda done: report(units + guess_seen + done)
    )


def with_learned_maps(
    made: Calibration,
    adapter: ModelAdapter,
    documents: Sequence[torch.Tensor],
    positions: int,
    seed: int,
    progress: Callable[[int], None],
) -> Calibration:
    """The calibration with the maps that learn() makes of its own; progress(layers done)."""
    start = list(zip(made.query_map, made.key_map, made.key_mean, strict=True))
    learned = learn(adapter, start, documents, positions, seed, progress)
    query_map, key_map, key_mean = (
        torch.stack([part.cpu() for part in parts]) for parts in zip(*learned, strict=True)
    )
    return replace(made, query_map=query_map, key_map=key_map, key_mean=key_mean)


def side_file(target: Path, facts: dict[str, str] | None = None) -> Progress:
    return Progress(target, facts or {})


def collect_resumably(
    adapter: ModelAdapter,
    blocks: Sequence[torch.Tensor],
    positions: int,
    seed: int,
    progress: Report | None,
    side: Progress,
) -> Collection:
    """collect(), from what `side` holds of a stopped run of the same model, text and settings.

    The sums do not depend on method and R, so a rerun may ask for others.
    """
    blocks_hash = hashlib.sha256(b"".join(block.numpy().tobytes() for block in blocks)).hexdigest()
    side.facts = {
        **side.facts,
        "weights": str(weights_fingerprint(adapter.model)),
        "blocks": blocks_hash,
        "arithmetic": f"{adapter.dtype} on {adapter.device.type}, torch {torch.__version__}",
    }
    known, done, note = side.load(len(adapter.layers), adapter.device)
    if note:
        log.warning(note)
    return collect(adapter, blocks, positions, seed, progress, (known, done), side.save)


def output_path(model: str | Path, out: str | Path | None, rope_scaling: str | None = None) -> Path:
    """Where the file goes; UserError when that is nowhere or cannot be written to.

    The file in a model's directory is for the model as it is: a stretched one has other keys.
    """
    if out is None and rope_scaling is not None:
        raise UserError(
            f"with rope_scaling {rope_scaling} say where the calibration file goes: --out FILE; "
            "the one in the model's directory is for the model without it"
        )
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
