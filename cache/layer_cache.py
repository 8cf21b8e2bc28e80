"""One layer's cache: append, select, give slots, gather, attend. The path of a row."""

from dataclasses import dataclass

import torch

from ..kernels.append import append_rows
from ..kernels.gather import gather_rows
from ..kernels.history import REMEMBERED, empty_history
from ..kernels.query_labels import query_labels
from ..kernels.residency import resolve
from ..kernels.scores import label_scores
from ..kernels.select_cluster import cluster_select_available, select_by_labels_cluster
from ..kernels.sparse_decode import sparse_attention
from ..kernels.sticky import sticky_topk
from ..kernels.topk import select_topk
from .host_rows import HostRows, Lender
from .label_cache import LabelCache, LabelMaps
from .layout import KVLayout
from .resident_set import ResidentSet
from .selection import Selection, Workspace

PREDICTED, TRUE = 0, 1  # phases of a step, the second index of the counters


@dataclass
class BatchState:
    """What changes from step to step, in GPU memory, shared by all layers."""

    lengths: torch.Tensor  # [B] int32: tokens, the current one included; 0 in an empty place
    positions: torch.Tensor  # [B] int32: the current token's, lengths - 1
    step: torch.Tensor  # [1] int32: decode steps since the caches were cleared
    active: torch.Tensor  # [B] int32: tokens a step adds, 1; 0 in an empty place

    def advance(self) -> None:
        """Make room for one more token in every sequence; an empty place stays at length 0."""
        self.lengths.add_(self.active)
        torch.sub(self.lengths, 1, out=self.positions)
        self.step.add_(1)


class LayerCache:
    """Rows in host memory, labels and resident rows on the device, of one layer."""

    def __init__(
        self,
        layout: KVLayout,
        state: BatchState,
        device: torch.device,
        new_rows: int | None,
        memory: Lender,
        rows_place: torch.device | None = None,
    ) -> None:
        """new_rows: sticky selection's, None selects exactly. rows_place: where the rows are kept, by default
        in host memory that `memory` lends."""
        self.layout, self.state, self.new_rows = layout, state, new_rows
        self.host = HostRows(layout, rows_place or torch.device("cpu"), memory, device)
        self.labels = LabelCache(layout, device)
        self.resident = ResidentSet(layout, device)
        self.maps = LabelMaps(layout, device)
        self.one_kernel = cluster_select_available(device, layout.capacity)
        heads = (layout.batch, layout.kv_heads)
        self.history: torch.Tensor | None = None  # kernels/history.py
        if new_rows is not None:
            self.history = empty_history(*heads, layout.capacity, device)
        self.budgets = torch.zeros(heads, dtype=torch.int32, device=device)  # K of each KV head
        self.counters = torch.zeros(layout.batch, 2, 3, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Start clean: nothing resident, nothing counted, no selection remembered."""
        self.resident.clear()
        self.counters.zero_()
        if self.history is not None:
            self.history.zero_()

    def clear_place(self, place: int) -> None:
        """Start one sequence's place clean and leave the others as they are."""
        self.resident.clear_place(place)
        self.counters[place].zero_()
        if self.history is not None:
            self.history[place].zero_()

    def make_slots(self) -> None:
        """Allocate the slots unless they exist."""
        _ = self.resident.slots

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the current token: key and value [B, Hkv, D] to slots and host, its label to the cache."""
        lengths, resident = self.state.lengths, self.resident
        append_rows(key, value, lengths, resident.slots, resident.sinks, resident.recent, self.host.rows)
        self.labels.write(key[:, :, None], self.maps, self.state.positions)  # [B, Hkv, 1, D]

    def select(
        self,
        query: torch.Tensor,
        scale: float,
        selection: Selection,
        work: Workspace,
        phase: int,
        attended: bool,
    ) -> None:
        """Select each KV head's tokens for query [B, Hq, D] by label score.

        attended: the step attends to this selection, which the next sticky ones then start from; else it
        only moves rows early.
        """
        state, resident, maps, cache = self.state, self.resident, self.maps, self.labels
        fixed = (resident.sinks, resident.recent)
        labels, offsets = query_labels(
            query,
            maps.query_map,
            maps.key_mean,
            resident.slots,
            state.lengths,
            *fixed,
            scale,
            phase == TRUE,
        )
        label_arguments = (labels, offsets, cache.codes, cache.scales, cache.bits)
        chosen = (selection.tokens, selection.counts)
        if self.one_kernel:
            limits = (self.budgets, state.lengths, *fixed)
            new_rows = self.new_rows or 0
            select_by_labels_cluster(
                *label_arguments, *limits, *chosen, history=self.history, new_rows=new_rows, attended=attended
            )
        else:
            label_scores(*label_arguments, state.lengths, *fixed, work.scores)
            self._top_k(selection, work, attended)

    def _top_k(self, selection: Selection, work: Workspace, attended: bool) -> None:
        """The best-scored tokens, or with a history the sticky ones."""
        state, fixed = self.state, (self.resident.sinks, self.resident.recent)
        chosen = (selection.tokens, selection.counts)
        if self.history is None:
            select_topk(work.scores, self.budgets, state.lengths, *fixed, *chosen)
            return
        new_rows = self.new_rows or 0
        sticky_topk(
            work.scores, self.budgets, new_rows, state.lengths, *fixed, self.history, attended, *chosen
        )

    def give_slots(self, selection: Selection, work: Workspace, phase: int, attended: bool) -> None:
        """See that each selected token has a slot, and list those whose rows have to be gathered."""
        resident = self.resident
        chosen = (selection.tokens, selection.counts)
        slot_maps = (resident.slot_of_token, resident.token_in_slot, resident.stamps, resident.hand)
        misses = (work.miss_tokens, work.miss_slots, work.miss_counts, self.counters)
        kept_steps = 0 if self.history is None else REMEMBERED
        resolve(*chosen, *slot_maps, self.state.step, phase, attended, kept_steps, *misses)

    def gather(self, work: Workspace) -> None:
        """Bring the rows that give_slots() listed from host memory into their slots."""
        misses = (work.miss_tokens, work.miss_slots, work.miss_counts)
        gather_rows(self.host.rows, *misses, self.resident.slots, self.layout.fixed_slots)

    def attend(
        self,
        query: torch.Tensor,
        selection: Selection,
        scale: float,
        softcap: float = 0.0,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query [B, Hq, D] over sinks, selection, recent and current token; [B, Hq, D]."""
        resident = self.resident
        return sparse_attention(
            query,
            resident.slots,
            selection.tokens,
            selection.counts,
            resident.slot_of_token,
            self.state.lengths,
            resident.sinks,
            resident.recent,
            scale,
            softcap,
            sink_logits,
        )
