"""A document longer than ctx: summarise its parts, then the summaries, until one summary is left."""

from collections.abc import Sequence

from .answers import Answer, Answerer, OnStage
from .errors import DocumentError
from .job import SMALLEST_ROOM, Job
from .prompts import Template
from .splitting import split


def map_reduce(
    job: Job, model: Answerer, text: str, on_stage: OnStage
) -> tuple[list[Answer], dict[str, int]]:
    """All answers in order, the last one being the document's, and {"pieces", "rounds"}.

    pieces: parts of the document; rounds: times that summaries were summarised.
    """
    parts = pieces_of(job, model, text, job.template)
    pieces, rounds, template = len(parts), 0, job.template
    answers: list[Answer] = []
    while True:
        latest = answer_all(job, model, [template.fill(part) for part in parts], rounds, on_stage)
        answers += latest
        if len(latest) == 1:
            return answers, {"pieces": pieces, "rounds": rounds}
        template, rounds = job.combine, rounds + 1
        summaries = "\n\n".join(answer.text.strip() for answer in latest)
        parts = pieces_of(job, model, summaries, template)
        if len(parts) >= len(latest):
            raise DocumentError(
                f"{len(latest)} summaries are no shorter than what they sum up; lower --max-new-tokens"
            )


def pieces_of(job: Job, model: Answerer, text: str, template: Template) -> list[str]:
    """The text in pieces that fit into a prompt; the whole of it as one if it does."""
    empty = model.count(template.fill(""))

    def count(part: str) -> int:
        return model.count(template.fill(part)) - empty

    room = job.prompt_room - empty
    if room < SMALLEST_ROOM:
        raise DocumentError(f"--ctx {job.ctx} leaves {room} tokens beside the prompt's own text; raise it")
    return [text] if count(text) <= room else split(text, count, room)


def answer_all(
    job: Job, model: Answerer, prompts: Sequence[str], rounds: int, on_stage: OnStage
) -> list[Answer]:
    """Answers to the prompts, batch_size of them at a time."""
    answers: list[Answer] = []
    what = "part" if rounds == 0 else f"summaries, round {rounds},"
    for start in range(0, len(prompts), job.batch_size):

        def stage(name: str, done: int, total: int, start: int = start) -> None:
            on_stage(f"{what} {start + 1}/{len(prompts)}: {name}", done, total)

        answers += model.answer(prompts[start : start + job.batch_size], job.max_new_tokens, stage)
    return answers
