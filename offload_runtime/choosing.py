"""How one sequence's next token is chosen and when it ends, as transformers' generate would have it."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Chooser:
    """Of one sequence: transformers' logits processors, sampling or not, and the tokens that end it.

    Every sequence draws from a generator of its own, so that its tokens do not
    depend on which others are decoded beside it.
    """

    processors: Any  # a LogitsProcessorList
    do_sample: bool
    ends: frozenset[int]
    generator: torch.Generator | None = None

    @property
    def plain(self) -> bool:
        """Whether the choice is the largest logit and nothing else."""
        return not self.do_sample and not self.processors

    def choose(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The next token [1] from logits [1, V], after ids [1, n]."""
        scores = self.processors(ids, logits.to(torch.float32, copy=True))
        if not self.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(torch.softmax(scores, -1), 1, generator=self.generator)[:, 0]


def make_chooser(
    model: Any, prompt: torch.Tensor, max_new_tokens: int, seed: int | None, **sampling: Any
) -> Chooser:
    """What transformers' generate prepares for a 1-D prompt; `sampling` are arguments of generate."""
    prepared: dict[str, Any] = {}

    def prepare(_: Any, input_ids: torch.Tensor, **parts: Any) -> torch.Tensor:
        prepared.update(parts)
        return input_ids

    ids = prompt.to(model.device)[None]
    model.generate(ids, max_new_tokens=max_new_tokens, custom_generate=prepare, **sampling)
    config = prepared["generation_config"]
    generator = None
    if config.do_sample:
        generator = torch.Generator(model.device)
        generator.manual_seed(torch.seed() if seed is None else seed)
    return Chooser(prepared["logits_processor"], config.do_sample, end_ids(config.eos_token_id), generator)


def end_ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset([value])
