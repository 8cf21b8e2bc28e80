"""Tasks in the manner of RULER (arXiv 2404.06654), made with a seed: several keys, several values,
variable tracking, common words. The score is the part of the right strings that the answer holds.
"""

import random
import re
from collections.abc import Sequence

from ..demo import ADJECTIVES, NOUNS, shipped_prose
from ..errors import UserError
from .cases import Group, Tokens
from .passkey import document

TASKS = ("multikey", "multivalue", "variables", "words")
ANSWER_TOKENS = 128  # RULER's for needles; enough for byte tokenizers, too
NEEDLE = "One of the special magic numbers for {key} is: {value}."
KEYS, VALUES = 4, 4  # RULER's niah_multikey_1 and niah_multivalue
HOPS = 4  # RULER's variable tracking: one chain of four hops
COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3  # RULER's common words extraction

Parts = tuple[str, str, tuple[str, ...]]  # document, question, right answers


def groups(
    tokens: Tokens, ctx: int, tasks: Sequence[str], documents: int, seed: int, prose: str | None
) -> list[Group]:
    """`documents` cases of ctx tokens for every task."""
    made = []
    for task in tasks:
        for index in range(documents):
            draw = random.Random(f"{seed} {ctx} {task} {index}")
            text, question, gold = make(tokens, task, ctx - ANSWER_TOKENS - tokens.special, draw, prose)
            made.append(
                tokens.group(task, ctx, text, [(f"{task} {index}", question, gold, {})], ANSWER_TOKENS)
            )
    return made


def make(tokens: Tokens, task: str, room: int, draw: random.Random, prose: str | None) -> Parts:
    """One case of at most `room` tokens, or a few more."""
    if task == "words":
        return common_words(tokens, room, draw)
    makers = {"multikey": multikey, "multivalue": multivalue, "variables": variables}
    sentences, question, gold = makers[task](draw)
    depths = sorted(draw.random() for _ in sentences)  # in order: a chain is assigned front to back
    return document(room, sentences, depths, question, tokens.count, prose), question, gold


def names(draw: random.Random, count: int) -> list[str]:
    pairs = zip(draw.sample(ADJECTIVES, count), draw.sample(NOUNS, count), strict=True)
    return [f"{adjective}-{noun}" for adjective, noun in pairs]


def number(draw: random.Random) -> str:
    return str(draw.randrange(1_000_000, 10_000_000))  # seven digits, as in RULER


def multikey(draw: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    """Four keys, one asked for."""
    keys, values = names(draw, KEYS), [number(draw) for _ in range(KEYS)]
    needles = [NEEDLE.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    asked = draw.randrange(KEYS)
    question = (
        f"\n\nWhat is the special magic number for {keys[asked]} mentioned in the provided text? "
        f"The special magic number for {keys[asked]} mentioned in the provided text is"
    )
    return needles, question, (values[asked],)


def multivalue(draw: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    """Four values of one key, all asked for."""
    (key,), values = names(draw, 1), [number(draw) for _ in range(VALUES)]
    question = (
        f"\n\nWhat are all the special magic numbers for {key} mentioned in the provided text? "
        f"The special magic numbers for {key} mentioned in the provided text are"
    )
    return [NEEDLE.format(key=key, value=v) for v in values], question, tuple(values)


def variables(draw: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    """A value handed on from variable to variable; every variable that holds it is asked for."""
    letters = ["".join(draw.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5)) for _ in range(HOPS + 1)]
    value = str(draw.randrange(10000, 100000))
    sources = [value, *(f"VAR {name}" for name in letters)]
    needles = [f"VAR {name} = {source}." for name, source in zip(letters, sources, strict=False)]
    question = (
        f"\n\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        f"Answer: {HOPS + 1} variables are assigned the value {value}, they are:"
    )
    return needles, question, tuple(letters)


def common_words(tokens: Tokens, room: int, draw: random.Random) -> Parts:
    """A numbered list in which ten words occur 30 times and all others 3 times, as many as fit."""
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", shipped_prose())))
    draw.shuffle(words)
    common, others = words[:COMMON], words[COMMON:]
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = (
        f"\nQuestion: What are the {COMMON} most common words in the above list? "
        f"Answer: The top {COMMON} words that appear most often in the list are:"
    )
    listed = common * COMMON_TIMES
    room -= tokens.count(head + question) + sum(tokens.count(f"999. {word} ") for word in listed)
    for word in others:
        room -= OTHER_TIMES * tokens.count(f"9999. {word} ")
        if room < 0:
            break
        listed += [word] * OTHER_TIMES
    if len(listed) == COMMON * COMMON_TIMES:
        raise UserError("--ctx is too short for the task words; give 8192 or more, or choose other --tasks")
    draw.shuffle(listed)
    lines = " ".join(f"{index}. {word}" for index, word in enumerate(listed, 1))
    return head + lines, question, tuple(common)
