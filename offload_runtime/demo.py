"""Long documents with hidden pass keys, and the demo that asks the embedded model for one."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError

# Names the embedded model finds keys by: it learned "adjective-noun" names in this wording.
ADJECTIVES = ("silly", "torpid", "brave", "hollow", "rapid", "gentle", "curious", "wooden", "bright", "quiet")
NOUNS = ("walrus", "kid", "lantern", "falcon", "bottle", "meadow", "piano", "rocket", "sailor", "temple")
SENTENCE = "The pass key for {name} is {number}."
QUESTION = "\n\nThe pass key for {name} is"
PARAGRAPH_END = "\n\n"
DECOY_PLACES = [0.05 + 0.1 * step for step in range(10)]
DECOYS = 3  # other keys in the text, so that finding any number is not enough


@dataclass(frozen=True)
class Document:
    """A text that ends with a question, and the number that answers it."""

    text: str
    answer: str
    name: str
    depth: float


def shipped_prose() -> str:
    """The excerpt of Moby-Dick that ships with the package: 64 KB, ASCII."""
    return (Path(__file__).parent / "data" / "prose.txt").read_text(encoding="utf-8")


def build_document(
    tokens: int,
    depth: float = 0.3,
    seed: int = 0,
    prose: str | None = None,
    count_tokens: Callable[[str], int] = len,
) -> Document:
    """A document of `tokens` tokens, or a few more, with one key at `depth` in [0, 1].

    prose: filler text, by default the shipped one, repeated when it is too
    short. count_tokens: tokens of a text under the model's tokenizer; the
    default suits a byte-level one. It is asked paragraph by paragraph, so that
    the sum may be off by a token at their joints. Decoy keys lie at other
    random depths. The same arguments give the same document.
    """
    if not 0 <= depth <= 1:
        raise UserError(f"depth is {depth}; it must be between 0 (start) and 1 (end of the document)")
    if tokens < 1024:
        raise UserError(f"{tokens} tokens are too few for a document; ask for 1024 or more")
    draw = random.Random(seed)
    adjectives, nouns = draw.sample(ADJECTIVES, DECOYS + 1), draw.sample(NOUNS, DECOYS + 1)
    names = [f"{a}-{n}" for a, n in zip(adjectives, nouns, strict=True)]
    numbers = [str(draw.randrange(10000, 100000)) for _ in names]
    free_places = [place for place in DECOY_PLACES if abs(place - depth) >= 0.1]  # keys side by side confuse
    depths = [depth, *draw.sample(free_places, DECOYS)]
    sentences = [SENTENCE.format(name=n, number=number) for n, number in zip(names, numbers, strict=True)]
    question = QUESTION.format(name=names[0])
    rest = tokens - count_tokens(" ".join(sentences) + question)
    text = filler(shipped_prose() if prose is None else prose, rest, count_tokens)
    places = sorted(zip(depths, sentences, strict=True), reverse=True)
    for where, sentence in places:  # from the end, so that earlier places stay where they are
        text = insert_sentence(text, where, sentence)
    return Document(text + question, numbers[0], names[0], depth)


def insert_sentence(text: str, depth: float, sentence: str) -> str:
    """Put the sentence behind the first one that ends at or after `depth` of the text."""
    end = text.find(". ", int(depth * len(text)))
    at = len(text) if end < 0 or depth == 1 else end + 1
    return f"{text[:at]} {sentence}{text[at:]}"


def filler(prose: str, tokens: int, count_tokens: Callable[[str], int]) -> str:
    """Paragraphs of prose, from its start and over again, the last one cut to make `tokens` tokens."""
    source = [paragraph for paragraph in prose.split(PARAGRAPH_END) if paragraph.strip()]
    if not source:
        raise UserError("the prose to build a document from is empty")
    sizes = [max(1, count_tokens(paragraph + PARAGRAPH_END)) for paragraph in source]
    taken: list[str] = []
    total = 0
    while total < tokens:
        index = len(taken) % len(source)
        taken.append(source[index])
        total += sizes[index]
    spare = total - tokens - count_tokens(PARAGRAPH_END)  # the last paragraph has no end to count
    words = taken[-1].split(" ")
    while len(words) > 1 and (size := count_tokens(words[-1] + " ")) <= spare:
        spare -= size
        words.pop()
    taken[-1] = " ".join(words)
    return PARAGRAPH_END.join(taken)


def ask(model: Any, document: Document, new_tokens: int, **generate_options: Any) -> str:
    """The model's answer to a document's question, greedily decoded.

    model: an OffloadedModel with its tokenizer.
    """
    tokenizer = model.tokenizer
    ids = tokenizer(document.text, return_tensors="pt").input_ids  # [1, T]
    out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **generate_options)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def is_right(answer: str, document: Document) -> bool:
    """Whether the first word of the answer is the number, as in " 48213."."""
    words = answer.split()
    return bool(words) and words[0].rstrip(".") == document.answer
