"""The output file: whole lines only, whatever happens, and one job at a time.

A line is there once it is written and fsynced. kill -9 or a power cut can leave
at most a torn last line, which the next start cuts off; a failed write is
taken back at once.
"""

import errno
import fcntl
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import RunError, UserError
from .meta import check_meta

Record = dict[str, Any]


class OutputFile:
    """An open, locked output. `done`: ids with a line. `retried`: failed ids whose line was dropped."""

    def __init__(
        self, path: Path, settings: dict[str, Any], force: bool = False, retry_failed: bool = False
    ) -> None:
        self.path = path
        self.done: set[str] = set()
        self.failed: set[str] = set()
        self.retried: set[str] = set()
        self.file = open_locked(path)
        try:
            check_meta(path, settings, os.fstat(self.file).st_size > 0, force)
            records = self._repair()
            self.failed = {record["id"] for record in records if record.get("error")}
            if retry_failed and self.failed:
                records = [record for record in records if not record.get("error")]
                self._replace(records)
                self.retried, self.failed = self.failed, set()
            self.done = {record["id"] for record in records}
        except BaseException:
            self.close()
            raise

    def append(self, records: Sequence[Record]) -> None:
        """Write and fsync the lines of new ids; RunError when that fails, and then none of them is there."""
        fresh = [record for record in records if record["id"] not in self.done]
        if not fresh:
            return
        if not is_still(self.file, self.path):
            raise RunError(
                f"{self.path} was removed or replaced while the job ran; put it back and start again"
            )
        end = os.fstat(self.file).st_size
        try:
            write_all(self.file, b"".join(map(to_line, fresh)))
            os.fsync(self.file)
        except BaseException as error:
            os.ftruncate(self.file, end)
            if isinstance(error, OSError):
                raise write_error(self.path, error) from error
            raise
        self.done.update(record["id"] for record in fresh)
        self.failed.update(record["id"] for record in fresh if record["error"])

    def close(self) -> None:
        """Close and unlock."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _repair(self) -> list[Record]:
        """Cut off a torn last line; returns the records of the whole ones."""
        with open(self.file, "rb", closefd=False) as reader:
            reader.seek(0)
            data = reader.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self.file, whole)
        return [self._parse(line, number) for number, line in enumerate(data[:whole].splitlines(), 1)]

    def _parse(self, line: bytes, number: int) -> Record:
        try:
            record: Record = json.loads(line)
            known = isinstance(record["id"], str)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UserError(
                f"line {number} of --output {self.path} is not a line of a job; something else wrote to it"
            )
        return record

    def _replace(self, records: Sequence[Record]) -> None:
        """Put a file with these records in this one's place, whole or not at all; the lock passes on."""
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            new = os.open(part, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            fcntl.flock(new, fcntl.LOCK_EX)
            write_all(new, b"".join(map(to_line, records)))
            os.fsync(new)
            os.replace(part, self.path)
            sync_folder(self.path)
        except BaseException as error:
            os.close(new)
            part.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise write_error(self.path, error) from error
            raise
        os.close(self.file)
        self.file = new


def open_locked(path: Path) -> int:
    """Open for appending and lock. The lock goes away with the process, however that ends."""
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise UserError(f"--output {path} cannot be written: give a file in a folder that is there")
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"--output {path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"another job is writing to {path}; wait for it or choose another output"
                ) from error
            raise RunError(f"cannot lock {path}: {error.strerror}; use a local disk for --output") from error
        if is_still(file, path):
            sync_folder(path)
            return file
        os.close(file)  # another job put a new file in its place (--retry-failed) before we had the lock


def sync_folder(path: Path) -> None:
    """Make a new or renamed file's name durable, where the folder can be synced; lines are synced anyway."""
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def is_still(file: int, path: Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file), there)


def to_line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def write_error(path: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write to {path}: {error.strerror}; every finished line is kept: "
        "make room and start the same command again"
    )
