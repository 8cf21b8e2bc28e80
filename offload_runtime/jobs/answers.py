"""What a job asks of a model, and what it gets back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

OnStage = Callable[[str, int, int], None]  # (stage, units done, units in all)


@dataclass(frozen=True)
class Answer:
    """One generated text and what it took.

    finish_reason: "stop" (the model ended it) or "length". ttft_s, tpot_s:
    seconds to the first token and for each later one, with what the other
    places did meanwhile. gather_gb: rows fetched from host memory for it.
    pinned_gb, gpu_peak_gb: memory held by all places; None without a GPU.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    tpot_s: float
    hit_rate: float | None
    gather_gb: float
    pinned_gb: float = 0.0
    gpu_peak_gb: float | None = None


class Answerer(Protocol):
    """A model as a job sees it, answering up to `places` prompts at a time; ModelAnswerer is the real one.

    sizes: tokens of each place where they differ.
    """

    places: int
    sizes: tuple[int, ...]

    def count(self, prompt: str) -> int:
        """Tokens of a prompt as it will be sent, chat template and all."""

    def has_room(self, tokens: int) -> bool:
        """Whether a free place holds so many, answer included; also if none ever will, or all are free."""

    def start(self, key: Any, prompt: str, max_new_tokens: int, on_stage: OnStage) -> None:
        """Take up a prompt; the caller sees to it that a place is free. Raises what is the prompt's fault."""

    def advance(self) -> list[tuple[Any, Answer]]:
        """Go on with every prompt taken up; the answers that are ready, by key.

        What it raises befell all of them, and none is taken up any longer.
        """

    def release(self) -> None:
        """Drop every prompt and free what a failed call may have left in memory."""


@dataclass(frozen=True)
class Cost:
    """Several answers' figures as one document's."""

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    tpot_s: float
    hit_rate: float | None
    gather_gb: float


def total_cost(answers: Sequence[Answer]) -> Cost:
    """Tokens and bytes summed, TPOT and hit rate as means over new tokens, TTFT of the last answer."""
    steps = sum(answer.new_tokens - 1 for answer in answers)  # the first token comes with the prefill
    decode_s = sum(answer.tpot_s * (answer.new_tokens - 1) for answer in answers)
    rated = [(a.hit_rate, a.new_tokens) for a in answers if a.hit_rate is not None]
    return Cost(
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        new_tokens=sum(answer.new_tokens for answer in answers),
        ttft_s=answers[-1].ttft_s,
        tpot_s=round(decode_s / steps, 6) if steps > 0 else 0.0,
        hit_rate=sum(rate * n for rate, n in rated) / sum(n for _, n in rated) if rated else None,
        gather_gb=sum(answer.gather_gb for answer in answers),
    )
