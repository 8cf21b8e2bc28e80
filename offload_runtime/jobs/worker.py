"""From documents to the records of their lines."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RunError
from .answers import Answer, Answerer, OnStage, total_cost
from .documents import Source
from .errors import DocumentError, InputChanged
from .job import Job
from .mapreduce import map_reduce
from .output import Record
from .splitting import shorten

OnDocument = Callable[[str, str, int, int], None]  # (document id, stage, units done, units in all)


@dataclass(frozen=True)
class Fitted:
    """A document as it will be sent. method: whole, cut-head, cut-tail, cut-middle or map-reduce."""

    id: str
    text: str
    method: str
    document_tokens: int
    kept_tokens: int


@dataclass(frozen=True)
class Outcome:
    """A document's record, and its answers when there are any."""

    record: Record
    answers: Sequence[Answer] = ()


class Worker:
    """Turns groups of documents into records. A document's failure is its own; the others go on."""

    def __init__(self, job: Job, model: Answerer, on_document: OnDocument) -> None:
        self.job, self.model, self.on_document = job, model, on_document

    def work(self, sources: Sequence[Source]) -> list[Outcome]:
        """One outcome a document, in order. Documents that fit are answered as one batch."""
        outcomes: dict[str, Outcome] = {}
        batch: list[Fitted] = []
        for source in sources:
            started = time.perf_counter()
            try:
                fitted = self._fit(source)
                if fitted.method == "map-reduce":
                    outcomes[source.id] = self._summarise_parts(fitted, started)
                else:
                    batch.append(fitted)
            except Exception as error:
                outcomes[source.id] = self._failure(source.id, error, started)
        outcomes.update(self._answer(batch))
        return [outcomes[source.id] for source in sources]

    def _fit(self, source: Source) -> Fitted:
        """Read a document and make it fit; DocumentError when it does not and may not be cut."""
        self.on_document(source.id, "reading", 0, 0)
        text, job = source.read(), self.job

        def count(part: str) -> int:
            return self.model.count(job.template.fill(part))

        empty = count("")
        tokens = count(text)
        if tokens <= job.prompt_room:
            return Fitted(source.id, text, "whole", tokens - empty, tokens - empty)
        if job.long == "refuse":
            raise DocumentError(
                f"it has {tokens - empty} tokens and --ctx {job.ctx} leaves room for "
                f"{job.prompt_room - empty}; raise --ctx or choose how to cut it with --long"
            )
        if job.long == "map-reduce":
            return Fitted(source.id, text, "map-reduce", tokens - empty, tokens - empty)
        kept = shorten(text, job.long.removeprefix("cut-"), count, job.prompt_room)
        return Fitted(source.id, kept, job.long, tokens - empty, count(kept) - empty)

    def _answer(self, batch: Sequence[Fitted]) -> dict[str, Outcome]:
        """Answer as one batch; when that fails, one by one, so that a failure has one document to blame."""
        if not batch:
            return {}
        started = time.perf_counter()
        prompts = [self.job.template.fill(fitted.text) for fitted in batch]
        name = batch[0].id if len(batch) == 1 else f"{batch[0].id} and {len(batch) - 1} more"
        try:
            answers = self.model.answer(prompts, self.job.max_new_tokens, self._stages(name))
        except Exception as error:
            if len(batch) == 1:
                return {batch[0].id: self._failure(batch[0].id, error, started)}
            stop_if_fatal(error)
            self.model.release()
            return {fitted.id: self._answer([fitted])[fitted.id] for fitted in batch}
        pairs = zip(batch, answers, strict=True)
        return {fitted.id: success(fitted, [answer], {}, started) for fitted, answer in pairs}

    def _summarise_parts(self, fitted: Fitted, started: float) -> Outcome:
        answers, counts = map_reduce(self.job, self.model, fitted.text, self._stages(fitted.id))
        return success(fitted, answers, counts, started)

    def _stages(self, name: str) -> OnStage:
        return lambda stage, done, total: self.on_document(name, stage, done, total)

    def _failure(self, id: str, error: Exception, started: float) -> Outcome:
        stop_if_fatal(error)
        if not isinstance(error, DocumentError):
            self.model.release()
        seconds = round(time.perf_counter() - started, 3)
        return Outcome({**EMPTY, "id": id, "seconds": seconds, "error": describe(error)})


EMPTY: Record = {
    "id": "",
    "text": None,
    "finish_reason": None,
    "prompt_tokens": 0,
    "new_tokens": 0,
    "ttft_s": None,
    "tpot_s": None,
    "hit_rate": None,
    "gather_gb": 0.0,
    "seconds": 0.0,
    "fitted": None,
    "error": None,
}


def success(fitted: Fitted, answers: Sequence[Answer], counts: dict[str, Any], started: float) -> Outcome:
    shown = answers[-1]
    record = {
        **EMPTY,
        "id": fitted.id,
        "text": shown.text,
        "finish_reason": shown.finish_reason,
        **asdict(total_cost(answers)),
        "seconds": round(time.perf_counter() - started, 3),
        "fitted": {
            "method": fitted.method,
            "document_tokens": fitted.document_tokens,
            "kept_tokens": fitted.kept_tokens,
            **counts,
        },
    }
    return Outcome(record, answers)


def stop_if_fatal(error: Exception) -> None:
    """RunError for what would fail every later document too; they would all become error lines by morning."""
    if isinstance(error, InputChanged):
        raise error
    if "CUDA error" in str(error) and not is_out_of_memory(error):
        raise RunError(f"the GPU failed: {describe(error)}; start the same command again") from error


def is_out_of_memory(error: Exception) -> bool:
    """torch's error, by name so that torch need not be imported, or Python's own."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def describe(error: Exception) -> str:
    """One line for the record."""
    if is_out_of_memory(error):
        return "out of memory; lower --ctx, --batch-size or --budget"
    text = " ".join(str(error).split())
    if isinstance(error, DocumentError) or type(error).__name__ in ("UserError", "RunError"):
        return text
    return f"{type(error).__name__}: {text}"
