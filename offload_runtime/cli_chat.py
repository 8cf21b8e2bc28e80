"""`ds-offload chat`: question after question, over one document or none, with its cache kept.

The document is prefilled once. Every question renders the whole conversation
anew, and only the tokens that the cache does not hold yet are prefilled.
"""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from transformers import StoppingCriteria

from .cli_exits import warn
from .cli_generate import PipeStreamer, read_text
from .cli_model import config_of, load, plan_of
from .cli_progress import Working, quiet_unless_terminal
from .config import make_config
from .engine import OffloadedModel, choose_device
from .errors import UserError
from .loading import load_tokenizer
from .model_check import check_config
from .model_source import ModelSource
from .planner import require

ROOM_TOKENS = 8192  # for questions and answers beside the document, when --ctx is not given
QUESTION_TOKENS = 256  # least room for a question and the template around it
QUESTION_MARK = "\x1f"  # stands for the first question while the document is read; in no text
HINT = "Ctrl-C stops an answer, Ctrl-D ends."

Message = dict[str, str]


@dataclass(frozen=True)
class ChatRequest:
    """What the command line asked for."""

    source: ModelSource
    settings: dict[str, Any]
    document: str | None
    max_new_tokens: int
    sampling: dict[str, Any]


class Stopped(Exception):
    """The user stopped an answer before its first token."""


class Interruptible(StoppingCriteria):
    """Within the context, Ctrl-C asks the answer to stop at its next token; a second one is an interrupt."""

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> "Interruptible":
        self.wanted = False
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, _: int, __: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.wanted, dtype=torch.bool, device=input_ids.device)

    def during_prefill(self) -> None:
        if self.wanted:
            raise Stopped


class AnswerStreamer(PipeStreamer):
    """Streams an answer and keeps its text."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


class Chat:
    """One conversation. `ask` streams an answer to stdout and remembers it."""

    def __init__(self, model: OffloadedModel, request: ChatRequest, console: Console) -> None:
        self.model, self.request, self.console = model, request, console
        self.messages: list[Message] = []
        self.document = ""
        self.interruptible = Interruptible()

    def read(self, document: str) -> None:
        """Prefill the document, with room for all of ctx, before the first question."""
        self.document = document + "\n\n"
        rendered = render(self.model.tokenizer, [{"role": "user", "content": self.document + QUESTION_MARK}])
        ids = encode(self.model.tokenizer, rendered.split(QUESTION_MARK)[0])
        room = self.model.config.ctx - ids.shape[1]
        with Working(self.console, f"reading {ids.shape[1]} tokens") as bar:
            self.model.generate(
                ids.to(self.model.model.device),
                max_new_tokens=room,
                stopping_criteria=[at_once],
                on_prefill=bar.update,
                do_sample=False,
            )

    def ask(self, question: str) -> None:
        """UserError when the conversation has outgrown ctx."""
        with self.interruptible:
            self._ask(question)

    def _ask(self, question: str) -> None:
        content = question if self.messages else self.document + question
        messages = [*self.messages, {"role": "user", "content": content}]
        tokenizer, ctx = self.model.tokenizer, self.model.config.ctx
        ids = encode(tokenizer, render(tokenizer, messages))
        room = ctx - ids.shape[1]
        if room < 1:
            raise UserError(f"the conversation has {ids.shape[1]} tokens and --ctx is {ctx}; start a new one")
        answer = self._stream(ids, min(room, self.request.max_new_tokens))
        if answer is not None:
            self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _stream(self, ids: torch.Tensor, new_tokens: int) -> str | None:
        """The answer's text, as far as it came; None when it was stopped before its first token."""
        stop = self.interruptible
        with Working(self.console, "reading") as bar:

            def on_prefill(done: int, total: int) -> None:
                stop.during_prefill()
                bar.update(done, total)

            streamer = AnswerStreamer(self.model.tokenizer, bar.finish)
            try:
                self.model.generate(
                    ids.to(self.model.model.device),
                    max_new_tokens=new_tokens,
                    streamer=streamer,
                    resume=True,
                    on_prefill=on_prefill,
                    stopping_criteria=[stop],
                    **self.request.sampling,
                )
            except Stopped:
                return None
        stats = self.model.stats
        rate = f", {1 / stats['tpot_s']:.1f} tokens/s" if stats["tpot_s"] else ""
        line = f"{stats['new_tokens']} tokens, first after {stats['ttft_s']:.2f} s{rate}"
        self.console.print(line, style="dim", highlight=False)
        return streamer.text.strip()


def run_chat(request: ChatRequest) -> None:
    """Answer questions from the terminal or from lines of stdin until they end."""
    if request.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {request.max_new_tokens}; it must be at least 1")
    document = None if request.document is None else read_text(request.document)
    make_config(request.settings)
    place = choose_device(request.source.device)
    model_config = config_of(request.source)
    tokenizer = load_tokenizer(request.source.name_or_path, **request.source.hub())
    if not tokenizer.chat_template:
        raise UserError("this model has no chat template; use `ds-offload generate`")
    tokens = 0 if document is None else encode(tokenizer, document).shape[1]
    trained = check_config(model_config).trained_positions or sys.maxsize
    room = max(min(ROOM_TOKENS, trained - tokens), request.max_new_tokens + QUESTION_TOKENS)
    settings = {"ctx": tokens + room, **request.settings}
    config = make_config(settings)
    if tokens + request.max_new_tokens > config.ctx:
        raise UserError(f"the document has {tokens} tokens and --ctx is {config.ctx}; raise --ctx")
    require(plan_of(request.source, config, model_config, place, config.ctx))
    console = Console(stderr=True)
    quiet_unless_terminal()
    model = load(request.source, settings)
    try:
        chat = Chat(model, replace(request, settings=settings), console)
        if document is not None:
            chat.read(document)
        for question in questions(console):
            try:
                chat.ask(question)
            except UserError as error:
                warn(str(error))
    finally:
        model.close()


def questions(console: Console) -> Iterator[str]:
    """Lines that say something. On a terminal, Ctrl-C at the prompt only starts a new line."""
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(HINT, style="dim", highlight=False)
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            console.print(f"\n{HINT}", style="dim", highlight=False)
            continue
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def render(tokenizer: Any, messages: list[Message]) -> str:
    """The conversation as the model's template writes it, ready for an answer."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids [1, T] of a rendered conversation, which has its special tokens already."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def at_once(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """A stopping criterion that ends every sequence after one token."""
    return torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
