"""Conversations: the document is read once, history is kept, Ctrl-C stops an answer and not the program."""

import json
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from offload_runtime import OffloadedModel
from offload_runtime.cli import app
from offload_runtime.cli_chat import Chat, ChatRequest, encode, questions, render
from offload_runtime.cli_options import ModelSource
from offload_runtime.errors import UserError
from offload_runtime.model_check import embedded_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
DOCUMENT = "The town of Brill lies on the river Tamsel. " * 8


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    for file in Path(embedded_model()).iterdir():
        shutil.copy(file, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def chat(talker: Path) -> Chat:
    model = OffloadedModel.from_pretrained(talker, device="cpu", ctx=1024, budget="1/1")
    request = ChatRequest(ModelSource(str(talker), "cpu", None), {}, None, 12, {"do_sample": False})
    return Chat(model, request, Console(stderr=True))


def watch_prefill(chat: Chat) -> list[int]:
    """Tokens that each call prefills."""
    counts: list[int] = []
    plain = chat.model.generate

    def generate(*arguments, on_prefill, **keywords):
        seen = []
        out = plain(*arguments, on_prefill=lambda done, total: seen.append(total), **keywords)
        counts.append(seen[-1] // len(chat.model.adapter.layers))
        return out

    chat.model.generate = generate  # type: ignore[method-assign]
    return counts


def test_the_document_is_read_once_and_history_is_kept(chat, capsys):
    prefilled = watch_prefill(chat)
    chat.read(DOCUMENT)
    chat.ask("Where does Brill lie?")
    chat.ask("And what is the river called?")
    assert prefilled[0] > len(DOCUMENT)
    assert max(prefilled[1:]) < 100  # the questions and what the template puts around them
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert DOCUMENT in chat.messages[0]["content"]
    assert chat.messages[1]["content"].strip() in capsys.readouterr().out


def test_an_answer_equals_transformers_on_the_whole_conversation(chat):
    chat.read(DOCUMENT)
    chat.ask("Where does Brill lie?")
    tokenizer, plain = chat.model.tokenizer, chat.model.model
    question = {"role": "user", "content": "And the river?"}
    ids = encode(tokenizer, render(tokenizer, [*chat.messages, question]))
    expected = plain.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    chat.ask("And the river?")
    assert chat.messages[-1]["content"] == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_a_conversation_that_outgrows_ctx_says_so(chat):
    with pytest.raises(UserError, match="--ctx is 1024; start a new one"):
        chat.ask("x" * 2000)
    chat.ask("hello")
    assert len(chat.messages) == 2


def test_questions_are_the_lines_that_say_something(monkeypatch, tmp_path):
    (tmp_path / "q").write_text("first\n\n   \n second \n")
    with (tmp_path / "q").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert list(questions(Console(stderr=True))) == ["first", "second"]


def test_ctrl_c_stops_the_answer_and_not_the_program(talker):
    process = subprocess.Popen(
        [
            *[sys.executable, "-m", "offload_runtime", "chat", "--model", str(talker), "--device", "cpu"],
            *["--max-new-tokens", "2000", "--ctx", "4096"],
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    for question in (b"Tell me of Brill.\n", b"And of the river.\n"):
        process.stdin.write(question)
        assert process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        counted = process.stderr.readline()
        assert b"tokens, first after" in counted
        assert int(counted.split()[0]) < 2000
        while select.select([process.stdout], [], [], 0)[0]:  # what is left of this answer
            process.stdout.read(4096)
    process.stdin.close()  # end of questions
    assert process.wait(30) == 0


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_a_model_without_template_is_one_line(name):
    extra = ["--chat", "--prompt", "hello"] if name == "generate" else []
    done = CliRunner().invoke(app, [name, "--device", "cpu", *extra])
    assert done.exit_code == 2
    assert done.stderr.startswith("ds-offload: this model has no chat template")
    assert done.stderr.count("\n") == 1
