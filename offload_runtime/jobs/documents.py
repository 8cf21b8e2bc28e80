"""The documents of a job: files of a folder or a pattern, or the lines of a JSONL file."""

import glob
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import UserError
from .jsonl import list_lines
from .meta import META_SUFFIX, meta_file
from .readers import READERS, check_libraries, read_file


class Source(Protocol):
    """One document, not read yet. size: its bytes on disk, for progress."""

    @property
    def id(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self) -> str:
        """The text. DocumentError when there is none; InputChanged when the whole input did."""


@dataclass(frozen=True)
class FileSource:
    """A document in a file of its own."""

    id: str
    path: Path
    size: int

    def read(self) -> str:
        return read_file(self.path)


def find_documents(pattern: str, text_field: str = "text", id_field: str | None = None) -> list[Source]:
    """The documents of DIR | FILE.jsonl | FILE | GLOB, sorted, with unique ids.

    A file's id is its path below the folder (or below the fixed part of the
    pattern); a JSONL line's is its id field, or line-N. UserError when there
    are none, two have one id, or a library to read them is missing.
    """
    base, paths = find_files(pattern)
    if not paths:
        kinds = " ".join(sorted(READERS))
        raise UserError(f"--input {pattern}: there are no documents (a folder is searched for {kinds})")
    check_libraries(paths)
    sources: list[Source] = []
    for path in paths:
        name = path.relative_to(base).as_posix()
        if path.suffix.lower() == ".jsonl":
            prefix = "" if len(paths) == 1 else f"{name}:"
            sources += list_lines(path, prefix, text_field, id_field)
        else:
            sources.append(FileSource(name, path, size_of(path)))
    if not sources:
        raise UserError(f"--input {pattern}: the file has no lines")
    check_ids(sources)
    return sources


def find_files(pattern: str) -> tuple[Path, list[Path]]:
    """The folder that ids are relative to, and the files in order."""
    place = Path(pattern)
    if os.path.isdir(place):
        found = [path for path in place.rglob("*") if path.suffix.lower() in READERS]
        found = [path for path in found if not is_hidden(path, place)]
        return place, sorted(path for path in found if is_document(path))
    if os.path.isfile(place):
        return place.parent, [place]
    if not glob.has_magic(pattern):
        raise UserError(f"--input: there is no file or folder {pattern}")
    matches = map(Path, glob.glob(pattern, recursive=True))
    return fixed_part(place), sorted(path for path in matches if is_document(path))


def is_document(path: Path) -> bool:
    """A file that is no job's output or sidecar: a job may write beside what it reads."""
    ours = path.name.endswith(META_SUFFIX) or os.path.exists(meta_file(path))
    return os.path.isfile(path) and not ours


def is_hidden(path: Path, base: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(base).parts)


def fixed_part(pattern: Path) -> Path:
    """The folders of a pattern before its first wildcard."""
    parts: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone already; reading it will say so on its own line
        return 0


def check_ids(sources: list[Source]) -> None:
    seen: set[str] = set()
    for source in sources:
        if source.id in seen:
            raise UserError(f"two documents have the id {source.id!r}; ids must be unique (see --id-field)")
        seen.add(source.id)


def take_shard(sources: list[Source], index: int, count: int) -> list[Source]:
    """Shard index (from 1) of count. By a hash of the id: adding a document never moves another one."""
    return [source for source in sources if zlib.crc32(source.id.encode()) % count == index - 1]
