"""Prompt templates: a text with one {document} in it, from a file or by the name of a built-in one."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

PLACE = "{document}"
FOLDER = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Template:
    """The text before and after the document. Other braces are left as they are."""

    before: str
    after: str

    def fill(self, document: str) -> str:
        return self.before + document + self.after

    @property
    def text(self) -> str:
        return self.fill(PLACE)


def load_template(name: str) -> Template:
    """A template from a file, or a built-in one by name; UserError when it is neither or has no place."""
    file = Path(name)
    if name in built_in():
        file = FOLDER / f"{name}.txt"
    elif not os.path.isfile(file):
        known = ", ".join(built_in())
        raise UserError(f"--prompt-template: there is no file {name}; the built-in templates are {known}")
    try:
        text = file.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-template {name} cannot be read as UTF-8 text: {error}") from error
    return parse_template(text, name)


def parse_template(text: str, name: str) -> Template:
    if text.count(PLACE) != 1:
        raise UserError(
            f"--prompt-template {name} must have {PLACE} once; it has it {text.count(PLACE)} times"
        )
    before, _, after = text.partition(PLACE)
    return Template(before, after)


def built_in() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.txt"))
