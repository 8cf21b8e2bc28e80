"""A job with a fake model that answers at once, without torch: what the fault tests kill and watch.

python tests/jobs_fake.py INPUT OUTPUT [--places N] [--long HOW] ...
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from offload_runtime.errors import RunError, UserError
from offload_runtime.jobs import Answer, Job, LogLines, run_job
from offload_runtime.jobs.answers import OnStage
from offload_runtime.jobs.prompts import Template

CTX, NEW_TOKENS = 200, 20


class FakeModel:
    """Words are tokens; the answer is a digest of the prompt, the same every time.

    A document that holds a word of `failures` makes the model raise that error when it
    is taken up; one of `failures_together` when all that are at work go on.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        failures: dict[str, Exception] | None = None,
        places: int = 1,
        failures_together: dict[str, Exception] | None = None,
        sizes: tuple[int, ...] = (),
    ) -> None:
        self.seconds, self.places, self.sizes = seconds, places, sizes
        self.held: dict[Any, int] = {}  # the size of the place that a prompt at work has
        self.failures, self.failures_together = failures or {}, failures_together or {}
        self.prompts: dict[Any, tuple[str, int]] = {}
        self.most = 0  # prompts that were at work at once
        self.released = 0

    def count(self, prompt: str) -> int:
        return len(prompt.split())

    def free_size(self, tokens: int) -> int | None:
        """Of the smallest free place that holds so many."""
        free = list(self.sizes)
        for size in self.held.values():
            free.remove(size)
        return min((size for size in free if size >= tokens), default=None)

    def has_room(self, tokens: int) -> bool:
        return not self.prompts or tokens > max(self.sizes) or self.free_size(tokens) is not None

    def start(self, key: Any, prompt: str, max_new_tokens: int, on_stage: OnStage) -> None:
        raise_for(prompt, self.failures)
        assert len(self.prompts) < self.places
        if self.sizes:
            size = self.free_size(self.count(prompt) + max_new_tokens)
            if size is None:
                raise UserError("no free place has so many tokens")
            self.held[key] = size
        on_stage("prefill", 1, 2)
        self.prompts[key] = prompt, max_new_tokens
        self.most = max(self.most, len(self.prompts))

    def advance(self) -> list[tuple[Any, Answer]]:
        """All at work are answered but the first one, which takes a step longer when there are others."""
        for prompt, _ in self.prompts.values():
            raise_for(prompt, self.failures_together)
        time.sleep(self.seconds)
        ready = list(self.prompts)[1:] or list(self.prompts)
        for key in ready:
            self.held.pop(key, None)
        return [(key, self._answer(*self.prompts.pop(key))) for key in ready]

    def _answer(self, prompt: str, max_new_tokens: int) -> Answer:
        words = hashlib.sha256(prompt.encode()).hexdigest()[:8], f"{self.count(prompt)}", "words\u2028é"
        return Answer(" ".join(words), "stop", self.count(prompt), 3, 0.5, 0.25, 0.75, 1.0)

    def release(self) -> None:
        self.prompts, self.held = {}, {}
        self.released += 1


def raise_for(prompt: str, failures: dict[str, Exception]) -> None:
    for word, error in failures.items():
        if word in prompt.split():
            raise error


def make_job(source: Path | str, output: Path, **settings: object) -> Job:
    template = Template("Say what this is : ", " End .")
    values = {"ctx": CTX, "max_new_tokens": NEW_TOKENS, "combine": Template("Join : ", ""), **settings}
    return Job(str(source), output, template, **values)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("input")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--places", type=int, default=1)
    parser.add_argument("--long", default="map-reduce")
    options = parser.parse_args()
    job = make_job(options.input, options.output, long=options.long)
    try:
        summary = run_job(job, FakeModel(options.seconds, places=options.places), [LogLines()])
    except UserError as error:
        sys.exit(f"UserError: {error}")
    except RunError as error:
        sys.exit(f"RunError: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(143 if summary.stopped else 0)


if __name__ == "__main__":
    main()
