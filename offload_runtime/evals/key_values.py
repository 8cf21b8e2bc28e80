"""Key-value retrieval as in lost-in-the-middle (arXiv 2307.03172): UUIDs in one JSON object."""

import json
import random
import uuid
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .cases import Group, Tokens
from .files import read_jsonl, text_field

# The paper's prompt, unchanged.
HEADER = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
QUESTION = '\n\nKey: "{key}"\nCorresponding value:'
ANSWER_TOKENS = 48  # a UUID byte by byte is 36 and two quotes
DEPTHS = 8  # keys asked for in one made document, evenly spread


def groups(
    tokens: Tokens, ctx: int, files: Sequence[Path], limit: int, documents: int, seed: int
) -> list[Group]:
    """From files: every case that fits into ctx, `limit` a file. Without: objects of ctx tokens."""
    if not files:
        return [made_group(tokens, ctx, random.Random(f"{seed} {ctx} {n}"), n) for n in range(documents)]
    made = []
    for file in files:
        for index, row in enumerate(read_jsonl(file, limit)):
            pairs = row.get("ordered_kv_records")
            if not isinstance(pairs, list):
                raise UserError(
                    f"{file} line {index + 1} has no ordered_kv_records; is it kv-retrieval data?"
                )
            key, value = (text_field(row, name, file, index) for name in ("key", "value"))
            place = [pair[0] for pair in pairs].index(key)
            depth = int(DEPTHS * place / len(pairs)) / DEPTHS
            question = (f"{file.name} {index}", QUESTION.format(key=key), (value,), {"depth": depth})
            group = tokens.group("kv", ctx, document(pairs), [question], ANSWER_TOKENS)
            if group.tokens <= ctx:
                made.append(group)
    return made


def document(pairs: Sequence[Sequence[str]]) -> str:
    """The instruction and the JSON object, a pair a line as in the paper's files."""
    return HEADER + "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in pairs) + "}"


def made_group(tokens: Tokens, ctx: int, draw: random.Random, index: int) -> Group:
    def unique() -> str:
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))

    room = ctx - ANSWER_TOKENS - tokens.special - tokens.count(HEADER + QUESTION.format(key=unique())) - 8
    pairs: list[tuple[str, str]] = []
    while True:
        pair = (unique(), unique())
        room -= tokens.count(f'"{pair[0]}": {json.dumps(pair[1])},\n ')
        if room < 0:
            break
        pairs.append(pair)
    if len(pairs) < DEPTHS:
        raise UserError(f"--ctx {ctx} holds {len(pairs)} pairs only; give 2048 or more")
    places = [(step / DEPTHS, (2 * step + 1) * len(pairs) // (2 * DEPTHS)) for step in range(DEPTHS)]
    questions = [
        (f"object {index}, pair {at}", QUESTION.format(key=pairs[at][0]), (pairs[at][1],), {"depth": depth})
        for depth, at in places
    ]
    return tokens.group("kv, made", ctx, document(pairs), questions, ANSWER_TOKENS)
