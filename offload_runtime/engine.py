"""OffloadedModel: a transformers causal LM that decodes with its KV cache in host memory."""

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .adapter import ModelAdapter
from .arguments import pad_left, refuse_unsupported
from .cache.host_rows import head_spans
from .cache.managed import managed_available
from .cache.row_memory import RowMemory
from .calibration import Calibration
from .calibration_file import check_calibration, own_calibration, with_choice
from .config import RuntimeConfig, make_config
from .continuous import ContinuousBatch
from .devices import choose_device, free_unused
from .errors import RunError, UserError
from .fitting import plan_session, require_weights
from .generation import TokenLoop
from .loading import load_model, load_tokenizer
from .memory import limit_gpu
from .model_check import load_config
from .session import Session, calibration_from_prompt
from .snapshot import Snapshot, save
from .stats import call_figures
from .weights import weight_bytes

LOAD_ROOM_TOKENS = 1024  # a question and its answer after a loaded document


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
        free_unused(model.device)  # what models before this one left; the first prompt does not wait for that
        self.model = model.eval()
        self.config = config or RuntimeConfig()
        limit_gpu(str(model.device), self.config.gpu_memory)
        self.tokenizer = tokenizer
        self.adapter = ModelAdapter(model)
        if self.config.calibration is not None:
            calibration = Calibration.load(Path(self.config.calibration))
        check_calibration(calibration, self.config, model)
        self.calibration = calibration
        self.stats: dict[str, Any] = {}
        self.fitted: list[str] = []  # what fit=True shrank for the caches in use
        self._memory = RowMemory(model.device)
        self._session: Session | None = None
        self._had_session = False
        self._calibration_s = 0.0  # of the last call's time: a calibration made from its prompt

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
        rope_scaling: str | None = None,
        quantize: str | None = None,
        quantization_config: Any = None,
        gguf_file: str | None = None,
        **settings: Any,
    ) -> "OffloadedModel":
        """Load a model by directory, hub name or GGUF file. `settings` are the fields of RuntimeConfig.

        device: "auto" takes CUDA. dtype: default the checkpoint's own on CUDA, float32 on CPU.
        rope_scaling: "yarn:4" for contexts past the trained length. quantize: "bnb-4bit" or
        "torchao-int8", or give transformers' own quantization_config. gguf_file: a GGUF file in
        the directory or repository. Raises UserError or RunError in one line, before loading
        when the weights cannot fit; the caches are planned when generate knows the prompt, and
        refused before they are allocated (or shrunk, with fit=True).
        """
        config = make_config(with_choice(settings, name_or_path, rope_scaling))
        place = choose_device(device)
        limit_gpu(str(place), config.gpu_memory)
        source = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
        # Remote code's sizes are known only by running it, a GGUF file's and quantised ones by loading.
        gguf = gguf_file or str(name_or_path).endswith(".gguf")
        if not (trust_remote_code or quantize or quantization_config or gguf):
            require_weights(load_config(str(name_or_path), revision, token), config, place, dtype)
        model = load_model(
            name_or_path, place, dtype=dtype, rope_scaling=rope_scaling, quantize=quantize,
            quantization_config=quantization_config, gguf_file=gguf_file, **source,
        )  # fmt: skip
        file = own_calibration(name_or_path, rope_scaling) if config.calibration is None else None
        calibration = None if file is None else Calibration.load(file)
        try:
            tokenizer = load_tokenizer(name_or_path, gguf_file, **source)
        except UserError:
            tokenizer = None
        return cls(model, config, tokenizer, calibration)

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
        self._calibration_s = 0.0
        loop = TokenLoop(self._open_session, streamer, on_prefill)
        try:
            out = self.model.generate(
                left_ids, attention_mask=left_mask, generation_config=generation_config,
                custom_generate=loop.__call__, **kwargs,
            )  # fmt: skip
        except (MemoryError, RuntimeError):  # PyTorch's out of memory too
            self._session = loop.session = None  # half allocated: the next call starts afresh
            raise
        self.stats = call_figures(loop, weight_bytes(self.model), self._calibration_s, self.fitted)
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
        if last is not None and last.layout.batch != batch:
            last = None
        kept = last if last is not None and any(len(ids) for ids in last.cached_ids) else None
        config = None
        if last is None or (kept is None and last.layout.capacity != capacity):
            self._session = last = None
            config = self._plan(batch, capacity)  # before calibration, which row memory is made beside
        calibration = kept.calibration if kept is not None else self.calibration_for(prompts[0], capacity)
        if kept is not None and kept.layout.capacity >= need:
            return kept
        if last is not None and last.layout.capacity == capacity and last.accepts(calibration):
            last.calibrate(calibration)
            return last
        self._session = last = None  # free the old caches before the new ones take their place
        session = self._new_session(config or self._plan(batch, capacity), calibration, batch, capacity)
        if kept is not None and kept.layout.label_bits == session.layout.label_bits:
            session.adopt(kept)
        self._session = session
        return session

    def calibration_for(self, prompt: torch.Tensor, capacity: int) -> Calibration:
        """The model's calibration, or one made from the prompt's first tokens when it has none."""
        if self.calibration is not None:
            return self.calibration
        began = time.perf_counter()
        calibration = calibration_from_prompt(self.adapter, self.config, prompt, capacity)
        self._calibration_s = time.perf_counter() - began
        return calibration

    def _plan(
        self, batch: int, capacity: int, continuous: bool = False, place_tokens: tuple[int, ...] = ()
    ) -> RuntimeConfig:
        """The config of a session that fits; its rows' memory is in the making from here on."""
        free_unused(self.model.device, cycles=self._had_session)
        idle = self._memory.idle_bytes
        config, layout, self.fitted = plan_session(
            self.config, self.adapter, batch, capacity, idle, continuous, place_tokens
        )
        for note in self.fitted:
            warnings.warn(note, stacklevel=2)
        if config.placement == "host":
            self._memory.prepare(layout.layers, layout.region_bytes, head_spans(layout))
        return config

    def _new_session(
        self,
        config: RuntimeConfig,
        calibration: Calibration,
        batch: int,
        capacity: int,
        place_tokens: tuple[int, ...] = (),
    ) -> Session:
        self._had_session = True
        try:
            return Session(
                self.adapter,
                config,
                calibration,
                batch,
                capacity,
                memory=self._memory,
                place_tokens=place_tokens,
            )
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(
                f"the GPU has no room for the caches of {batch} x {capacity} tokens; "
                "lower ctx, slots or budget (`ds-offload plan` shows what fits)"
            ) from error

    def continuous(
        self,
        places: int,
        tokens: int,
        prompt: torch.Tensor | None = None,
        overlap: bool = True,
        place_tokens: Sequence[int] = (),
    ) -> ContinuousBatch:
        """A batch of `places` sequences of up to `tokens` tokens that come and go; see continuous.py.

        place_tokens: a place's own largest sequence, so that short ones need less host memory; on a GPU
        without managed memory every place takes as much as the longest all the same. A model
        without a calibration is calibrated on `prompt`, which only one place can be.
        It takes the place of generate's caches.
        """
        capacity, sizes = self.config.capacity(tokens), tuple(place_tokens)
        if sizes and (len(sizes) != places or max(sizes) > tokens):
            raise UserError(f"place_tokens are {sizes}; give {places} numbers of at most {tokens}")
        if self.calibration is None and (places > 1 or prompt is None):
            raise UserError(
                "several places need a calibration, or answers would depend on which document "
                "came first; run `ds-offload calibrate`, or use 1 place"
            )
        no_prompt = torch.empty(0, dtype=torch.long)
        self._session = None
        if self.model.device.type == "cuda" and not managed_available(self.model.device):
            sizes = ()
        config = self._plan(places, capacity, True, sizes)
        calibration = self.calibration_for(no_prompt if prompt is None else prompt, capacity)
        return ContinuousBatch(self._new_session(config, calibration, places, capacity, sizes), overlap)

    def save_cache(self, directory: str | Path) -> None:
        """Keep the cached tokens' rows and labels on disk, so that load_cache can go on from them.

        Written whole or not at all; a snapshot already in `directory` is replaced.
        For a document to ask many questions of, generate one token first. A layer
        with a sliding window holds its last tokens only, so such a model goes on
        from exactly the tokens saved.
        """
        if self._session is None:
            raise UserError("there is nothing to save yet: generate first, then save the cache")
        save(self._session, directory)

    def load_cache(self, directory: str | Path, new_tokens: int = LOAD_ROOM_TOKENS) -> int:
        """Take over what save_cache wrote; generate(ids, resume=True) then prefills only what is new.

        new_tokens: room to make beyond the saved tokens. Returns the tokens loaded.
        UserError when the snapshot is damaged or another model's.
        """
        snapshot = Snapshot.open(directory)
        calibration = snapshot.check(self.adapter, self.config, self.calibration)
        capacity = snapshot.capacity(self.adapter, self.config, new_tokens)
        self._session, batch = None, snapshot.header["layout"]["batch"]
        session = self._new_session(self._plan(batch, capacity), calibration, batch, capacity)
        snapshot.fill(session)
        self._session = session
        return sum(snapshot.header["lengths"])

    def close(self) -> None:
        """Free the caches, their pinned memory and the matrix library's workspaces."""
        self._session = None
        free_unused(self.model.device)
        self._memory.free()

    def __enter__(self) -> "OffloadedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
