"""One layer's cache: append, select, give slots, gather, attend. The path of a row.

Sticky selection is made in two parts where there are kernels for it (kernels/admission.py): select() finds
what may enter, gather() brings it, finish() chooses meanwhile, and attend_early() does what needs none of it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.admission import admit_reference, choose_reference
from ..kernels.admit_cluster import admit_in_clusters, choose_in_clusters
from ..kernels.append import append_rows
from ..kernels.attend_in_parts import attend_to_entered, attend_to_members
from ..kernels.attend_pieces import Inputs
from ..kernels.combine_pieces import Pieces
from ..kernels.gather import gather_rows
from ..kernels.history import REMEMBERED, empty_history
from ..kernels.query_labels import query_labels
from ..kernels.residency import ENTERING, REST, WHOLE, resolve
from ..kernels.scores import label_scores
from ..kernels.select_cluster import cluster_select_available, select_by_labels_cluster
from ..kernels.sparse_decode import sparse_attention
from ..kernels.sticky import sticky_topk
from ..kernels.topk import select_topk
from .host_rows import HostRows, Lender
from .label_cache import LabelCache, LabelMaps
from .layout import KVLayout
from .resident_set import ResidentSet
from .selection import Choice, Misses, Selection, Workspace

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
        self.counters = torch.zeros(layout.batch, 2, 4, dtype=torch.int64, device=device)

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

    @property
    def in_two_parts(self) -> bool:
        """Whether a selection is: a sticky one, where there are kernels for the parts or references run."""
        return self.history is not None and (self.one_kernel or not self.history.is_cuda)

    def attends_in_parts(self, choice: Choice) -> bool:
        """Whether attention is: over what is resident, and when it has come over what enters.

        After a true selection only. A prediction's rows come while the next prediction selects, and beside
        that the early part takes longer than it saves: 7.50 ms a step for 7.41 (262,144 tokens, H200).
        """
        return self.in_two_parts and self.one_kernel and choice.phase == TRUE

    @property
    def may_miss_members(self) -> bool:
        """Whether a member can have lost its slot: there are too few for all members and what may enter.

        Else none loses it, since a history and its slots are cleared together: predictions leave the members
        alone, and nothing is missed besides what enters.
        """
        return self.in_two_parts and self.layout.slots < self.layout.most_candidates

    def make_slots(self) -> None:
        """Allocate the slots unless they exist."""
        _ = self.resident.slots

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the current token's row: key and value [B, Hkv, D] to slots and host."""
        lengths, resident = self.state.lengths, self.resident
        append_rows(key, value, lengths, resident.slots, resident.sinks, resident.recent, self.host.rows)

    def append_label(self, key: torch.Tensor) -> None:
        """Store the current token's label; it is recent, so this step's selections do not look for it."""
        self.labels.write(key[:, :, None], self.maps, self.state.positions)  # [B, Hkv, 1, D]

    def label_query(self, query: torch.Tensor, scale: float, phase: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What query [B, Hq, D] is compared with the labels by: kernels/query_labels.py."""
        resident, maps = self.resident, self.maps
        places = (resident.slots, self.state.lengths, resident.sinks, resident.recent)
        return query_labels(query, maps.query_map, maps.key_mean, *places, scale, phase == TRUE)

    def select(
        self,
        label_query: tuple[torch.Tensor, torch.Tensor],
        selection: Selection,
        work: Workspace,
        phase: int,
        attended: bool,
    ) -> None:
        """Select each KV head's tokens by label score; in two parts, find what may enter and give it slots.

        attended: the step attends to this selection, which the next sticky ones then start from; else it
        only moves rows early.
        """
        cache, fixed = self.labels, (self.resident.sinks, self.resident.recent)
        arguments = (*label_query, cache.codes, cache.scales, cache.bits)
        if not self.one_kernel:
            label_scores(*arguments, self.state.lengths, *fixed, work.scores)
        if self.in_two_parts:
            self._admit(arguments, work, phase, attended)
        elif self.one_kernel:
            chosen = (selection.tokens, selection.counts)
            select_by_labels_cluster(*arguments, self.budgets, self.state.lengths, *fixed, *chosen)
        else:
            self._top_k(selection, work, attended)

    def _admit(self, scored_by: tuple[Any, ...], work: Workspace, phase: int, attended: bool) -> None:
        """Sticky selection's first part: the tokens that may enter, with their slots, and the candidates."""
        fixed = (self.resident.sinks, self.resident.recent)
        limits = (self.budgets, self.new_rows or 0, self.state.lengths, *fixed)
        entering = work.entering
        lists = (self.history, attended, entering.tokens, entering.counts, work.candidates)
        arguments: tuple[Any, ...] = (*limits, *lists)
        if self.one_kernel:
            misses = (*work.misses.lists, self.counters)
            slots: tuple[Any, ...] = (self.resident.maps, self.state.step, phase, REMEMBERED, misses)
            admit_in_clusters(*scored_by, *arguments, *slots)
        else:
            admit_reference(work.scores, *arguments)
            self._resolve(entering, work.misses, phase, False, ENTERING)

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
        if not self.in_two_parts:
            self._resolve(selection, work.misses, phase, attended, WHOLE)

    def finish(self, selection: Selection, work: Workspace, phase: int, attended: bool) -> None:
        """The second part of a selection in two: choose among the candidates, and list rows missed besides.

        There are such rows when a member has lost its slot: only where may_miss_members is True.
        """
        if not self.in_two_parts:
            return
        resident, choose = self.resident, choose_in_clusters if self.one_kernel else choose_reference
        assert self.history is not None
        maps = (resident.slot_of_token, resident.stamps)
        chosen = (selection.tokens, selection.counts, selection.slots, *maps)
        steps = (self.state.step, phase, self.counters)
        choose(work.candidates, self.budgets, resident.sinks, self.history, attended, *chosen, *steps)
        if self.may_miss_members:
            self._resolve(selection, work.late_misses, phase, attended, REST)

    def _resolve(self, listed: Selection, misses: Misses, phase: int, attended: bool, part: int) -> None:
        kept_steps = 0 if self.history is None else REMEMBERED
        maps, purpose = self.resident.maps, (phase, attended, kept_steps, part)
        resolve(listed.tokens, listed.counts, *maps, self.state.step, *purpose, *misses.lists, self.counters)

    def gather(self, work: Workspace) -> None:
        """Bring the rows that give_slots() listed from host memory into their slots."""
        self._gather(work.misses)

    def gather_rest(self, work: Workspace) -> None:
        """Bring those that finish() listed; after gather(), whose slots it may give away again."""
        if self.may_miss_members:
            self._gather(work.late_misses)

    def _gather(self, misses: Misses) -> None:
        gather_rows(self.host.rows, *misses.lists, self.resident.slots, self.layout.fixed_slots)

    def attend_early(
        self, query: torch.Tensor, choice: Choice, scale: float, softcap: float = 0.0
    ) -> Pieces | None:
        """Attention of query [B, Hq, D] as far as no row has to come for it; None where that is nothing."""
        if not self.attends_in_parts(choice) or self.may_miss_members:
            return None
        return self._attend_to_members(self._inputs(query, scale, softcap), choice)

    def attend(
        self,
        query: torch.Tensor,
        choice: Choice,
        scale: float,
        softcap: float = 0.0,
        sink_logits: torch.Tensor | None = None,
        early: Pieces | None = None,
    ) -> torch.Tensor:
        """Attention of query [B, Hq, D] over sinks, selection, recent and current token; [B, Hq, D].

        The selection's rows have come. early: what attend_early() gave.
        """
        inputs, selection = self._inputs(query, scale, softcap), choice.selection
        if self.attends_in_parts(choice):
            entering = choice.work.entering
            pieces = early or self._attend_to_members(inputs, choice)
            stamps = (self.resident.stamps, self.state.step, self.new_rows or 0)
            return attend_to_entered(inputs, entering.tokens, entering.counts, *stamps, pieces, sink_logits)
        inputs, listed = self._by_slots(inputs, selection)
        return sparse_attention(query, inputs.slots, listed, selection.counts, *inputs[2:], sink_logits)

    def _attend_to_members(self, inputs: Inputs, choice: Choice) -> Pieces:
        stamps = (self.resident.stamps, self.state.step, choice.phase, self.new_rows or 0)
        inputs, listed = self._by_slots(inputs, choice.selection)
        return attend_to_members(inputs, listed, choice.selection.counts, *stamps)

    def _by_slots(self, inputs: Inputs, selection: Selection) -> tuple[Inputs, torch.Tensor]:
        """What attends to a selection, and the list to do it by: of slots where all of them were known."""
        if not self.in_two_parts or self.may_miss_members:
            return inputs, selection.tokens
        return inputs._replace(slot_of_token=None), selection.slots

    def _inputs(self, query: torch.Tensor, scale: float, softcap: float) -> Inputs:
        resident, lengths = self.resident, self.state.lengths
        places = (resident.slots, resident.slot_of_token, lengths, resident.sinks, resident.recent)
        return Inputs(query, *places, scale, softcap)
