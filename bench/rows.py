"""A benchmark's results, one named row after the other, on disk after every row."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Rows:
    """A row that fails says why and the rest goes on; one that would end too late is left out, in words."""

    def __init__(self, out: Path, head: dict[str, Any], limit_s: float) -> None:
        """limit_s: seconds from now in which everything is to end."""
        self.out, self.report, self.limit_s = out, {**head, "rows": []}, limit_s
        self.started = time.perf_counter()
        out.parent.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def add(self, name: str, work: Callable[[], dict[str, Any]], expected_s: float = 0.0) -> bool:
        """Run `work` and keep what it returns under `name`; whether it ran to its end."""
        row: dict[str, Any] = {"row": name, "at_s": round(self.elapsed, 1)}
        done = False
        if self.elapsed + expected_s > self.limit_s:
            row["skipped"] = f"about {expected_s:.0f} s, more than are left"
        else:
            try:
                row |= work()
                done = True
            except Exception as error:  # whatever it is, the other rows are worth having
                row |= failure(error)
        row["took_s"] = round(self.elapsed - row["at_s"], 1)
        self.report["rows"].append(row)
        self.out.write_text(json.dumps(self.report, indent=1) + "\n")
        print(json.dumps(row), flush=True)
        return done


def failure(error: BaseException) -> dict[str, Any]:
    """Out of memory by name, anything else by its first line; frees what the failed row had allocated."""
    out_of_memory = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    error.__traceback__ = None  # it holds the frames, and they the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return {"out_of_memory": True, "error": first} if out_of_memory else {"error": first}
