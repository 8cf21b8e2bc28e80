"""A prefilled document on disk: rows, labels and calibration of a session, to go on from without prefill.

A directory: snapshot.json says what it is (model, weights, layout, sizes and
checksums), tokens.bin has the token ids, calibration.safetensors what the labels
were made with, layer-000.bin and on the layers. Only
tokens that exist are written, so a snapshot does not depend on the capacity,
budget, slots, sinks or recent window that it was made with.
"""

import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .adapter import ModelAdapter
from .cache.layer_cache import LayerCache
from .cache.layout import KVLayout, biting
from .cache.window_cache import WindowCache
from .calibration import Calibration, config_facts
from .config import RuntimeConfig
from .errors import RunError, UserError
from .layouts import make_layout
from .session import Session
from .snapshot_files import (
    DamagedFile,
    atomic_directory,
    byte_view,
    read_tensors,
    remove_leftovers,
    replaced_name,
    sync_file,
    write_tensors,
)

FORMAT, VERSION = "ds-offload cache", 1
HEADER, TOKENS, CALIBRATION = "snapshot.json", "tokens.bin", "calibration.safetensors"
FILES_AT_ONCE = 8  # threads, a layer each: a checksum runs at about 1 GB/s a core, fast disks at 5 and more
SAMPLED_ELEMENTS = 256  # of every parameter, for the fingerprint of the weights
SAME_LAYOUT = ("batch", "query_heads", "kv_heads", "head_dim", "label_channels", "label_bits")


def save(session: Session, directory: str | Path) -> None:
    """Write the session's cached tokens as a snapshot, whole or not at all; RunError when that fails."""
    target = check_target(directory)
    lengths = [len(ids) for ids in session.cached_ids]
    if 0 in lengths:
        raise UserError("there is nothing to save yet: generate first, then save the cache")
    if session.adapter.device.type == "cuda":
        torch.cuda.synchronize(session.adapter.device)
    try:
        remove_leftovers(target)  # they count as used
        size = sum(t.nbytes for cache in session.caches for t in pieces(cache, lengths))
        free = shutil.disk_usage(target.parent).free
        if size > free:
            raise RunError(f"cannot save the cache to {target}: it needs {size / 1e9:.2f} GB of disk, "
                           f"{free / 1e9:.2f} GB are free")  # fmt: skip
        with atomic_directory(target) as part:
            write_all(session, lengths, part)
    except OSError as error:
        raise RunError(f"cannot save the cache to {target}: {error.strerror or error}") from error


def check_target(directory: str | Path) -> Path:
    """The directory to save to; UserError for one that holds something else."""
    target = Path(directory).resolve()
    if not target.parent.is_dir():
        raise UserError(f"cannot save the cache to {target}: there is no folder {target.parent}")
    if target.exists() and not target.is_dir():
        raise UserError(f"cannot save the cache to {target}: it is a file")
    if target.is_dir() and any(target.iterdir()) and not (target / HEADER).is_file():
        raise UserError(f"cannot save the cache to {target}: it holds other files; name an empty or new one")
    return target


def write_all(session: Session, lengths: Sequence[int], folder: Path) -> None:
    def write(index: int) -> tuple[str, dict[str, int]]:
        name = layer_file(index)
        return name, write_tensors(folder / name, pieces(session.caches[index], lengths))

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        files = dict(pool.map(write, range(len(session.caches))))
    files[TOKENS] = write_tensors(folder / TOKENS, (ids.long() for ids in session.cached_ids))
    session.calibration.save(folder / CALIBRATION)
    files[CALIBRATION] = sync_file(folder / CALIBRATION)
    adapter = session.adapter
    header = {
        "format": FORMAT,
        "version": VERSION,
        "model": plain(config_facts(adapter.model.config)),
        "weights": weights_fingerprint(adapter.model),
        "layout": layout_facts(session.layout),
        "windows": list(biting(adapter.windows, session.layout.capacity)),
        "capacity": session.layout.capacity,
        "long_rotary": session.long_rotary,
        "lengths": list(lengths),
        "files": files,
    }
    text = json.dumps({**header, "checksum": header_checksum(header)}, indent=1)
    write_tensors(folder / HEADER, [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)])


@dataclass(frozen=True)
class Snapshot:
    """A snapshot's directory and its checked header; nothing of the layers is read yet."""

    directory: Path
    header: dict[str, Any]

    @classmethod
    def open(cls, directory: str | Path) -> "Snapshot":
        """Read and check the header and every file's size; UserError when it is no snapshot or damaged."""
        folder = Path(directory).resolve()
        if not folder.exists() and replaced_name(folder).is_dir():
            folder = replaced_name(folder)  # its replacement died half-way
        if not (folder / HEADER).is_file():
            raise UserError(f"{directory} is no saved cache: it has no {HEADER}")
        try:
            header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
            checksum = header.pop("checksum")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise damaged(folder, f"{HEADER} cannot be read") from error
        if checksum != header_checksum(header):
            raise damaged(folder, f"{HEADER} was changed")
        if (header["format"], header["version"]) != (FORMAT, VERSION):
            raise UserError(
                f"the cache in {folder} has a format that this version cannot read; save it again"
            )
        for name, record in header["files"].items():
            file = folder / name
            if not file.is_file():
                raise damaged(folder, f"{name} is missing")
            if file.stat().st_size != record["bytes"]:
                raise damaged(folder, f"{name} has {file.stat().st_size} of {record['bytes']} bytes")
        return cls(folder, header)

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.header["lengths"])

    def check_config(self, model_config: Any) -> None:
        """UserError when it was made with another model's config."""
        facts, theirs = plain(config_facts(model_config)), self.header["model"]
        wrong = [name for name in facts if facts[name] != theirs.get(name)]
        if wrong:
            shown = ", ".join(f"{name} {theirs.get(name)} there, {facts[name]} here" for name in wrong)
            raise self.foreign(f"another model ({shown})")

    def check(
        self, adapter: ModelAdapter, config: RuntimeConfig, calibration: Calibration | None
    ) -> Calibration:
        """Its calibration; UserError when it is another model's or made with labels of another kind.

        calibration: the one that the model has here, None for one that calibrates itself.
        """
        self.check_config(adapter.model.config)
        own = self.calibration()
        channels = own.key_map.shape[2]
        self.check_layout(make_layout(adapter.shape, config, channels, self.header["layout"]["batch"], 1))
        if config.label_channels not in (None, channels):
            raise self.foreign(
                f"other settings (label_channels {channels} there, {config.label_channels} here)"
            )
        if calibration is not None and not same_maps(calibration, own):
            raise self.foreign("another calibration")
        if self.header["weights"] != weights_fingerprint(adapter.model):
            raise self.foreign("other weights of the same shape")
        if self.tokens >= config.ctx:
            raise UserError(f"the cache in {self.directory} has {self.tokens} tokens and ctx is {config.ctx}")
        return own

    def calibration(self) -> Calibration:
        """The calibration that its labels were made with."""
        file, record = self.directory / CALIBRATION, self.header["files"][CALIBRATION]
        if sync_file(file) != record:
            raise damaged(self.directory, f"{CALIBRATION} is damaged: its checksum is wrong")
        return Calibration.load(file)

    def check_layout(self, layout: KVLayout) -> None:
        """UserError when its bytes would read otherwise in caches of this layout."""
        ours, theirs = layout_facts(layout), self.header["layout"]
        wrong = [name for name in ours if ours[name] != theirs[name]]
        if wrong:
            shown = ", ".join(f"{name} {theirs[name]} there, {ours[name]} here" for name in wrong)
            raise self.foreign(f"other settings ({shown})")

    def capacity(self, adapter: ModelAdapter, config: RuntimeConfig, new_tokens: int) -> int:
        """Tokens to make room for: the new ones as well, if the same layers slide then."""
        wanted = config.capacity(min(self.tokens + new_tokens, config.ctx))
        for capacity in (wanted, self.header["capacity"]):
            if list(biting(adapter.windows, capacity)) == self.header["windows"]:
                return capacity
        raise self.foreign("a model whose layers slide otherwise")

    def fill(self, session: Session) -> None:
        """Read everything into a new session's caches, layers in parallel; UserError when damaged."""
        lengths, files = self.header["lengths"], self.header["files"]
        self.check_layout(session.layout)  # fit=True may have chosen other label bits
        ids = [torch.empty(length, dtype=torch.long) for length in lengths]

        def read(index: int) -> None:
            name = layer_file(index)
            read_tensors(self.directory / name, pieces(session.caches[index], lengths), files[name])

        try:
            read_tensors(self.directory / TOKENS, ids, files[TOKENS])
            with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                list(pool.map(read, range(len(session.caches))))
        except DamagedFile as error:
            raise damaged(self.directory, str(error)) from error
        except OSError as error:
            raise RunError(f"cannot read the cache in {self.directory}: {error.strerror or error}") from error
        if session.adapter.device.type == "cuda":
            torch.cuda.synchronize(session.adapter.device)
        session.cached_ids, session.long_rotary = ids, self.header["long_rotary"]

    def foreign(self, reason: str) -> UserError:
        return UserError(f"the cache in {self.directory} was saved with {reason}; prefill the document again")


def damaged(folder: Path, reason: str) -> UserError:
    return UserError(f"the cache in {folder} is damaged: {reason}; delete it and prefill the document again")


def layer_file(index: int) -> str:
    return f"layer-{index:03d}.bin"


def pieces(cache: LayerCache | WindowCache, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """One layer's tensors in file order, contiguous views of the cache: sequences, then heads."""
    for sequence, length in enumerate(lengths):
        for head in range(cache.layout.kv_heads):
            if isinstance(cache, WindowCache):
                yield cache.ring[sequence, head, : min(length, cache.window)]
                continue
            yield cache.host.rows[sequence, head, :length]
            yield cache.labels.codes[sequence, head, :length]
            yield cache.labels.scales[sequence, head, :length]


def layout_facts(layout: KVLayout) -> dict[str, Any]:
    """What of a layout decides how its bytes read."""
    return {name: getattr(layout, name) for name in SAME_LAYOUT} | {"dtype": str(layout.dtype)}


def plain(facts: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return json.loads(json.dumps(facts))


def header_checksum(header: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


def weights_fingerprint(model: torch.nn.Module) -> int:
    """CRC-32 of every parameter's name, shape and some evenly spaced elements.

    Cheap: nothing is read whole. It tells models and fine-tunes apart, not a
    change that keeps to elements between the samples.
    """
    checksum = 0
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, len(flat) // SAMPLED_ELEMENTS)
        checksum = zlib.crc32(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode(), checksum)
        checksum = zlib.crc32(byte_view(flat[::step].contiguous().cpu()), checksum)
    return checksum


def same_maps(one: Calibration, other: Calibration) -> bool:
    names = ("query_map", "key_map", "key_mean")
    pairs = [(getattr(one, name).float().cpu(), getattr(other, name).float().cpu()) for name in names]
    return all(torch.equal(a, b) for a, b in pairs)
