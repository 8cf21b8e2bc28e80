"""LongBench's English tasks (arXiv 2308.14508) from local files: one {task, prompt, gold} a line."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UserError
from . import metrics
from .cases import Case, Group, Tokens, cut_middle
from .files import read_jsonl, text_field
from .metrics import Metric

# Task -> metric and most new tokens, as in LongBench's eval.py and dataset2maxlen.json.
TASKS: dict[str, tuple[Metric, int]] = {
    "narrativeqa": (metrics.f1, 128),
    "qasper": (metrics.f1, 128),
    "multifieldqa_en": (metrics.f1, 64),
    "hotpotqa": (metrics.f1, 32),
    "2wikimqa": (metrics.f1, 32),
    "musique": (metrics.f1, 32),
    "triviaqa": (metrics.f1, 32),
    "gov_report": (metrics.rouge_l, 512),
    "qmsum": (metrics.rouge_l, 512),
    "multi_news": (metrics.rouge_l, 512),
    "samsum": (metrics.rouge_l, 128),
    "trec": (metrics.classification, 64),
    "passage_retrieval_en": (metrics.retrieval, 32),
    "passage_count": (metrics.count, 32),
}
FEW_SHOT = ("trec", "triviaqa", "samsum")  # no chat template, and only the answer's first line counts


def metric_of(task: str) -> Metric:
    metric = TASKS[task][0]
    if task not in FEW_SHOT:
        return metric
    return lambda answer, gold: metric(answer.lstrip("\n").split("\n")[0], gold)


def groups(tokens: Tokens, ctx: int, files: Sequence[Path], limit: int) -> list[Group]:
    """Every case of every file, `limit` a file; prompts that are too long lose their middle."""
    if not files:
        raise UserError("the suite longbench reads its cases from files; give them with --file")
    made = []
    for file in files:
        for index, row in enumerate(read_jsonl(file, limit)):
            task, prompt = text_field(row, "task", file, index), text_field(row, "prompt", file, index)
            if task not in TASKS:
                raise UserError(
                    f"{file} line {index + 1}: no metric for task {task!r}; known are {', '.join(TASKS)}"
                )
            made.append(one_group(tokens, ctx, task, prompt, row.get("gold"), f"{file.name} {index}"))
    return made


def one_group(tokens: Tokens, ctx: int, task: str, prompt: str, gold: object, name: str) -> Group:
    right = [gold] if isinstance(gold, str) else gold
    if not isinstance(right, list) or not right or not all(isinstance(text, str) for text in right):
        raise UserError(f"{name}: `gold` must be a text or a list of texts")
    new_tokens = TASKS[task][1]
    chat = tokens.chat and task not in FEW_SHOT
    ids = tokens.chat_ids(prompt) if chat else tokens.prefix(prompt)
    room = ctx - new_tokens
    if room < 2:
        raise UserError(f"--ctx {ctx} leaves no room for a prompt of {task}; raise it")
    case = Case(name, cut_middle(ids, room), tuple(right), {"prompt_cut": len(ids) > room})
    return Group(task, ctx, torch.empty(0, dtype=torch.long), (case,), new_tokens)
