"""Reading case files; whatever is wrong with one is a single clear line."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from ..errors import UserError


def read_jsonl(file: Path, limit: int) -> list[dict[str, Any]]:
    """The first `limit` objects of a JSON-lines file, gzipped if its name ends in .gz."""
    rows: list[dict[str, Any]] = []
    try:
        with (
            gzip.open(file, "rt", encoding="utf-8")
            if file.suffix == ".gz"
            else file.open(encoding="utf-8") as text
        ):
            for number, line in enumerate(text, 1):
                if len(rows) == limit:
                    break
                if line.strip():
                    rows.append(parse(line, file, number))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start})") from error
    if not rows:
        raise UserError(f"{file} holds no cases")
    return rows


def parse(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{file} line {number} is not JSON; give a file with one JSON object a line"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{file} line {number} is not a JSON object")
    return row


def text_field(row: dict[str, Any], name: str, file: Path, index: int) -> str:
    """A string field; UserError when it is missing."""
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"{file} line {index + 1} has no text {name!r}; this suite needs it")
    return value
