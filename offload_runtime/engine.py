"""OffloadedModel: a transformers causal LM that decodes with its KV cache in host memory."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .adapter import ModelAdapter
from .calibration import Calibration
from .config import RuntimeConfig, make_config
from .errors import RunError, UserError
from .generation import TokenLoop
from .session import Session
from .stats import collect, memory

CALIBRATION_FILE = "calibration.safetensors"  # looked for in the model's directory

# Arguments of transformers' generate that change the loop itself, and what to say of them.
UNSUPPORTED = {
    "num_beams": "beam search",
    "num_beam_groups": "group beam search",
    "penalty_alpha": "contrastive search",
    "prompt_lookup_num_tokens": "prompt lookup decoding",
    "assistant_model": "assisted decoding",
    "assistant_early_exit": "early-exit decoding",
    "dola_layers": "DoLa decoding",
    "constraints": "constrained beam search",
    "force_words_ids": "constrained beam search",
    "output_attentions": "returning attentions",
    "output_hidden_states": "returning hidden states",
    "past_key_values": "a cache of transformers",
    "cache": "a cache of transformers",
    "cache_implementation": "a cache of transformers",
    "inputs_embeds": "embeddings as input",
    "custom_generate": "a custom generate function",
}


class OffloadedModel:
    """A loaded transformers model with its KV cache offloaded to pinned host memory.

    >>> model = OffloadedModel.from_pretrained(path, ctx=262144, budget="1/16")
    >>> ids = model.generate(input_ids, max_new_tokens=64)

    `stats` holds the last call's figures; `tokenizer` is None when the model
    came without one. On a CPU the same code runs with the torch references.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: RuntimeConfig | None = None,
        tokenizer: Any = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.model = model.eval()
        self.config = config or RuntimeConfig()
        self.tokenizer = tokenizer
        self.adapter = ModelAdapter(model)
        if self.config.calibration is not None:
            calibration = Calibration.load(Path(self.config.calibration))
        check_calibration(calibration, self.config, model)
        self.calibration = calibration
        self.stats: dict[str, Any] = {}
        self._session: Session | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> "OffloadedModel":
        """Load a model by directory or hub name. `settings` are the fields of RuntimeConfig.

        device: "auto" takes CUDA if there is any. dtype: default the checkpoint's
        own on CUDA and float32 on CPU. Raises UserError or RunError in one line.
        """
        config = make_config(with_choice(settings, name_or_path))
        place = choose_device(device)
        if dtype is None:
            dtype = "auto" if place.type == "cuda" else torch.float32
        source = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
        model: Any = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **source)
        model.to(place)
        file = Path(name_or_path) / CALIBRATION_FILE
        calibration = Calibration.load(file) if config.calibration is None and file.is_file() else None
        return cls(model, config, load_tokenizer(name_or_path, source), calibration)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: BaseStreamer | None = None,
        resume: bool = False,
        on_prefill: Callable[[int, int], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate, decoded through the offloaded cache.

        input_ids [B, T], padded left or right as attention_mask [B, T] says; every
        keyword of transformers' generate except those that replace its loop
        (beam search and the like are refused by name). resume=True keeps the
        tokens that the last call's sequences share with these, so a conversation
        goes on without a second prefill. on_prefill(done, total) reports prefill
        in tokens x layers. Returns ids [B, T + new] or a GenerateDecoderOnlyOutput.
        """
        refuse_unsupported(generation_config, kwargs)
        if input_ids.dim() != 2 or 0 in input_ids.shape:
            raise UserError("the prompt is empty; give input_ids of shape [batch, tokens]")
        if not resume and self._session is not None:
            self._session.clear()
        left_ids, left_mask = pad_left(input_ids.to(self.model.device), attention_mask)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        if self.config.seed is not None:
            torch.manual_seed(self.config.seed)
        loop = TokenLoop(self._open_session, streamer, on_prefill)
        out = self.model.generate(
            left_ids, attention_mask=left_mask, generation_config=generation_config,
            custom_generate=loop.__call__, **kwargs,
        )  # fmt: skip
        assert loop.session is not None
        self.stats = self._collect(loop, left_ids.shape)
        ids = out if isinstance(out, torch.Tensor) else out.sequences
        ids[:, : input_ids.shape[1]] = input_ids  # padded as the caller had it
        return out

    def _open_session(self, prompts: list[torch.Tensor], new_tokens: int) -> Session:
        """A session with room for the prompts and the new tokens: the last one, if it will do."""
        need = max(len(prompt) for prompt in prompts) + new_tokens
        if need > self.config.ctx:
            raise UserError(
                f"prompt and new tokens need {need} tokens and ctx is {self.config.ctx}; "
                "raise ctx, shorten the prompt or lower max_new_tokens"
            )
        last, batch = self._session, len(prompts)
        capacity = self.config.capacity(need)
        if last is not None and last.layout.batch == batch and last.layout.capacity == capacity:
            return last
        same_batch = last is not None and last.layout.batch == batch
        holds_tokens = same_batch and any(len(ids) for ids in last.cached_ids)  # type: ignore[union-attr]
        if holds_tokens and last.layout.capacity > need:  # type: ignore[union-attr]
            assert last is not None
            return last
        self._session = None
        if not holds_tokens:
            last = None  # free the old caches before the new ones take their place
            gc.collect()
        session = self._new_session(batch, capacity)
        if last is not None:
            session.adopt(last)
        self._session = session
        return session

    def _new_session(self, batch: int, capacity: int) -> Session:
        try:
            return Session(self.adapter, self.config, self.calibration, batch, capacity)
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(
                f"the GPU has no room for the caches of {batch} x {capacity} tokens; "
                "lower ctx, slots or budget (`ds-offload plan` shows what fits)"
            ) from error

    def _collect(self, loop: TokenLoop, shape: torch.Size) -> dict[str, Any]:
        session = loop.session
        assert session is not None
        prefetcher = session.prefetcher
        weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        cached = sum(len(ids) for ids in session.cached_ids)
        audit = {} if session.audit is None else {"audit": session.audit.figures()}
        return {
            **loop.times,
            "batch": shape[0],
            "prompt_tokens": loop.prompt_tokens,
            "new_tokens": loop.new_tokens,
            "cached_tokens": cached,
            **collect(session.caches, prefetcher.predicted_layers, prefetcher.attend_predicted),
            **memory(session.layout, weight_bytes, loop.prefill_peak_bytes, loop.decode_peak_bytes),
            **audit,
        }

    def close(self) -> None:
        """Free the caches, their pinned memory and the matrix library's workspaces."""
        self._session = None
        gc.collect()
        if self.model.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    def __enter__(self) -> "OffloadedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def with_choice(settings: dict[str, Any], name_or_path: str | Path) -> dict[str, Any]:
    """The settings, with budget and label bits from the calibration file where the user gave none.

    A calibration file holds them when they were chosen for a quality target.
    """
    file = Path(settings.get("calibration") or Path(name_or_path) / CALIBRATION_FILE)
    if not file.is_file():
        return settings  # whoever loads it says so
    chosen: dict[str, Any] = dict(Calibration.load(file).provenance)
    if "budget" not in chosen:
        return settings
    return {"budget": chosen["budget"], "label_bits": int(chosen["label_bits"]), **settings}


def choose_device(device: str) -> torch.device:
    """The torch device for "auto", "cuda", "cuda:1" or "cpu"."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RunError("no CUDA GPU is usable here; use --device cpu, or see `ds-offload doctor`")
    return place


def load_tokenizer(name_or_path: str | Path, source: dict[str, Any]) -> Any:
    """The model's tokenizer, or None when it has none."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **source)
    except (OSError, ValueError):
        return None


def check_calibration(calibration: Calibration | None, config: RuntimeConfig, model: PreTrainedModel) -> None:
    """UserError when the calibration is another model's or has another number of label channels."""
    if calibration is None:
        return
    calibration.check(model.config)
    channels = calibration.key_map.shape[2]
    if config.label_channels not in (None, channels):
        raise UserError(
            f"label_channels is {config.label_channels} but the calibration has {channels}; "
            "leave it out or run `ds-offload calibrate` again"
        )


def refuse_unsupported(generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """UserError naming the first thing asked for that this runtime does not do."""
    for name, meaning in UNSUPPORTED.items():
        value = kwargs.get(name, getattr(generation_config, name, None))
        trivial = value is None or value is False or (name.startswith("num_beam") and value == 1)
        if not trivial:
            raise UserError(f"{meaning} ({name}={value!r}) is not supported; leave {name} out")


def pad_left(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same batch with its padding on the left, where transformers expects it."""
    if attention_mask is None or bool(attention_mask[:, -1].all()):
        return input_ids, attention_mask
    attention_mask = attention_mask.to(input_ids.device)
    order = attention_mask.long().argsort(dim=1, stable=True)  # hidden tokens first, order kept
    return input_ids.gather(1, order), attention_mask.gather(1, order)
