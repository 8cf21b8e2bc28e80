"""What a suite asks: groups of cases that share the tokens in front, so that one prefill serves them all."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .grid import Setting


@dataclass(frozen=True)
class Case:
    """One question: the tokens after the group's prefix, 1-D, and what a right answer is."""

    name: str
    ids: torch.Tensor
    gold: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)  # depth and the like, copied to the result


@dataclass(frozen=True)
class Group:
    """Cases behind one prefix (1-D token ids), each answered with at most new_tokens tokens."""

    task: str
    ctx: int
    prefix: torch.Tensor
    cases: tuple[Case, ...]
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Most tokens of prefix, question and answer."""
        return len(self.prefix) + max(len(case.ids) for case in self.cases) + self.new_tokens

    def keys(self, suite: str, model_hash: str, setting: Setting, options: dict[str, Any]) -> list[str]:
        """One key a case: everything that its result depends on, hashed."""
        prefix = hashlib.sha256(self.prefix.numpy().tobytes())
        keys = []
        for case in self.cases:
            hashed = prefix.copy()
            hashed.update(case.ids.numpy().tobytes())
            facts = [suite, model_hash, setting.facts(), options, self.task, self.ctx, self.new_tokens]
            hashed.update(json.dumps([*facts, case.name, case.gold, case.facts], sort_keys=True).encode())
            keys.append(hashed.hexdigest()[:24])
        return keys


class Tokens:
    """A tokenizer, with and without the special tokens that begin a prompt; all ids are 1-D int64."""

    def __init__(self, tokenizer: Any, chat: bool = False) -> None:
        self.tokenizer, self.chat = tokenizer, chat

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def prefix(self, text: str) -> torch.Tensor:
        return as_ids(self.tokenizer(text, verbose=False).input_ids)

    def rest(self, text: str) -> torch.Tensor:
        return as_ids(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def text(self, ids: torch.Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def special(self) -> int:
        """Tokens that are put around a prompt."""
        return len(self.chat_ids("") if self.chat else self.prefix(""))

    def chat_ids(self, text: str) -> torch.Tensor:
        """The text as a user's message, with the model's turn begun."""
        messages = [{"role": "user", "content": text}]
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        return encoded["input_ids"][0]

    def group(
        self,
        task: str,
        ctx: int,
        document: str,
        questions: Sequence[tuple[str, str, tuple[str, ...], dict[str, Any]]],
        new_tokens: int,
    ) -> Group:
        """A group of questions (name, text, gold, facts) about one document."""
        if self.chat:
            prefix = torch.empty(0, dtype=torch.long)
            ids = [self.chat_ids(document + text) for _, text, _, _ in questions]
        else:
            prefix = self.prefix(document)
            ids = [self.rest(text) for _, text, _, _ in questions]
        cases = [
            Case(name, part, gold, facts) for (name, _, gold, facts), part in zip(questions, ids, strict=True)
        ]
        return Group(task, ctx, prefix, tuple(cases), new_tokens)


def as_ids(ids: Any) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.long)


def cut_middle(ids: torch.Tensor, room: int) -> torch.Tensor:
    """The first and last room / 2 tokens of a prompt [n] that is too long, as LongBench cuts."""
    if len(ids) <= room:
        return ids
    front = room // 2
    return torch.cat([ids[:front], ids[len(ids) - (room - front) :]])


Groups = Callable[[Tokens, int], list[Group]]  # of one context length
