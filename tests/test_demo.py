"""Documents with hidden keys, and the demo on the embedded model."""

import re

import pytest
from typer.testing import CliRunner

from offload_runtime.cli import app
from offload_runtime.demo import Document, build_document, is_right, shipped_prose
from offload_runtime.errors import UserError


@pytest.mark.parametrize("tokens", [1024, 8192, 262144])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_length_depth_and_key(tokens: int, depth: float) -> None:
    document = build_document(tokens, depth, seed=3)
    assert tokens <= len(document.text) <= tokens + 20  # a word more at most
    keys = re.findall(r"The pass key for ([a-z-]+) is (\d+)\.", document.text)
    assert len(keys) == 4
    assert dict(keys)[document.name] == document.answer
    assert len({number for _, number in keys}) == 4
    where = document.text.index(f"{document.name} is {document.answer}") / tokens
    assert where == pytest.approx(depth, abs=0.01 + 300 / tokens)  # a sentence of the book further at most
    assert document.text.endswith(f"The pass key for {document.name} is")


def test_the_seed_decides() -> None:
    assert build_document(2048, seed=1) == build_document(2048, seed=1)
    assert build_document(2048, seed=1).answer != build_document(2048, seed=2).answer


def test_other_prose_and_tokenizer() -> None:
    words = build_document(1500, 0.5, 0, "one two three four. " * 50, lambda text: len(text.split()))
    assert 1490 <= len(words.text.split()) <= 1510


def test_bad_requests() -> None:
    with pytest.raises(UserError, match="depth"):
        build_document(2048, depth=1.2)
    with pytest.raises(UserError, match="too few"):
        build_document(10)
    with pytest.raises(UserError, match="empty"):
        build_document(2048, prose=" \n\n ")


def test_judging() -> None:
    document = Document("", "48213", "silly-walrus", 0.3)
    assert is_right(" 48213. ", document)
    assert not is_right(" 482130.", document)
    assert not is_right("", document)
    assert not is_right(" The 48213", document)


def test_prose_is_plain() -> None:
    assert shipped_prose().isascii()
    assert 60_000 < len(shipped_prose()) <= 65_536


def test_demo_finds_the_key() -> None:
    result = CliRunner().invoke(app, ["demo", "--ctx-tokens", "1536", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "right: the key is" in result.stdout
    assert "TTFT" in result.stdout


def test_demo_says_when_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import offload_runtime.cli_demo as cli_demo

    monkeypatch.setattr(cli_demo, "ask", lambda *_, **__: " 00000.")
    monkeypatch.setattr(cli_demo, "figures", lambda *_: {})
    monkeypatch.setattr(cli_demo, "summary", lambda _: [])
    result = CliRunner().invoke(app, ["demo", "--ctx-tokens", "1536", "--device", "cpu"])
    assert result.exit_code == 1
    assert "wrong" in result.stderr
