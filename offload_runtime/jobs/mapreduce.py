"""A document longer than ctx: summarise its parts, then the summaries, until one summary is left."""

from collections.abc import Callable, Generator

from .answers import Answer
from .errors import DocumentError
from .job import SMALLEST_ROOM, Job
from .prompts import Template
from .splitting import split

Count = Callable[[str], int]  # tokens of a prompt
# Prompts that are to be answered, each with words that name it; their answers in order come back.
Talk = Generator[list[tuple[str, str]], list[Answer], tuple[list[Answer], dict[str, int]]]


def map_reduce(job: Job, count: Count, text: str) -> Talk:
    """Ask for answers until one is left.

    Returns all answers in order, the last one being the document's, and {"pieces",
    "rounds"}: parts of the document, and times that summaries were summarised.
    """
    parts = pieces_of(job, count, text, job.template)
    pieces, rounds, template = len(parts), 0, job.template
    answers: list[Answer] = []
    while True:
        what = "part" if rounds == 0 else f"summaries, round {rounds},"
        latest = yield [
            (template.fill(part), f"{what} {number}/{len(parts)}: ") for number, part in enumerate(parts, 1)
        ]
        answers += latest
        if len(latest) == 1:
            return answers, {"pieces": pieces, "rounds": rounds}
        template, rounds = job.combine, rounds + 1
        summaries = "\n\n".join(answer.text.strip() for answer in latest)
        parts = pieces_of(job, count, summaries, template)
        if len(parts) >= len(latest):
            raise DocumentError(
                f"{len(latest)} summaries are no shorter than what they sum up; lower --max-new-tokens"
            )


def pieces_of(job: Job, count: Count, text: str, template: Template) -> list[str]:
    """The text in pieces that fit into a prompt; the whole of it as one if it does."""
    empty = count(template.fill(""))

    def count_part(part: str) -> int:
        return count(template.fill(part)) - empty

    room = job.prompt_room - empty
    if room < SMALLEST_ROOM:
        raise DocumentError(f"--ctx {job.ctx} leaves {room} tokens beside the prompt's own text; raise it")
    return [text] if count_part(text) <= room else split(text, count_part, room)
