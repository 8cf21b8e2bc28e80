"""A JSONL file as documents: listed once by offset, each line read again when its turn comes."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .errors import DocumentError, InputChanged
from .readers import check_text

DEFAULT_ID_FIELD = "id"


@dataclass(frozen=True)
class LineSource:
    """One line: where it lies, and a checksum to notice that the file changed under the job."""

    id: str
    path: Path
    number: int  # from 1
    offset: int
    size: int
    checksum: int
    text_field: str

    def read(self) -> str:
        name = f"line {self.number} of {self.path}"
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                line = file.read(self.size)
        except OSError as error:
            raise InputChanged(
                f"cannot read {self.path}: {error.strerror}; bring it back and start again"
            ) from error
        if zlib.crc32(line) != self.checksum:
            raise InputChanged(f"{name} changed while the job ran; start the job again")
        text = parse(line, name).get(self.text_field)
        if not isinstance(text, str):
            raise DocumentError(f"{name} has no text in field {self.text_field!r} (see --text-field)")
        return check_text(text, name)


def list_lines(path: Path, prefix: str, text_field: str, id_field: str | None) -> list[LineSource]:
    """The file's documents. A line that is no JSON object is listed too and fails when read.

    id_field: a field every line must have; None takes "id" where there is one and line-N elsewhere.
    """
    sources, offset = [], 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    name = prefix + line_id(line, number, id_field, path)
                    sources.append(
                        LineSource(name, path, number, offset, len(line), zlib.crc32(line), text_field)
                    )
                offset += len(line)
    except OSError as error:
        raise UserError(f"cannot read --input {path}: {error.strerror}") from error
    return sources


def line_id(line: bytes, number: int, id_field: str | None, path: Path) -> str:
    try:
        record = parse(line, "")
    except DocumentError:
        return f"line-{number}"
    value = record.get(id_field or DEFAULT_ID_FIELD)
    if isinstance(value, (str, int)) and str(value):
        return str(value)
    if id_field is not None:
        raise UserError(f"line {number} of {path} has no id in field {id_field!r} (see --id-field)")
    return f"line-{number}"


def parse(line: bytes, name: str) -> dict[str, Any]:
    """The line's JSON object; DocumentError when it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{name} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise DocumentError(f"{name} is no JSON object")
    return record
