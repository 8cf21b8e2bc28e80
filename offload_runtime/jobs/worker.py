"""From documents to the records of their lines, as many prompts at a time as the model has places."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import RunError
from ..free_place import LOOKED_AT, first_with_place
from .answers import Answer, Answerer, total_cost
from .documents import Source
from .errors import DocumentError, InputChanged
from .job import Job
from .mapreduce import Talk, map_reduce
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


@dataclass
class Open:
    """A document at work: what was asked for it, and the answers so far by the prompt's number."""

    fitted: Fitted
    talk: Talk
    started: float
    asked: int = 0
    begun: bool = False
    answers: dict[int, Answer] = field(default_factory=dict)


@dataclass
class Request:
    """One prompt of a document. alone: it was at work when the model failed, and is tried by itself.

    tokens: of the prompt, once they were counted.
    """

    id: str
    number: int
    prompt: str
    words: str
    alone: bool = False
    tokens: int | None = None


class Worker:
    """Turns documents into records. A document's failure is its own; the others go on.

    Outcomes come in the order of completion, which with one place is the documents'. Where places are
    of different sizes, a prompt that finds none free is overtaken by one of the next few that does.

    stopping: asked before a prompt is started or a document read; when it says yes, no more are read and
    those that were only read are dropped, while those begun are finished.
    """

    def __init__(
        self, job: Job, model: Answerer, on_document: OnDocument, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self.job, self.model, self.on_document, self.stopping = job, model, on_document, stopping
        self.open: dict[str, Open] = {}
        self.waiting: deque[Request] = deque()
        self.running: dict[tuple[str, int], Request] = {}

    def work(self, sources: Iterable[Source]) -> Iterator[Outcome]:
        """One outcome a document. The next document is read when a place is free for it, or to look ahead."""
        documents = iter(sources)
        while True:
            more = True
            while len(self.running) < self.model.places and (self.waiting or more):
                if self.stopping():
                    more = False
                    self._drop_unbegun()
                index = self._next()
                if index is not None:
                    yield from self._start(index)
                elif more and self._looks_ahead():
                    source = next(documents, None)
                    more = source is not None
                    if source is not None:
                        yield from self._open(source)
                else:
                    break
            if self.running:
                yield from self._advance()
            elif not self.waiting and not more:
                return

    def _next(self) -> int | None:
        """Which of the waiting prompts may start now: the first one that finds a place of its size."""
        if not self.waiting or self._somebody_is_alone():
            return 0 if self.waiting and not self.running else None
        return first_with_place(self.waiting, self._has_room)

    def _somebody_is_alone(self) -> bool:
        return any(request.alone for request in (*self.running.values(), *list(self.waiting)[:1]))

    def _looks_ahead(self) -> bool:
        """Whether another document should be read now: nothing waits, or what waits finds no place."""
        return not self.waiting or (len(self.waiting) < LOOKED_AT and not self._somebody_is_alone())

    def _has_room(self, request: Request) -> bool:
        """Whether a prompt finds a place of its size."""
        if not self.model.sizes:
            return True
        if request.tokens is None:
            request.tokens = self.model.count(request.prompt)
        return self.model.has_room(request.tokens + self.job.max_new_tokens)

    def _drop_unbegun(self) -> None:
        """Forget documents of which no prompt was started; the next run of the job does them."""
        unbegun = {id for id, document in self.open.items() if not document.begun}
        self.waiting = deque(request for request in self.waiting if request.id not in unbegun)
        for id in unbegun:
            del self.open[id]

    def _open(self, source: Source) -> Iterator[Outcome]:
        """Read a document and list what is to be asked first."""
        started = time.perf_counter()
        try:
            fitted = self._fit(source)
            if fitted.method == "map-reduce":
                talk = map_reduce(self.job, self.model.count, fitted.text)
            else:
                talk = one_answer(self.job.template.fill(fitted.text))
            self.open[source.id] = Open(fitted, talk, started)
            self._ask(source.id, next(talk))
        except Exception as error:
            yield self._failure(source.id, error, started)

    def _ask(self, id: str, prompts: Sequence[tuple[str, str]]) -> None:
        document = self.open[id]
        document.asked, document.answers = len(prompts), {}
        self.waiting += [Request(id, number, *prompt) for number, prompt in enumerate(prompts)]

    def _start(self, index: int) -> Iterator[Outcome]:
        request = self.waiting[index]
        del self.waiting[index]
        key = (request.id, request.number)
        self.open[request.id].begun = True

        def on_stage(stage: str, done: int, total: int) -> None:
            self.on_document(request.id, request.words + stage, done, total)

        self.running[key] = request
        try:
            self.model.start(key, request.prompt, self.job.max_new_tokens, on_stage)
        except Exception as error:
            del self.running[key]
            yield self._failure(request.id, error, self.open[request.id].started)

    def _advance(self) -> Iterator[Outcome]:
        try:
            answers = self.model.advance()
        except Exception as error:
            yield from self._failed_together(error)
            return
        for key, answer in answers:
            request = self.running.pop(key, None)
            if request is None or request.id not in self.open:
                continue  # its document failed by another part
            document = self.open[request.id]
            document.answers[request.number] = answer
            if len(document.answers) == document.asked:
                yield from self._reply(request.id, document)

    def _reply(self, id: str, document: Open) -> Iterator[Outcome]:
        """Hand a document its answers: it asks on, or is done."""
        latest = [document.answers[number] for number in range(document.asked)]
        try:
            self._ask(id, document.talk.send(latest))
        except StopIteration as end:
            del self.open[id]
            answers, counts = end.value
            yield success(document.fitted, answers, counts, document.started)
        except Exception as error:
            yield self._failure(id, error, document.started)

    def _failed_together(self, error: Exception) -> Iterator[Outcome]:
        """Those at work are tried one by one, so that a failure has one document to blame."""
        stop_if_fatal(error)
        self.model.release()
        failed, self.running = list(self.running.values()), {}
        for request in reversed(failed):
            if request.id not in self.open:
                continue
            if request.alone or self.model.places == 1:
                yield self._failure(request.id, error, self.open[request.id].started)
            else:
                again = Request(request.id, request.number, request.prompt, request.words, alone=True)
                self.waiting.appendleft(again)

    def _failure(self, id: str, error: Exception, started: float) -> Outcome:
        """A document's error line; the rest of what was asked for it is dropped."""
        stop_if_fatal(error)
        self.open.pop(id, None)
        self.waiting = deque(request for request in self.waiting if request.id != id)
        if not isinstance(error, DocumentError) and not self.running:
            self.model.release()
        seconds = round(time.perf_counter() - started, 3)
        return Outcome({**EMPTY, "id": id, "seconds": seconds, "error": describe(error)})

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


def one_answer(prompt: str) -> Talk:
    """A document that fits into one prompt."""
    answers = yield [(prompt, "")]
    return answers, {}


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
        return "out of memory; lower --ctx, --places or --budget"
    text = " ".join(str(error).split())
    if isinstance(error, DocumentError) or type(error).__name__ in ("UserError", "RunError"):
        return text
    return f"{type(error).__name__}: {text}"
