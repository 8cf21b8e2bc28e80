"""Running a job: each line is written and fsynced as soon as its document is done."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from ..errors import RunError, UserError
from .answers import Answerer
from .documents import Source, find_documents, take_shard
from .job import Job
from .output import OutputFile
from .progress import Watcher
from .stopping import StopRequest
from .worker import Outcome, Worker


@dataclass(frozen=True)
class Summary:
    """What a run did.

    documents: in the input, or in its shard; earlier: those that had a line
    before; failed: error lines in the output now.
    """

    documents: int
    earlier: int
    written: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    pinned_gb: float = 0.0
    gpu_peak_gb: float | None = None
    stopped: bool = False  # by SIGTERM

    @property
    def left(self) -> int:
        return self.documents - self.earlier - self.written


class JobRun:
    """A job with its documents listed and its output open and locked. Nothing is computed before run().

    So a caller can find every mistake, and that nothing is left to do, before it loads a model.
    """

    def __init__(self, job: Job) -> None:
        sources = find_documents(job.input, job.text_field, job.id_field)
        if os.path.realpath(job.input) == os.path.realpath(job.output_file):
            raise UserError(f"--output {job.output} is the input; give another file")
        self.job = job
        self.sources = sources if job.shard is None else take_shard(sources, *job.shard)
        self.output = OutputFile(job.output_file, job.settings(), job.force, job.retry_failed)
        known = {source.id for source in self.sources}
        self.summary = Summary(len(known), len(known & self.output.done), failed=len(self.output.failed))

    @property
    def left(self) -> list[Source]:
        """Documents that have no line yet."""
        return [source for source in self.sources if source.id not in self.output.done]

    def run(self, model: Answerer, watchers: Sequence[Watcher] = ()) -> Summary:
        """Do the documents that are left. RunError when the job has to end; its lines are kept."""

        def on_document(name: str, stage: str, done: int, total: int) -> None:
            for watcher in watchers:
                watcher.stage(name, stage, done, total)

        def results(stop: StopRequest) -> Iterator[list[Outcome]]:
            worker = Worker(self.job, model, on_document, lambda: stop.asked)
            for outcome in worker.work(self.left):
                yield [outcome]

        return self.collect(results, watchers)

    def collect(
        self, results: Callable[[StopRequest], Iterable[Sequence[Outcome]]], watchers: Sequence[Watcher]
    ) -> Summary:
        """Write outcomes as they come. When SIGTERM asks to stop it is up to `results` to come to an end."""
        started, errors = time.perf_counter(), 0
        sizes = {source.id: source.size for source in self.left}
        for watcher in watchers:
            watcher.start(len(sizes), sum(sizes.values()))
        with StopRequest() as stop:
            for outcomes in results(stop):
                fresh = [outcome for outcome in outcomes if outcome.record["id"] in sizes]
                self.output.append([outcome.record for outcome in fresh])
                self._count(fresh, time.perf_counter() - started)
                for watcher in watchers:
                    for outcome in fresh:
                        watcher.finish(outcome, sizes[outcome.record["id"]])
                errors += sum(1 for outcome in fresh if outcome.record["error"])
                if self.job.max_errors is not None and errors > self.job.max_errors:
                    raise RunError(
                        f"{errors} documents failed, more than --max-errors {self.job.max_errors}; "
                        f"the reasons are in {self.output.path}"
                    )
            if stop.asked:
                self.summary = replace(self.summary, stopped=True)
        return self.summary

    def _count(self, fresh: Sequence[Outcome], seconds: float) -> None:
        answers = [answer for outcome in fresh for answer in outcome.answers]
        peaks = [answer.gpu_peak_gb for answer in answers if answer.gpu_peak_gb is not None]
        before = self.summary
        if before.gpu_peak_gb is not None:
            peaks.append(before.gpu_peak_gb)
        self.summary = replace(
            before,
            written=before.written + len(fresh),
            failed=len(self.output.failed),
            prompt_tokens=before.prompt_tokens + sum(answer.prompt_tokens for answer in answers),
            new_tokens=before.new_tokens + sum(answer.new_tokens for answer in answers),
            seconds=seconds,
            pinned_gb=max([before.pinned_gb, *(answer.pinned_gb for answer in answers)]),
            gpu_peak_gb=max(peaks, default=None),
        )

    def close(self) -> None:
        """Close and unlock the output."""
        self.output.close()

    def __enter__(self) -> "JobRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_job(job: Job, model: Answerer, watchers: Sequence[Watcher] = ()) -> Summary:
    """Do a job with a model that is loaded already."""
    with JobRun(job) as run:
        return run.run(model, watchers)
