"""An OffloadedModel as a job's model: prompts come and go in the places of one continuous batch."""

from collections.abc import Sequence
from typing import Any

import torch

from ..choosing import make_chooser
from ..continuous import ContinuousBatch, Finished
from ..engine import OffloadedModel
from ..errors import UserError
from .answers import Answer, OnStage

GB = 1e9


class ModelAnswerer:
    """chat: put prompts through the model's chat template. sampling: arguments of transformers' generate.

    tokens: the longest prompt and answer that will come, by default the model's ctx;
    each place has room for it, or for its own of place_tokens. Without a calibration file the
    model is calibrated on every prompt anew, so there can be one place only.
    """

    def __init__(
        self,
        model: OffloadedModel,
        chat: bool = False,
        sampling: dict[str, Any] | None = None,
        places: int = 1,
        tokens: int | None = None,
        place_tokens: Sequence[int] = (),
    ) -> None:
        if model.tokenizer is None:
            raise UserError("this model came without a tokenizer; a job needs one")
        self.model, self.tokenizer, self.chat = model, model.tokenizer, chat
        self.sampling = {"do_sample": False} if sampling is None else sampling
        self.places, self.tokens = places, tokens or model.config.ctx
        self.sizes = tuple(place_tokens) if len(set(place_tokens)) > 1 else ()
        self.batch: ContinuousBatch | None = None

    def count(self, prompt: str) -> int:
        return len(self.encode(prompt))

    def start(self, key: Any, prompt: str, max_new_tokens: int, on_stage: OnStage) -> None:
        ids = torch.tensor(self.encode(prompt))
        chooser = make_chooser(self.model.model, ids, max_new_tokens, self.model.config.seed, **self.sampling)
        batch = self._open(ids)
        place = batch.place_for(len(ids) + max_new_tokens)
        if place is None:
            largest = max(self.sizes, default=batch.session.layout.capacity)
            raise UserError(
                f"prompt and new tokens need {len(ids) + max_new_tokens} tokens and the largest place has "
                f"{largest}; raise --ctx or shorten the document"
            )
        batch.join(place, ids, max_new_tokens, chooser, key, on_stage)

    def has_room(self, tokens: int) -> bool:
        batch = self.batch
        if batch is None or not batch.running or tokens > max(self.sizes, default=self.tokens):
            return True
        return batch.place_for(tokens) is not None

    def advance(self) -> list[tuple[Any, Answer]]:
        if self.batch is None:
            return []
        if not self.batch.finished:
            self.batch.step()
        return [(finished.key, self._answer(finished)) for finished in self.batch.take_finished()]

    def answer(self, prompts: Sequence[str], max_new_tokens: int, on_stage: OnStage) -> list[Answer]:
        """Answer prompts, as many at a time as there are places; in order."""
        waiting, answers, at_work = list(range(len(prompts))), dict[int, Answer](), 0
        while waiting or at_work:
            while waiting and at_work < self.places:
                key = waiting.pop(0)
                self.start(key, prompts[key], max_new_tokens, on_stage)
                at_work += 1
            ready = self.advance()
            answers.update(ready)
            at_work -= len(ready)
        return [answers[key] for key in range(len(prompts))]

    def release(self) -> None:
        self.batch = None
        self.model.close()

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt as it is sent."""
        if not self.chat:
            return list(self.tokenizer(prompt).input_ids)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _open(self, prompt: torch.Tensor) -> ContinuousBatch:
        """The batch, its caches allocated once; calibrated on this prompt if the model has no calibration."""
        if self.batch is not None and self.model.calibration is not None:
            return self.batch
        if self.batch is not None:
            capacity = self.batch.session.layout.capacity
            calibration = self.model.calibration_for(prompt, capacity)
            if self.batch.session.accepts(calibration):
                self.batch.session.calibrate(calibration)
                return self.batch
        self.batch = None  # free the old caches first
        self.batch = self.model.continuous(self.places, self.tokens, prompt, place_tokens=self.sizes)
        return self.batch

    def _answer(self, finished: Finished) -> Answer:
        assert self.batch is not None
        layout, config = self.batch.session.layout, self.batch.session.config
        rows = layout.layers * layout.host_bytes
        device = self.model.model.device
        peak = torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else None
        return Answer(
            text=self.tokenizer.decode(finished.tokens, skip_special_tokens=True).strip(),
            finish_reason=finished.reason,
            prompt_tokens=finished.prompt_tokens,
            new_tokens=len(finished.tokens),
            ttft_s=round(finished.ttft_s, 4),
            tpot_s=round(finished.tpot_s, 6),
            hit_rate=finished.moved["hit_rate"],
            gather_gb=finished.moved["gather_gb"],
            pinned_gb=0.0 if config.placement == "gpu" else rows / GB,
            gpu_peak_gb=peak,
        )
