"""The text of one file: plain text, Markdown, HTML, PDF and DOCX, by suffix."""

import codecs
import logging
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from .errors import DocumentError

BLOCK_TAGS = [
    "p", "div", "section", "article", "header", "footer", "blockquote", "pre", "ul", "ol", "li",
    "table", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "figcaption", "dd", "dt",
]  # fmt: skip


def read_file(path: Path) -> str:
    """The file's text; DocumentError in one line when there is none to be had."""
    try:
        before = path.stat()
        text = READERS.get(path.suffix.lower(), read_text)(path)
        after = path.stat()
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror or error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DocumentError(f"{path} changed while it was read")
    return check_text(text, str(path))


def check_text(text: str, name: str) -> str:
    if not text.strip():
        raise DocumentError(f"{name} is empty" + (NO_TEXT_HINT if name.lower().endswith(".pdf") else ""))
    if "\0" in text:
        raise DocumentError(f"{name} is binary: it has NUL characters")
    return text


NO_TEXT_HINT = ": it has no text layer (scanned pages need OCR first)"


def read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path} is not UTF-8 text (byte {error.start})") from error


def read_html(path: Path) -> str:
    """Visible text, a blank line between blocks so that paragraph borders survive."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(path.read_bytes(), "html.parser")
    for tag in soup(["script", "style", "noscript", "template", "head"]):
        tag.decompose()
    for node in soup.find_all(string=True):
        if node.find_parent("pre") is None:
            node.replace_with(re.sub(r"\s+", " ", node))
    for tag in soup.find_all("br"):
        tag.replace_with("\n")
    for tag in soup.find_all(BLOCK_TAGS):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")
    return tidy(soup.get_text())


def read_pdf(path: Path) -> str:
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # its remarks on sloppy files are not for a job's log
    return parsed(path, "PDF", lambda: "\n\n".join(page.extract_text() for page in PdfReader(path).pages))


def read_docx(path: Path) -> str:
    from docx import Document
    from docx.table import Table

    def text_of(block: Any) -> str:
        if not isinstance(block, Table):
            return block.text
        return "\n".join("\t".join(cell.text for cell in row.cells) for row in block.rows)

    return parsed(path, "DOCX", lambda: "\n\n".join(map(text_of, Document(str(path)).iter_inner_content())))


def parsed(path: Path, kind: str, parse: Callable[[], str]) -> str:
    """parse() with whatever the library raises about a bad file as a DocumentError."""
    try:
        return tidy(parse())
    except OSError:
        raise
    except Exception as error:  # both libraries raise their own, and plain ones, on damaged files
        lines = str(error).splitlines() or [type(error).__name__]
        raise DocumentError(f"{path} is no readable {kind} file: {lines[0]}") from error


def tidy(text: str) -> str:
    """At most one blank line in a row, no blanks at the ends of lines."""
    lines = [line.strip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


READERS: dict[str, Callable[[Path], str]] = {
    ".txt": read_text,
    ".text": read_text,
    ".md": read_text,
    ".markdown": read_text,
    ".rst": read_text,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
    ".docx": read_docx,
}
LIBRARIES = {".html": "bs4", ".htm": "bs4", ".pdf": "pypdf", ".docx": "docx"}


def check_libraries(paths: list[Path]) -> None:
    """UserError before a job starts that could not read some of its documents."""
    for suffix in sorted({path.suffix.lower() for path in paths}):
        library = LIBRARIES.get(suffix)
        if library is not None and find_spec(library) is None:
            raise UserError(f"{suffix} documents need a library: pip install 'ds-offload[docs]'")
