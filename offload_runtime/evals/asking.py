"""Ask a group's questions behind one prefill and judge the answers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..engine import OffloadedModel
from .cases import Case, Group, Tokens
from .metrics import Metric
from .runner import Measure

ANSWER_KEPT = 400  # characters of an answer in the results


class ForcedTokens(LogitsProcessor):
    """Makes the loop emit given token ids [n] first, and keeps the log-probability of each.

    So known text runs through the decode steps, token by token, as generated text does.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids, self.logprobs = ids, []  # type: tuple[torch.Tensor, list[torch.Tensor]]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [1, V] of the next token; all but the forced one become -inf."""
        at = len(self.logprobs)
        if at >= len(self.ids):
            return scores
        wanted = int(self.ids[at])
        self.logprobs.append(scores[0].log_softmax(-1)[wanted])  # stays on the device: no waiting
        forced = torch.full_like(scores, float("-inf"))
        forced[0, wanted] = 0.0
        return forced


def make_measure(metric_of: Callable[[str], Metric], decode_question: bool) -> Measure:
    """metric_of: a task's metric. decode_question: the question too runs through decode steps."""

    def measure(
        model: OffloadedModel, group: Group, cases: Sequence[Case]
    ) -> Iterator[tuple[Case, dict[str, Any]]]:
        for index, case in enumerate(cases):
            answer = ask(model, group, case, decode_question, resume=index > 0)
            score = metric_of(group.task)(answer, case.gold)
            yield (
                case,
                {"score": score, "answer": answer[:ANSWER_KEPT], "gold": list(case.gold), **cost(model)},
            )

    return measure


def ask(model: OffloadedModel, group: Group, case: Case, decode_question: bool, resume: bool) -> str:
    """The greedy answer. resume: the group's prefix is in the caches from the last case."""
    prompt, forced = torch.cat([group.prefix, case.ids]), None
    if decode_question and len(group.prefix):
        # The prompt's last token gives the first logits, so prefill ends with the prefix.
        prompt, forced = group.prefix, ForcedTokens(case.ids)
    skipped = len(case.ids) if forced is not None else 0
    out = model.generate(
        prompt[None],
        max_new_tokens=skipped + group.new_tokens,
        resume=resume,
        **greedy(forced),
    )
    return Tokens(model.tokenizer).text(out[0, len(prompt) + skipped :].cpu())


def greedy(processor: LogitsProcessor | None) -> dict[str, Any]:
    """generate's arguments for plain greedy decoding, whatever the model's own defaults are."""
    processors = LogitsProcessorList([] if processor is None else [processor])
    return {"do_sample": False, "repetition_penalty": 1.0, "logits_processor": processors}


def cost(model: OffloadedModel) -> dict[str, Any]:
    """What the last call did, for the record."""
    names = ("prompt_tokens", "new_tokens", "ttft_s", "tpot_median_s", "hit_rate", "prefetch_recall")
    return {name: model.stats[name] for name in names}
