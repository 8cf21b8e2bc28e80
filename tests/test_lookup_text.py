"""The text to calibrate on: prose, pass keys and lines by turns, every question with its right answer."""

import re

from offload_runtime.bench.lookup_text import EMBEDDED, lookup_text
from offload_runtime.demo import shipped_prose
from offload_runtime.loading import load_tokenizer


def test_questions_are_answered_as_their_document_says() -> None:
    tokenizer = load_tokenizer(str(EMBEDDED))
    text = lookup_text(tokenizer, shipped_prose(), 3, 2304, "seed")
    assert text == lookup_text(tokenizer, shipped_prose(), 3, 2304, "seed")
    assert text != lookup_text(tokenizer, shipped_prose(), 3, 2304, "other seed")
    keys = re.findall(r"The pass key for ([\w-]+) is (\d{5})\.", text)
    assert len(keys) == 16  # eight said, eight asked for
    assert len(set(keys)) == 8
    line = r"line ([\w-]+): REGISTER_CONTENT is <(\d+)>"
    said = dict(re.findall(line + "\n", text.split("Now the record is over")[0]))
    asked = re.findall(r"in line ([\w-]+)\? I need the number\. " + line, text)
    assert len(asked) == 8
    assert all(name == answered and said[name] == number for name, answered, number in asked)
    assert 3 * 2304 <= len(text) <= 3 * 2304 + 1500  # bytes are tokens here; answers come on top
