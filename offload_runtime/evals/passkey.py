"""Pass keys at every depth of one document, each asked for by name.

Several keys lie in one text, so that finding any number is not enough and one
prefill serves all of them.
"""

import random
from collections.abc import Callable, Sequence

from ..demo import ADJECTIVES, NOUNS, QUESTION, SENTENCE, filler, insert_sentence, shipped_prose
from ..errors import UserError
from .cases import Group, Tokens

ANSWER_TOKENS = 12  # " 48213." byte by byte, and room to see that it stops
KEYS = 8  # in one document; the embedded model was measured with eight
LEAST_TOKENS = 1024


def groups(
    tokens: Tokens, ctx: int, depths: Sequence[float], documents: int, seed: int, prose: str | None
) -> list[Group]:
    """Documents of ctx tokens, question and answer included, every one with a key at each depth."""
    made = []
    parts = [depths[i :: -(-len(depths) // KEYS)] for i in range(-(-len(depths) // KEYS))]
    for document in range(documents):
        for part_index, part in enumerate(parts):
            draw = random.Random(f"{seed} {ctx} {document} {part_index}")
            made.append(one_group(tokens, ctx, part, draw, f"document {document}", prose))
    return made


def one_group(
    tokens: Tokens, ctx: int, depths: Sequence[float], draw: random.Random, name: str, prose: str | None
) -> Group:
    names = [
        f"{adjective}-{noun}"
        for adjective, noun in zip(draw.sample(ADJECTIVES, KEYS), draw.sample(NOUNS, KEYS), strict=True)
    ]
    keys = [str(draw.randrange(10000, 100000)) for _ in names]
    sentences = [SENTENCE.format(name=n, number=key) for n, key in zip(names, keys, strict=True)]
    spare = [0.05 + 0.9 * draw.random() for _ in names[len(depths) :]]  # the rest are decoys
    question = max((QUESTION.format(name=n) for n in names), key=len)
    room = ctx - ANSWER_TOKENS - tokens.special
    text = document(room, sentences, [*depths, *spare], question, tokens.count, prose)
    questions = [
        (f"{name}, depth {depth}", QUESTION.format(name=n), (key,), {"depth": depth})
        for n, key, depth in zip(names, keys, depths, strict=False)
    ]
    return tokens.group("passkey", ctx, text, questions, ANSWER_TOKENS)


def document(
    room: int,
    sentences: Sequence[str],
    depths: Sequence[float],
    question: str,
    count: Callable[[str], int],
    prose: str | None,
) -> str:
    """Prose with every sentence at its depth: `room` tokens with the question, or a few more at joints."""
    rest = room - count(" ".join(sentences) + question) - len(sentences)
    lacking = max(LEAST_TOKENS - 2 * ANSWER_TOKENS - room, 1 - rest)
    if lacking > 0:
        raise UserError(
            f"a document of {room} tokens is too short for this suite; raise --ctx by {lacking} or more"
        )
    text = filler(shipped_prose() if prose is None else prose, rest, count)
    for depth, sentence in sorted(zip(depths, sentences, strict=True), reverse=True):
        text = insert_sentence(text, depth, sentence)  # from the end, so that earlier places stay
    return text
