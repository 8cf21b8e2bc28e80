"""Results on disk: one JSON object a line, appended and synced, so that a stopped run loses nothing."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import RunError, UserError

Row = dict[str, Any]


class Results:
    """The rows of one results file by their `key`. A line that was cut off while being written is dropped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, Row] = {}
        if file.exists():
            self._load()

    def _load(self) -> None:
        data = self.file.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.file} line {number} is no result of an evaluation; give another --out"
                ) from error
        if whole < len(data):
            os.truncate(self.file, whole)

    def add(self, row: Row) -> None:
        """Append one row; on return it is on the disk."""
        try:
            with self.file.open("ab") as stream:
                stream.write(json.dumps(row).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise RunError(f"cannot write {self.file}: {error.strerror}") from error
        self.rows[row["key"]] = row

    def select(self, keys: Iterable[str]) -> list[Row]:
        return [self.rows[key] for key in keys if key in self.rows]


def make_folder(out: Path) -> None:
    """Create the output folder; UserError when that cannot be done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} is no folder that can be written: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out} cannot be written to")
