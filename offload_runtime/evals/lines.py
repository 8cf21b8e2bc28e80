"""Line retrieval in the LongEval format (lm-sys/LongChat): from files, or made for any length."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..demo import shipped_prose
from ..errors import UserError
from .cases import Group, Tokens
from .files import read_jsonl, text_field

# LongEval's wording, unchanged.
HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and "
    "contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, "
    "memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the "
    "corresponding <REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
LINE = "line {name}: REGISTER_CONTENT is <{number}>\n"
QUESTION = (
    "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number. "
)
ANSWER_TOKENS = 64  # "line torpid-kid: REGISTER_CONTENT is <2416>" byte by byte, and longer names
DEPTHS = 8  # lines asked for in one made document, evenly spread


def groups(
    tokens: Tokens, ctx: int, files: Sequence[Path], limit: int, documents: int, seed: int
) -> list[Group]:
    """From files: every case that fits into ctx, `limit` a file. Without: documents of ctx tokens."""
    if not files:
        return [made_group(tokens, ctx, random.Random(f"{seed} {ctx} {n}"), n) for n in range(documents)]
    return [group for file in files for group in file_groups(tokens, ctx, file, limit)]


def file_groups(tokens: Tokens, ctx: int, file: Path, limit: int) -> list[Group]:
    made = []
    for index, row in enumerate(read_jsonl(file, limit)):
        prompt, number = text_field(row, "prompt", file, index), row.get("expected_number")
        if number is None:
            raise UserError(
                f"{file} line {index + 1} has no expected_number; is it a file of LongEval lines?"
            )
        end = prompt.rfind("\n\n") + 1  # the question begins with the second of these
        question = (f"{file.stem} {index}", prompt[end:], (str(number),), depth_in(prompt, number))
        group = tokens.group(f"lines, {file.stem}", ctx, prompt[:end], [question], ANSWER_TOKENS)
        if group.tokens <= ctx:
            made.append(group)
    return made


def depth_in(prompt: str, number: Any) -> dict[str, Any]:
    """Where in the prompt the line is, in eighths."""
    return {"depth": int(DEPTHS * max(0, prompt.find(f"<{number}>")) / len(prompt)) / DEPTHS}


def made_group(tokens: Tokens, ctx: int, draw: random.Random, index: int) -> Group:
    """As many lines as fit into ctx tokens; names are pairs of words of the shipped prose."""
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", shipped_prose())))
    room = ctx - ANSWER_TOKENS - tokens.special - tokens.count(HEADER) - tokens.count(QUESTION) - 32  # a name
    lines: dict[str, tuple[str, str]] = {}
    while True:
        name, number = "-".join(draw.sample(words, 2)), str(draw.randrange(1, 50000))
        line = LINE.format(name=name, number=number)
        room -= tokens.count(line)
        if room < 0:
            break
        lines[name] = (line, number)
    if len(lines) < DEPTHS:
        raise UserError(f"--ctx {ctx} holds {len(lines)} lines only; give 2048 or more")
    names = list(lines)
    asked = [(step / DEPTHS, names[(2 * step + 1) * len(names) // (2 * DEPTHS)]) for step in range(DEPTHS)]
    questions = [
        (f"document {index}, line {name}", QUESTION.format(name=name), (lines[name][1],), {"depth": depth})
        for depth, name in asked
    ]
    document = HEADER + "".join(line for line, _ in lines.values())
    return tokens.group("lines, made", ctx, document, questions, ANSWER_TOKENS)
