"""The token loop: what transformers' generate calls instead of its own sampling loop.

transformers prepares everything (generation config, logits processors, stopping
criteria); this decides nothing about sampling beyond what its `_sample` does.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from .session import Session


@dataclass
class TokenLoop:
    """One generate call. `open_session` gets the prompts (1-D, no padding) and the new-token limit."""

    open_session: Callable[[list[torch.Tensor], int], Session]
    streamer: BaseStreamer | None
    on_prefill: Callable[[int, int], None] | None
    times: dict[str, float] = field(default_factory=dict)
    session: Session | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_peak_bytes: int | None = None  # None on CPU
    decode_peak_bytes: int | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Prefill and decode; returns what transformers' generate returns."""
        started = time.perf_counter()
        input_ids = input_ids.to(model.device)
        prompts = strip_padding(input_ids, model_kwargs.get("attention_mask"))
        limit = generation_config.max_length - input_ids.shape[1]
        self.session = self.open_session(prompts, limit)
        logits = self.session.prefill(prompts, limit, self.on_prefill)
        out = Sequences(input_ids, limit, generation_config)
        fed: list[torch.Tensor] = []
        step_ends: list[float] = []
        try:
            self._decode(out, logits, fed, step_ends, logits_processor, stopping_criteria)
        except BaseException:
            self.session.remember(prompts, fed[:-1])  # the last step may not have reached every layer
            raise
        self.decode_peak_bytes = take_peak_bytes(model.device)
        self.times = token_times(started, step_ends)
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.new_tokens = len(prompts) * (len(fed) + 1)
        self.session.remember(prompts, fed)
        if self.streamer is not None:
            self.streamer.end()
        return out.result()

    def _decode(
        self,
        out: "Sequences",
        logits: torch.Tensor,
        fed: list[torch.Tensor],
        step_ends: list[float],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
    ) -> None:
        """Choose tokens until all sequences stop; those that go back into the model are put in `fed`."""
        assert self.session is not None
        device = out.ids.device
        while True:
            next_ids = out.append(logits, processors)
            stopped = out.stop(criteria)
            step_ends.append(time.perf_counter())
            if not fed:
                self.prefill_peak_bytes = take_peak_bytes(device)
            if self.streamer is not None:
                self.streamer.put(next_ids.cpu())
            if stopped:
                return
            fed.append(next_ids)
            logits = self.session.step(next_ids)


def token_times(started: float, step_ends: list[float]) -> dict[str, float]:
    """TTFT, the mean and the median time of a later token, in seconds (0 where there is none).

    The first decode steps compile kernels and capture the graph: in a short
    answer the mean shows that, the median does not.
    """
    steps = [end - start for start, end in itertools.pairwise(step_ends)]
    return {
        "ttft_s": step_ends[0] - started,
        "tpot_s": statistics.fmean(steps) if steps else 0.0,
        "tpot_median_s": statistics.median(steps) if steps else 0.0,
    }


class Sequences:
    """The growing output ids [B, T + new] and, when asked for, scores and logits of every step."""

    def __init__(self, input_ids: torch.Tensor, limit: int, config: GenerationConfig) -> None:
        batch, self.length = input_ids.shape
        self.ids = input_ids.new_zeros(batch, self.length + limit)
        self.ids[:, : self.length] = input_ids
        self.config = config
        self.unfinished = torch.ones(batch, dtype=torch.long, device=input_ids.device)
        as_dict = config.return_dict_in_generate
        self.scores: list[torch.Tensor] | None = [] if as_dict and config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if as_dict and config.output_logits else None
        self.pad: torch.Tensor | None = config._pad_token_tensor

    def append(self, logits: torch.Tensor, processors: LogitsProcessorList) -> torch.Tensor:
        """Choose the next tokens [B] from logits [B, V] and add them; finished sequences get padding."""
        logits = logits.to(torch.float32, copy=True)
        if self.logits is not None:
            self.logits.append(logits)
        scores = processors(
            cast(torch.LongTensor, self.ids[:, : self.length]), cast(torch.FloatTensor, logits)
        )
        if self.scores is not None:
            self.scores.append(scores)
        if self.config.do_sample:
            next_ids = torch.multinomial(torch.softmax(scores, -1), 1)[:, 0]
        else:
            next_ids = scores.argmax(-1)
        if self.pad is not None:
            pad = self.pad.to(next_ids.device)
            next_ids = next_ids * self.unfinished + pad * (1 - self.unfinished)
        self.ids[:, self.length] = next_ids
        self.length += 1
        return next_ids

    def stop(self, criteria: StoppingCriteriaList) -> bool:
        """Whether every sequence is finished. The only place where decoding waits for the GPU."""
        done = criteria(self.ids[:, : self.length], self.scores and tuple(self.scores))
        self.unfinished = self.unfinished & ~done
        return not bool(self.unfinished.any())

    def result(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        ids = self.ids[:, : self.length]
        if not self.config.return_dict_in_generate:
            return ids
        scores = None if self.scores is None else tuple(self.scores)
        logits = None if self.logits is None else tuple(self.logits)
        parts: dict[str, Any] = {"sequences": ids, "scores": scores, "logits": logits}
        return GenerateDecoderOnlyOutput(**parts)


def strip_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The prompts as 1-D tensors without the tokens that the mask [B, T] hides."""
    if attention_mask is None:
        return list(input_ids)
    return [ids[mask.to(ids.device).bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]


def take_peak_bytes(device: torch.device) -> int | None:
    """Most GPU memory in use since the last call; None on CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
