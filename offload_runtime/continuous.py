"""Continuous batching: a session's places are filled and left one by one while the others decode on.

>>> batch = model.continuous(places=4, tokens=131072)
>>> batch.join(0, prompt_ids, 512, chooser, key="first")
>>> while batch.running: batch.step()
>>> batch.take_finished()

A place is one sequence's share of every cache, its pinned rows included, and is
never allocated again. An empty one has length 0, which every kernel passes over,
so neither joining nor leaving changes what a captured CUDA graph does, only what
it reads. A sequence's tokens do not depend on the others' places.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .choosing import Chooser
from .errors import UserError
from .free_place import smallest_free
from .pace import Pace
from .prefetch.lanes import Fetched, Lanes
from .session import Session
from .stats import collect

OnStage = Callable[[str, int, int], None]  # (stage, units done, units in all)

# Chunks of a prefill launched ahead of the GPU. A decode step in the shadow of a prefill may take as
# long as several chunks (8 to 30 ms each in the 8B shape, arithmetic); launching ahead takes no memory.
AHEAD_CHUNKS = 8
# Of the steps due beside a prefill: so many may come after its end. Pace asks for 40% more than needed.
MOST_LATE = 0.25


@dataclass
class Running:
    """A sequence at work in a place. tokens: the new ones; ids [1, n]: all, where choosing needs them."""

    key: Any
    prompt: torch.Tensor
    limit: int
    chooser: Chooser
    on_stage: OnStage
    joined: float
    first: float = 0.0
    tokens: list[int] = field(default_factory=list)
    ids: torch.Tensor | None = None

    @property
    def left(self) -> int:
        """New tokens to come, if no end token comes before."""
        return self.limit - len(self.tokens)

    def add(self, token: int) -> str | None:
        """Take a token; "stop" or "length" when it was the last."""
        self.tokens.append(token)
        self.on_stage("decode", len(self.tokens), self.limit)
        if token in self.chooser.ends:
            return "stop"
        return "length" if len(self.tokens) == self.limit else None


@dataclass(frozen=True)
class Step:
    """A step that has been launched: where its tokens [B] will be, and whose they are."""

    tokens: Fetched
    runs: dict[int, Running]


@dataclass(frozen=True)
class Finished:
    """A sequence that is through. tpot_s: seconds a token between the first and the last, prefills beside
    it included; `moved` are the row counts of stats.collect for its place alone."""

    key: Any
    tokens: list[int]
    reason: str
    prompt_tokens: int
    ttft_s: float
    tpot_s: float
    moved: dict[str, Any]


def ignore_stage(stage: str, done: int, total: int) -> None:
    pass


class ContinuousBatch:
    """The places of one session. overlap: decode on while a newcomer prefills, at the pace of pace.py.

    Without a GPU or a CUDA graph the two take turns, chunk by step.
    """

    def __init__(self, session: Session, overlap: bool = True, ahead: int = AHEAD_CHUNKS) -> None:
        places = session.layout.batch
        if session.audit is not None:
            raise UserError("an audit looks at whole batches; leave audit_every out of continuous batching")
        if places > 1 and session.adapter.length_rotary is not None:
            raise UserError(
                "this model's RoPE depends on a sequence's length, so sequences cannot share a batch; "
                "use 1 place"
            )
        self.session, self.overlap, self.limit_ahead = session, overlap, ahead
        self.lanes, self.pace = Lanes(session.adapter.device), Pace(places)
        self.running: dict[int, Running] = {}
        self.finished: list[Finished] = []
        self.pending: Step | None = None
        self.failure: Exception | None = None
        self.late = 0  # of the steps that were due beside a prefill, those that began after its end
        self.crowded = False  # a prefill leaves SMs to steps, since too many were late
        self.token_ids = torch.zeros(places, dtype=torch.long, device=session.adapter.device)
        session.clear()
        for place in range(places):
            session.clear_place(place)
        self._capture()

    def _capture(self) -> None:
        """Two steps of empty places change nothing, and leave the graph ready for the first newcomer."""
        self.lanes.follow_caller()
        with torch.no_grad(), self.lanes.decoding():
            while self.session.decoder.use_graph and self.session.decoder.graph is None:
                self.session.step(self.token_ids)

    def place_for(self, tokens: int) -> int | None:
        """The smallest empty place that holds a sequence of so many tokens; None when there is none now."""
        return smallest_free(self.session.layout.rooms, self.running, tokens)

    @torch.no_grad()
    def join(
        self,
        place: int,
        prompt: torch.Tensor,
        max_new_tokens: int,
        chooser: Chooser,
        key: Any = None,
        on_stage: OnStage = ignore_stage,
    ) -> None:
        """Prefill a 1-D prompt into an empty place while the others decode, and choose its first token.

        Raises what the prefill raises, the place then being empty again; what
        goes wrong in a step meanwhile is raised by the next step(), for it is not
        the newcomer's fault. UserError when the sequence is longer than a place.
        """
        assert place not in self.running
        need, room = len(prompt) + max_new_tokens, self.session.layout.rooms[place]
        if need > room:
            raise UserError(f"prompt and new tokens need {need} tokens and a place has {room}")
        started = time.perf_counter()
        rotary = self.session.adapter.length_rotary
        if rotary is not None:
            rotary.choose(need)
        run = Running(key, prompt, max_new_tokens, chooser, on_stage, started)
        self.pace.begin(len(prompt), max_new_tokens, [other.left for other in self.running.values()])
        self.lanes.follow_caller()
        with self.lanes.decoding():
            self.session.clear_place(place)
        self.late = 0
        with self.lanes.prefilling(self.crowded and bool(self.running)):
            logits = self.session.prefill_place(place, prompt, self._between_chunks(on_stage))
        self.lanes.mark()
        self._decode_until(0)
        self.crowded = self.crowded or self.late > MOST_LATE * self.pace.taken
        with self.lanes.decoding():
            self.lanes.meet()
            self._start(place, run, logits)

    def _between_chunks(self, on_stage: OnStage) -> Callable[[int, int], None]:
        """Called when a chunk of a newcomer's prefill has been launched."""

        def progress(done: int, total: int) -> None:
            on_stage("prefill", done, total)
            self.pace.share = done / total
            self.lanes.mark()
            self._decode_until(self.limit_ahead)

        return progress

    def _decode_until(self, ahead: int) -> None:
        """Take the steps that are due until the GPU is no more than `ahead` chunks behind; on a CPU one.

        A step stays in flight on return: it runs while the next chunk is launched.
        """
        if not self.lanes.on_gpu:
            if self._step_due:
                self.pace.taken += 1
                self._try(self.step)
            return
        while self.pending is not None or self._step_due:
            if self.pending is None:
                self.pace.taken += 1
                self.late += self.lanes.ahead() == 0
                self._try(self._launch)
            elif self.pending.tokens.here() or self.lanes.ahead() > ahead:
                self._try(self._collect)
            else:
                return
        self.lanes.wait(ahead)

    @property
    def _step_due(self) -> bool:
        return self.overlap and bool(self.running) and self.failure is None and self.pace.due

    def _try(self, part: Callable[[], None]) -> None:
        try:
            part()
        except Exception as error:
            self.failure = error

    def _start(self, place: int, run: Running, logits: torch.Tensor) -> None:
        """Take a newcomer among those that decode, with the logits [1, V] of its prompt's last token."""
        if not run.chooser.plain:
            run.ids = run.prompt.to(self.token_ids.device)[None]  # [1, n]
        token = self._choose(run, logits)
        self.token_ids[place] = token[0]
        self.session.fill_place(place, len(run.prompt), run.limit)
        self.running[place] = run
        ended = run.add(int(token))
        run.first = time.perf_counter()
        if ended:
            self._finish(place, ended)

    @staticmethod
    def _choose(run: Running, logits: torch.Tensor) -> torch.Tensor:
        """One sequence's next token [1] from its logits [1, V]."""
        if run.ids is None:
            return logits.float().argmax(-1)
        token = run.chooser.choose(logits, run.ids)
        run.ids = torch.cat([run.ids, token[:, None]], 1)
        return token

    def step(self) -> None:
        """Decode one token in every place that is filled; those that end leave for take_finished()."""
        if self.failure is not None:
            raise self.failure
        if self.pending is None:
            self._launch()
        self._collect()

    @torch.no_grad()
    def _launch(self) -> None:
        """Give the GPU a step of all that run now; nothing waits for it."""
        with self.lanes.decoding():
            logits = self.session.step(self.token_ids)  # [B, V]
            if all(run.ids is None for run in self.running.values()):
                self.token_ids.copy_(logits.float().argmax(-1))
            else:
                for place, run in self.running.items():
                    self.token_ids[place] = self._choose(run, logits[place, None])[0]
            self.pending = Step(Fetched(self.token_ids), dict(self.running))

    def _collect(self) -> None:
        """Wait for the launched step, the only wait of a step, and take its tokens."""
        assert self.pending is not None
        step, self.pending = self.pending, None
        tokens = step.tokens.wait()
        for place, run in step.runs.items():
            if self.running.get(place) is not run:  # it left meanwhile
                continue
            ended = run.add(tokens[place])
            if ended:
                self._finish(place, ended)

    def _finish(self, place: int, reason: str) -> None:
        run, session = self.running[place], self.session
        self.pace.ended(len(run.tokens), run.limit)
        now, steps = time.perf_counter(), len(run.tokens) - 1
        prefetcher = session.prefetcher
        moved = collect(session.caches, prefetcher.predicted_layers, prefetcher.attend_predicted, place)
        times = (run.first - run.joined, (now - run.first) / steps if steps else 0.0)
        self.finished.append(Finished(run.key, run.tokens, reason, len(run.prompt), *times, moved))
        self.leave(place)

    def leave(self, place: int) -> None:
        """Empty a place, whether its sequence is through or not."""
        del self.running[place]
        with torch.no_grad(), self.lanes.decoding():
            self.session.clear_place(place)

    def take_finished(self) -> list[Finished]:
        """Those that ended since the last call."""
        taken, self.finished = self.finished, []
        return taken
