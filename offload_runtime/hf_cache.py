"""A transformers Cache that keeps its keys and values in pinned host memory, for transformers' own generate.

>>> cache = OffloadedCache(model, RuntimeConfig(ctx=65536, budget="1/16"))
>>> model.generate(**inputs, past_key_values=cache, max_new_tokens=64)

transformers' loop, its sampling, streamers and pipelines stay as they are.
Only the model's forward is led elsewhere, and only when it is handed such a
cache: the prompt to this package's prefill, each later token to its decode step
(a CUDA graph on a GPU). Every call gets the whole conversation; what it shares
with the tokens that the cache holds already is not computed again.
"""

from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .adapter import ModelAdapter
from .calibration import Calibration
from .calibration_file import check_calibration
from .config import RuntimeConfig
from .errors import UserError
from .generation import strip_padding
from .session import Session, calibration_from_prompt

# transformers 5.24 calls it "cache", earlier versions "past_key_values".
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class OffloadedCache(Cache):
    """The caches of one batch of sequences, made for config.ctx tokens each; budgets are parts of ctx.

    To transformers it looks like a cache without layers, so the whole input comes
    with every call of generate. Beam search and assisted decoding, which take
    tokens back, are refused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: RuntimeConfig | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.config = config or RuntimeConfig()
        self.adapter = ModelAdapter(model)
        if self.config.calibration is not None:
            calibration = Calibration.load(Path(self.config.calibration))
        check_calibration(calibration, self.config, model)
        self.calibration = calibration
        self.session: Session | None = None
        self.prompts: list[torch.Tensor] = []
        self.fed: list[torch.Tensor] = []  # tokens [B] decoded after the prompts
        lead_forward(model)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits [B, V] after input_ids: [B, 1] the next token of each sequence, [B, T] a prompt to prefill.

        attention_mask [B, seen + T] hides padding on the left; transformers leaves it out
        when there is none, and then position_ids [B, T] tell how many tokens came before.
        """
        count = input_ids.shape[1]
        if attention_mask is not None:
            seen = attention_mask.shape[1] - count
        else:
            seen = 0 if position_ids is None else int(position_ids[0, 0])
        if not seen:
            return self._prefill(strip_padding(input_ids, attention_mask))
        if count > 1 or self.session is None:
            raise UserError(
                "an OffloadedCache takes the whole conversation with every call, not a part of it"
            )
        return self._step(input_ids[:, 0])

    def _prefill(self, prompts: list[torch.Tensor]) -> torch.Tensor:
        longest = max(len(prompt) for prompt in prompts)
        self._check_room(longest)
        if self.session is None or self.session.layout.batch != len(prompts):
            self.session = None  # free the old caches first
            ctx = self.config.ctx
            calibration = self.calibration or calibration_from_prompt(
                self.adapter, self.config, prompts[0], ctx
            )
            self.session = Session(self.adapter, self.config, calibration, len(prompts), ctx)
        else:
            self.session.remember(self.prompts, self.fed)
        logits = self.session.prefill(prompts, self.config.ctx - longest)
        self.prompts, self.fed = prompts, []
        return logits

    def _step(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert self.session is not None
        self._check_room(max(len(prompt) for prompt in self.prompts) + len(self.fed) + 1)
        self.fed.append(token_ids.clone())
        return self.session.step(token_ids)

    def _check_room(self, tokens: int) -> None:
        if tokens > self.config.ctx:
            raise UserError(
                f"{tokens} tokens do not fit into ctx {self.config.ctx}; make the cache with a larger one"
            )

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        if self.session is not None:
            self.session.clear()
        self.prompts, self.fed = [], []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise UserError("an OffloadedCache does not do beam search")

    def crop(self, *_: Any, **__: Any) -> None:
        raise UserError("an OffloadedCache does not take tokens back (assisted decoding)")

    @property
    def is_croppable(self) -> bool:
        return False


def lead_forward(model: PreTrainedModel) -> None:
    """Let the model's forward pass calls with an OffloadedCache to it; other calls are untouched."""
    plain = model.forward
    if hasattr(plain, "leads_to_offloaded_cache"):
        return

    @wraps(plain)
    def forward(*arguments: Any, **keywords: Any) -> Any:
        caches = [keywords.get(name) for name in ("cache", "past_key_values")]
        cache = next((cache for cache in caches if isinstance(cache, OffloadedCache)), None)
        if cache is None:
            return plain(*arguments, **keywords)
        input_ids = arguments[0] if arguments else keywords.get("input_ids")
        if input_ids is None:
            raise UserError("an OffloadedCache takes input_ids, not embeddings")
        logits = cache.forward(input_ids, keywords.get("attention_mask"), keywords.get("position_ids"))
        parts: dict[str, Any] = {"logits": logits[:, None], CACHE_FIELD: cache}  # logits [B, 1, V]
        return CausalLMOutputWithPast(**parts)

    forward.leads_to_offloaded_cache = True  # type: ignore[attr-defined]
    model.forward = forward
