"""What a calibration has collected so far, on disk, so that a stopped run goes on where it was.

A safetensors file beside the calibration file: the sums of every layer in
float64, written whole after each block, so a resumed run adds the same numbers
in the same order. Its header says what the sums depend on; a run with other
settings does not use it.
"""

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from .calibration_collect import Collection
from .calibration_maps import MOMENTS, LayerMoments
from .calibration_mass import MassSums
from .errors import RunError

FORMAT = "ds-offload calibration progress 2"


class Progress:
    """The side file of one calibration run. facts: everything that the collected sums depend on."""

    def __init__(self, out: Path, facts: dict[str, str]) -> None:
        self.file, self.facts = out.with_name(f".{out.name}.progress"), facts

    def load(self, layers: int, device: torch.device) -> tuple[Collection, int, str]:
        """(collection, blocks done, one line for the user); empty where there is nothing to go on from."""
        empty = Collection.of(layers)
        if not self.file.is_file():
            return empty, 0, ""
        try:
            with safe_open(self.file, "pt") as file:
                tensors, header = {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            return empty, 0, f"{self.file.name} cannot be read ({error}): starting anew"
        if header.get("format") != FORMAT or header.get("checksum") != checksum(tensors):
            return empty, 0, f"{self.file.name} is damaged: starting anew"
        theirs = json.loads(header["facts"])
        other = [name for name in self.facts if self.facts[name] != theirs.get(name)]
        if other:
            return empty, 0, f"{self.file.name} is of a run with another {other[0]}: starting anew"
        done = int(header["blocks"])
        return unpack(tensors, device), done, f"going on after {done} blocks of an earlier run"

    def save(self, collection: Collection, blocks: int) -> None:
        """Replace the file; RunError when that fails."""
        tensors = pack(collection)
        header = {"format": FORMAT, "facts": json.dumps(self.facts), "blocks": str(blocks)}
        partial = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        try:
            with partial.open("wb") as stream:
                stream.write(to_bytes(tensors, {**header, "checksum": checksum(tensors)}))
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(self.file)
        except OSError as error:
            raise RunError(f"cannot write {self.file}: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)

    def remove(self) -> None:
        """The calibration file is written: this one, and what a killed run left of one, are of no use."""
        for leftover in self.file.parent.glob(f"{self.file.name}*"):
            leftover.unlink(missing_ok=True)


def pack(collection: Collection) -> dict[str, torch.Tensor]:
    """Every layer's sums under names of their own."""
    tensors = {}
    for index, moments in enumerate(collection.layer_moments()):
        for name in MOMENTS:
            tensors[f"{index}.{name}"] = getattr(moments, name).cpu().contiguous()
        tensors[f"{index}.sizes"] = torch.tensor([moments.tokens, moments.group])
        mass = collection.mass[index]
        assert mass is not None
        tensors[f"{index}.held"], tensors[f"{index}.queries"] = mass.held, mass.queries
        tensors[f"{index}.recalls"] = torch.tensor(collection.recalls[index], dtype=torch.float64)
        shifted = collection.shifted_recalls[index]
        tensors[f"{index}.shifted_recalls"] = torch.tensor(shifted, dtype=torch.float64)
    for index, moved in collection.shifts.sums.items():
        tensors[f"{index}.shift"] = moved.cpu()
        tensors[f"{index}.shift_tokens"] = torch.tensor(collection.shifts.tokens[index])
    return tensors


def unpack(tensors: dict[str, torch.Tensor], device: torch.device) -> Collection:
    """What pack() was given."""
    layers = sum(name.endswith(".sizes") for name in tensors)
    collection = Collection.of(layers)
    for index in range(layers):
        sums = {name: tensors[f"{index}.{name}"].to(device) for name in MOMENTS}
        tokens, group = tensors[f"{index}.sizes"].tolist()
        collection.moments[index] = LayerMoments(**sums, tokens=tokens, group=group)
        mass = MassSums(len(tensors[f"{index}.held"]))
        mass.held, mass.queries = tensors[f"{index}.held"], tensors[f"{index}.queries"]
        collection.mass[index] = mass
        collection.recalls[index] = tensors[f"{index}.recalls"].tolist()
        collection.shifted_recalls[index] = tensors[f"{index}.shifted_recalls"].tolist()
        if f"{index}.shift" in tensors:
            collection.shifts.sums[index] = tensors[f"{index}.shift"].to(device)
            collection.shifts.tokens[index] = int(tensors[f"{index}.shift_tokens"])
    return collection


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 over names and bytes, in the order of the names."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(name.encode(), value))
    return str(value)
