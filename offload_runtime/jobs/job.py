"""A job: which documents, which prompt, and what to do with the ones that are too long."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .prompts import Template, load_template

LONG = ("refuse", "cut-head", "cut-tail", "cut-middle", "map-reduce")
SMALLEST_ROOM = 64  # tokens of document in a prompt; below it, splitting makes fragments


@dataclass(frozen=True)
class Job:
    """Settings of a batch job.

    input: DIR | FILE.jsonl | FILE | GLOB. output: the JSONL to write; a shard
    puts its number before the suffix. ctx: most tokens of a prompt and its
    answer. long: what to do with a document that does not fit: "refuse" it,
    cut its head, tail or middle, or "map-reduce" (summarise its parts, then the
    summaries with `combine`). shard: (index from 1, count). model_settings: what else the texts depend on
    (model, budget, sampling, ...), compared when an output is continued.
    force: continue an output of other settings. retry_failed: drop its error
    lines and do those documents again. max_errors: stop when more fail.
    """

    input: str
    output: Path
    template: Template
    ctx: int
    max_new_tokens: int = 512
    long: str = "refuse"
    combine: Template = field(default_factory=lambda: load_template("combine"))
    text_field: str = "text"
    id_field: str | None = None
    shard: tuple[int, int] | None = None
    model_settings: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    retry_failed: bool = False
    max_errors: int | None = None

    def __post_init__(self) -> None:
        if self.long not in LONG:
            raise UserError(f"--long is {self.long!r}; choose one of {', '.join(LONG)}")
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        if self.max_errors is not None and self.max_errors < 0:
            raise UserError(f"--max-errors is {self.max_errors}; it must be at least 0")
        if self.prompt_room < SMALLEST_ROOM:
            raise UserError(
                f"--ctx {self.ctx} leaves {self.prompt_room} tokens for a prompt beside "
                f"{self.max_new_tokens} new ones; raise --ctx or lower --max-new-tokens"
            )

    @property
    def prompt_room(self) -> int:
        """Most tokens of a prompt."""
        return self.ctx - self.max_new_tokens

    @property
    def output_file(self) -> Path:
        """OUT.jsonl, or OUT.2-of-8.jsonl for a shard."""
        if self.shard is None:
            return self.output
        index, count = self.shard
        return self.output.with_name(f"{self.output.stem}.{index}-of-{count}{self.output.suffix}")

    def settings(self) -> dict[str, Any]:
        """Everything that decides which lines the output has and what they say."""
        chosen = {
            "input": self.input,
            "text_field": self.text_field,
            "id_field": self.id_field,
            "shard": None if self.shard is None else list(self.shard),
            "prompt_template": self.template.text,
            "ctx": self.ctx,
            "max_new_tokens": self.max_new_tokens,
            "long": self.long,
            **self.model_settings,
        }
        if self.long == "map-reduce":
            chosen["combine_template"] = self.combine.text
        return chosen


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8): the second of eight parts."""
    index, slash, count = text.partition("/")
    if slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise UserError(f"--shard is {text!r}; give the part and their number, as in 2/8")
