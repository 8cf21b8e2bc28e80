"""A session: the caches of one batch, its prefill and its decode steps."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from .adapter import ModelAdapter
from .audit import Audit
from .cache.layer_cache import BatchState, LayerCache
from .cache.layout import biting
from .cache.row_memory import RowMemory
from .cache.window_cache import WindowCache
from .calibration import Calibration
from .calibration_collect import calibrate_prompt
from .config import DEFAULT_LABEL_CHANNELS, RuntimeConfig, label_width
from .decode import DecodeLoop, query_predictor
from .input_guess import InputCorrection
from .layer_settings import head_budgets, predicted_layers
from .layouts import make_layout
from .prefetch.scheduler import Prefetcher
from .prefill import KEEP_SLOTS_TOKENS, PrefillRun, Progress
from .prefill_backend import PrefillBackend
from .products import query_projections

log = logging.getLogger(__name__)


class Session:
    """Caches for `batch` sequences of up to `capacity` tokens each; reusable after clear().

    Rows are kept on the host unless config.placement is "gpu"; "auto" is for the plan to decide.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        config: RuntimeConfig,
        calibration: Calibration,
        batch: int,
        capacity: int,
        delay_cycles: int = 0,
        memory: RowMemory | None = None,
        place_tokens: tuple[int, ...] = (),
    ) -> None:
        """memory: where host rows come from; by default a new one.

        place_tokens: of each sequence, how many tokens get host memory; by default capacity.
        """
        self.adapter, self.config = adapter, config
        channels = calibration.key_map.shape[2]
        self.layout = make_layout(adapter.shape, config, channels, batch, capacity, place_tokens)
        self.new_rows = config.entering(self.layout.budget)
        device = adapter.device

        def integers(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        active = torch.ones(batch, dtype=torch.int32, device=device)
        self.state = BatchState(integers(batch), integers(batch), integers(1), active)
        self.memory = memory or RowMemory(device)
        self.caches = [self._make_cache(window) for window in biting(adapter.windows, capacity)]
        self.offloaded = {i: cache for i, cache in enumerate(self.caches) if isinstance(cache, LayerCache)}
        predicted = predicted_layers(config, calibration, self.offloaded)
        corrections = (calibration.input_shift, calibration.guesses)
        projections = query_projections(adapter.attentions)
        self.correction = InputCorrection(*corrections, adapter.dtype, device, projections, predicted)
        self.prefetcher = Prefetcher(
            self.layout,
            self.offloaded,
            query_predictor(adapter, self.correction),
            predicted,
            config.prefetch == "predict",
            device,
            delay_cycles,
        )
        every = config.audit_every
        self.audit = None if every is None else Audit(every, self.caches, device)
        self.decoder = DecodeLoop(
            adapter, self.caches, self.state, self.prefetcher, config.cuda_graph, self.audit
        )
        self.backend = PrefillBackend()
        self.pinned_wait_s = 0.0  # of the last prefill: that it waited for pinned memory
        self.cached_ids: list[torch.Tensor] = [torch.empty(0, dtype=torch.long)] * batch
        self.kept_tokens = 0  # of the last prefill: tokens that were cached already
        self.long_rotary = False  # which frequencies the cached keys were turned by, where there are two
        self._set_maps(calibration)

    def _make_cache(self, window: int) -> LayerCache | WindowCache:
        device = self.adapter.device
        if window:
            return WindowCache(self.layout, self.state, window, device)
        rows_place = device if self.config.placement == "gpu" else None
        return LayerCache(self.layout, self.state, device, self.new_rows, self.memory, rows_place)

    def calibrate(self, calibration: Calibration) -> None:
        """Give every offloaded layer its label maps; labels made before are of no use afterwards."""
        self.correction.set(calibration.input_shift, calibration.guesses)
        self._set_maps(calibration)

    def _set_maps(self, calibration: Calibration) -> None:
        self.calibration = calibration
        for index, cache in self.offloaded.items():
            maps = (calibration.query_map, calibration.key_map, calibration.key_mean)
            cache.maps.set(*(part[index] for part in maps))

    def accepts(self, calibration: Calibration) -> bool:
        """Whether calibrate() is enough to use it: as many label channels, the same layers predicted and
        corrected."""
        channels = label_width(calibration.key_map.shape[2])
        predicted = predicted_layers(self.config, calibration, self.offloaded)
        alike = predicted == self.prefetcher.predicted_layers and channels == self.layout.label_channels
        return alike and self.correction.accepts(calibration.input_shift, calibration.guesses)

    def clear(self) -> None:
        """Forget every token."""
        self.state.step.zero_()
        self.state.lengths.zero_()
        self.cached_ids = [torch.empty(0, dtype=torch.long)] * self.layout.batch
        for cache in self.offloaded.values():
            cache.clear()

    def prefill(
        self, prompts: Sequence[torch.Tensor], new_tokens: int, on_progress: Progress | None = None
    ) -> torch.Tensor:
        """Prefill 1-D prompts, keeping the prefix each shares with its cached tokens.

        Returns the logits [B, V] after each prompt's last token.
        """
        kept = self._keep(prompts, new_tokens)
        self.kept_tokens = sum(kept)
        for cache in self.offloaded.values():
            cache.clear()  # resident rows only; host rows and labels of the kept tokens stay
        if max(len(prompt) - k for prompt, k in zip(prompts, kept, strict=True)) > KEEP_SLOTS_TOKENS:
            self._free_slots()
        self.state.step.zero_()
        if self.audit is not None:
            self.audit.clear()
        for index, prompt in enumerate(prompts):
            self._set_budgets(index, len(prompt) + new_tokens)
        work = sum(len(prompt) - k for prompt, k in zip(prompts, kept, strict=True)) * len(self.caches)
        finished, logits = 0, []
        self.pinned_wait_s = 0.0
        for index, prompt in enumerate(prompts):
            base = finished

            def progress(done: int, _: int, base: int = base) -> None:
                if on_progress is not None:
                    on_progress(base + done, work)

            run = PrefillRun(
                self.adapter,
                self.caches,
                index,
                len(prompt),
                kept[index],
                self.config.chunk_tokens,
                progress,
                self.backend,
            )
            fresh = prompt[kept[index] :].to(self.adapter.device)
            with self.decoder.fusion.applied(few_tokens=False):
                logits.append(run.run(fresh[None]))
            finished += run.done
            self.pinned_wait_s += run.pinned_wait_s
        self.state.lengths.copy_(torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32))
        self.cached_ids = [prompt.cpu() for prompt in prompts]
        return torch.cat(logits)

    def clear_place(self, place: int) -> None:
        """Empty one sequence's place: steps pass over it, and what it held is forgotten."""
        for tensor in (self.state.lengths, self.state.active):
            tensor[place].zero_()
        self.cached_ids[place] = self.cached_ids[place][:0]
        for cache in self.offloaded.values():
            cache.budgets[place].zero_()
            cache.clear_place(place)

    def prefill_place(self, place: int, prompt: torch.Tensor, on_progress: Progress) -> torch.Tensor:
        """Prefill a 1-D prompt into an empty place, which stays empty to steps until fill_place().

        Returns the logits [1, V] after its last token. Steps may be taken within on_progress.
        """
        run = PrefillRun(
            self.adapter,
            self.caches,
            place,
            len(prompt),
            0,
            self.config.chunk_tokens,
            on_progress,
            self.backend,
        )
        with self.decoder.fusion.applied(few_tokens=False):
            return run.run(prompt.to(self.adapter.device)[None])

    def fill_place(self, place: int, length: int, new_tokens: int) -> None:
        """Let steps go on with a place whose prompt of `length` tokens is prefilled."""
        self._set_budgets(place, length + new_tokens)
        self.state.lengths[place].fill_(length)
        self.state.active[place].fill_(1)

    def prefill_figures(self) -> dict[str, Any]:
        """Of the last prefill: its attention, chunk and wait for row memory; what making that took so far."""
        memory = {"populate_s": self.memory.populate_s, "register_s": self.memory.register_s}
        chunk = {"chunk_tokens": self.config.chunk_tokens, "pinned_wait_s": self.pinned_wait_s}
        return self.backend.figures() | chunk | memory

    def _free_slots(self) -> None:
        """Leave the slots' memory to a long prefill; decode makes them, and its graph, anew."""
        self.decoder.forget_graph()
        for cache in self.offloaded.values():
            cache.resident.release()

    def _set_budgets(self, sequence: int, tokens: int) -> None:
        """Give every offloaded layer the K of a sequence's KV heads, from the tokens it will have."""
        budgets = head_budgets(self.config, self.calibration, tokens)
        for index, cache in self.offloaded.items():
            if isinstance(budgets, int):
                cache.budgets[sequence].fill_(budgets)
            else:
                cache.budgets[sequence].copy_(torch.tensor(budgets[index], dtype=torch.int32))

    def _keep(self, prompts: Sequence[torch.Tensor], new_tokens: int) -> list[int]:
        """Leading tokens of each prompt that stay cached; forgets all others."""
        rotary, longest = self.adapter.length_rotary, max(len(prompt) for prompt in prompts) + new_tokens
        if rotary is not None:
            rotary.choose(longest)
            if rotary.long != self.long_rotary:
                self.cached_ids = [ids[:0] for ids in self.cached_ids]  # keys turned by other frequencies
                self.long_rotary = rotary.long
        kept = []
        for ids, prompt in zip(self.cached_ids, prompts, strict=True):
            shared = shared_prefix(ids, prompt)
            rings = [cache for cache in self.caches if isinstance(cache, WindowCache)]
            kept.append(min([shared, *(ring.keepable(len(ids), shared) for ring in rings)]))
        # What an interrupted prefill leaves is whole in host memory only, not in the rings.
        whole = len(self.offloaded) == len(self.caches)
        self.cached_ids = [ids[: k if whole else 0] for ids, k in zip(self.cached_ids, kept, strict=True)]
        return kept

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Decode one token a sequence: token_ids [B] in, logits [B, V] out (overwritten by the next step)."""
        return self.decoder.step(token_ids)

    def remember(self, prompts: Sequence[torch.Tensor], fed: Sequence[torch.Tensor]) -> None:
        """Note which tokens the caches hold now: the prompts and the tokens fed [B] after them."""
        if fed:
            new = torch.stack(list(fed), 1).cpu()  # [B, steps]
            pairs = zip(prompts, new, strict=True)
            self.cached_ids = [torch.cat([prompt.cpu(), row]) for prompt, row in pairs]

    def adopt(self, other: "Session") -> None:
        """Take over the tokens of a smaller session, layer by layer; the other is of no use afterwards."""
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            if isinstance(mine, WindowCache):
                self._adopt_window(mine, theirs, other.cached_ids)
                continue
            assert isinstance(theirs, LayerCache)  # caches grow, so a layer may begin to slide, never stop
            size = theirs.layout.capacity
            mine.host.rows[:, :, :size].copy_(theirs.host.rows)
            mine.labels.codes[:, :, :size].copy_(theirs.labels.codes)
            mine.labels.scales[:, :, :size].copy_(theirs.labels.scales)
            mine.maps.copy_from(theirs.maps)
        other.caches.clear()
        self.cached_ids, self.long_rotary = other.cached_ids, other.long_rotary

    @staticmethod
    def _adopt_window(
        mine: WindowCache, theirs: LayerCache | WindowCache, cached_ids: Sequence[torch.Tensor]
    ) -> None:
        if isinstance(theirs, WindowCache):
            mine.ring.copy_(theirs.ring)
            return
        for index, ids in enumerate(cached_ids):
            mine.load(index, theirs.host.link_rows[index, :, : len(ids)])


def shared_prefix(cached: torch.Tensor, prompt: torch.Tensor) -> int:
    """Leading tokens that both have in common, less than the whole prompt: its last token must be run."""
    size = min(len(cached), len(prompt) - 1)
    same = cached[:size] == prompt[:size].cpu()
    return size if bool(same.all()) else int((~same).int().argmax())


def calibration_from_prompt(
    adapter: ModelAdapter, config: RuntimeConfig, prompt: torch.Tensor, capacity: int
) -> Calibration:
    """A calibration made from a prompt's first tokens [T], for a model that has none; says so."""
    log.warning(
        "no calibration file: calibrating on the prompt's first tokens; "
        "`ds-offload calibrate` makes a better one"
    )
    channels = min(config.label_channels or DEFAULT_LABEL_CHANNELS, adapter.head_dim)
    return calibrate_prompt(adapter, prompt, channels, capacity)
