"""Watching a job: what a watcher hears, and the one that writes log lines."""

import sys
import time
from typing import TextIO

from .link import LinkRate
from .output import Record
from .worker import Outcome

LOG_SECONDS = 30.0  # between lines about a document at work


class Watcher:
    """Hears what a job does. This one says nothing (--quiet)."""

    def start(self, documents: int, size: int) -> None:
        """Documents to do and their bytes on disk."""

    def stage(self, name: str, stage: str, done: int, total: int) -> None:
        """What is being done with a document; total is 0 where there is nothing to count."""

    def finish(self, outcome: Outcome, size: int) -> None:
        """A line is written; size: the document's bytes on disk."""

    def close(self) -> None:
        """The job is over."""


class Pace:
    """Documents, bytes and tokens done so far, the rate, and the time that is left at it."""

    def __init__(self, documents: int, size: int) -> None:
        self.documents, self.size = documents, size
        self.done = self.failed = self.done_size = self.prompt_tokens = self.new_tokens = 0
        self.started = time.perf_counter()

    def add(self, record: Record, size: int) -> None:
        self.done += 1
        self.failed += bool(record["error"])
        self.done_size += size
        self.prompt_tokens += record["prompt_tokens"]
        self.new_tokens += record["new_tokens"]

    @property
    def tokens_per_s(self) -> float:
        """Prompt and new tokens a second, over everything so far."""
        return (self.prompt_tokens + self.new_tokens) / max(time.perf_counter() - self.started, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Seconds left if bytes go on at the rate of those done; None before the first."""
        if not self.done_size:
            return None
        return (time.perf_counter() - self.started) * (self.size - self.done_size) / self.done_size


class LogLines(Watcher):
    """Plain lines on stderr: one a document, and one every half minute while a document takes longer."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stderr
        self.last = time.perf_counter()
        self.pace = Pace(0, 0)
        self.at_work: set[str] = set()
        self.link = LinkRate()

    def start(self, documents: int, size: int) -> None:
        self.pace = Pace(documents, size)
        self._say(f"{documents} documents to do, {size / 1e6:.1f} MB")

    def stage(self, name: str, stage: str, done: int, total: int) -> None:
        self.at_work.add(name)
        if time.perf_counter() - self.last >= LOG_SECONDS:
            share = f" {done / total:.0%}" if total else ""
            others = f"; {len(self.at_work)} at work" if len(self.at_work) > 1 else ""
            link = f"; {self.link.words()}" if self.link.words() else ""
            self._say(f"{name}: {stage}{share}{others}{link}")

    def finish(self, outcome: Outcome, size: int) -> None:
        record = outcome.record
        self.at_work.discard(record["id"])
        self.pace.add(record, size)
        self._say(
            f"[{self.pace.done}/{self.pace.documents}] {record['id']}: {in_words(record)}{self._rest()}"
        )

    def close(self) -> None:
        self.link.close()

    def _rest(self) -> str:
        left = self.pace.left_s
        return "" if left is None else f"; {self.pace.tokens_per_s:.0f} tokens/s, {clock(left)} left"

    def _say(self, text: str) -> None:
        self.last = time.perf_counter()
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self.file, flush=True)


def in_words(record: Record) -> str:
    """What became of a document, in a few words."""
    if record["error"]:
        return f"failed: {record['error']}"
    fitted = record["fitted"]
    how = "" if fitted["method"] == "whole" else f" ({fitted['method']})"
    return f"{fitted['document_tokens']} tokens{how}, {record['new_tokens']} new, {record['seconds']:.1f} s"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
