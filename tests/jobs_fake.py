"""A job with a fake model that answers at once, without torch: what the fault tests kill and watch.

python tests/jobs_fake.py INPUT OUTPUT [--batch-size N] [--long HOW] ...
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from offload_runtime.errors import RunError, UserError
from offload_runtime.jobs import Answer, Job, LogLines, run_job
from offload_runtime.jobs.answers import OnStage
from offload_runtime.jobs.prompts import Template

CTX, NEW_TOKENS = 200, 20


class FakeModel:
    """Words are tokens; the answer is a digest of the prompt, the same every time.

    A document that holds a word of `failures` makes the model raise that error.
    """

    def __init__(self, seconds: float = 0.0, failures: dict[str, Exception] | None = None) -> None:
        self.seconds, self.failures = seconds, failures or {}
        self.batches: list[int] = []
        self.released = 0

    def count(self, prompt: str) -> int:
        return len(prompt.split())

    def answer(self, prompts: Sequence[str], max_new_tokens: int, on_stage: OnStage) -> list[Answer]:
        self.batches.append(len(prompts))
        for word, error in self.failures.items():
            if any(word in prompt.split() for prompt in prompts):
                raise error
        on_stage("prefill", 1, 2)
        time.sleep(self.seconds)
        return [self._answer(prompt, max_new_tokens) for prompt in prompts]

    def _answer(self, prompt: str, max_new_tokens: int) -> Answer:
        words = hashlib.sha256(prompt.encode()).hexdigest()[:8], f"{self.count(prompt)}", "words\u2028é"
        return Answer(" ".join(words), "stop", self.count(prompt), 3, 0.5, 0.25, 0.75, 1.0)

    def release(self) -> None:
        self.released += 1


def make_job(source: Path | str, output: Path, **settings: object) -> Job:
    template = Template("Say what this is : ", " End .")
    values = {"ctx": CTX, "max_new_tokens": NEW_TOKENS, "combine": Template("Join : ", ""), **settings}
    return Job(str(source), output, template, **values)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("input")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--long", default="map-reduce")
    options = parser.parse_args()
    job = make_job(options.input, options.output, batch_size=options.batch_size, long=options.long)
    try:
        summary = run_job(job, FakeModel(options.seconds), [LogLines()])
    except UserError as error:
        sys.exit(f"UserError: {error}")
    except RunError as error:
        sys.exit(f"RunError: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(143 if summary.stopped else 0)


if __name__ == "__main__":
    main()
