"""An OffloadedModel as a job's model: one ragged batch of prompts through generate."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..engine import OffloadedModel
from ..errors import UserError
from .answers import Answer, OnStage


class ModelAnswerer:
    """chat: put prompts through the model's chat template. sampling: arguments of transformers' generate."""

    def __init__(
        self, model: OffloadedModel, chat: bool = False, sampling: dict[str, Any] | None = None
    ) -> None:
        if model.tokenizer is None:
            raise UserError("this model came without a tokenizer; a job needs one")
        self.model, self.tokenizer, self.chat = model, model.tokenizer, chat
        self.sampling = {"do_sample": False} if sampling is None else sampling
        self.eos = eos_ids(model.model.generation_config.eos_token_id)

    def count(self, prompt: str) -> int:
        return len(self.encode(prompt))

    def answer(self, prompts: Sequence[str], max_new_tokens: int, on_stage: OnStage) -> list[Answer]:
        ids = [self.encode(prompt) for prompt in prompts]
        width = max(map(len, ids))
        # [B, T], padded on the left; any token will do as padding, for the mask hides it
        batch = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        out = self.model.generate(
            batch.to(self.model.model.device),
            attention_mask=mask.to(self.model.model.device),
            max_new_tokens=max_new_tokens,
            streamer=TokenCount(max_new_tokens, on_stage),
            on_prefill=lambda done, total: on_stage("prefill", done, total),
            **self.sampling,
        )
        new = out[:, width:].tolist()
        return [self._answer(len(row), tokens, len(ids)) for row, tokens in zip(ids, new, strict=True)]

    def release(self) -> None:
        self.model.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt as it is sent."""
        if not self.chat:
            return list(self.tokenizer(prompt).input_ids)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _answer(self, prompt_tokens: int, tokens: list[int], batch: int) -> Answer:
        """One sequence's tokens, up to its end token, with the call's figures."""
        end = next((place for place, token in enumerate(tokens) if token in self.eos), None)
        tokens = tokens if end is None else tokens[: end + 1]
        stats = self.model.stats
        peaks = [stats[name] for name in ("gpu_prefill_peak_gb", "gpu_decode_peak_gb")]
        return Answer(
            text=self.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            finish_reason="length" if end is None else "stop",
            prompt_tokens=prompt_tokens,
            new_tokens=len(tokens),
            ttft_s=round(stats["ttft_s"], 4),
            tpot_s=round(stats["tpot_s"], 6),
            hit_rate=stats["hit_rate"],
            gather_gb=stats["gather_gb"] / batch,
            pinned_gb=stats["pinned_gb"],
            gpu_peak_gb=max((peak for peak in peaks if peak is not None), default=None),
        )


class TokenCount(BaseStreamer):
    """Reports decode steps; transformers' generate hands it the prompt first."""

    def __init__(self, max_new_tokens: int, on_stage: OnStage) -> None:
        self.total, self.on_stage = max_new_tokens, on_stage
        self.steps = -1

    def put(self, value: torch.Tensor) -> None:
        self.steps += 1
        if self.steps:
            self.on_stage("decode", self.steps, self.total)

    def end(self) -> None:
        pass


def eos_ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, list) else {value}
