"""Sticky selection in mode "predict": the true query selects too, one step behind.

A step attends to what a predicted query selects: the best of the rows that are there, and some new ones. A guess
ranks what a text looks up among the best K, but not among the best new rows, so pass keys got lost (NOTES.md). So
when a layer has attended, its true query selects as well, beside the rest of the layer: the tokens it
selects are the members that the next step's prediction starts from, and its new rows are there by then. No
layer waits for that. The two selections share the new rows of a step.
"""

from collections.abc import Mapping

import torch

from ..cache.layer_cache import TRUE, LayerCache
from ..cache.layout import KVLayout
from ..cache.selection import Selection, Workspace


class Follower:
    """True selections on the side stream, their rows on the copy stream; no streams on a CPU.

    caches: of the layers that attend to predictions, by index; their new rows are halved, rounded up.
    """

    def __init__(
        self,
        layout: KVLayout,
        caches: Mapping[int, LayerCache],
        device: torch.device,
        side_stream: torch.cuda.Stream | None,
        copy_stream: torch.cuda.Stream | None,
        delay_cycles: int,
    ) -> None:
        self.caches, self.side_stream, self.copy_stream = caches, side_stream, copy_stream
        self.delay_cycles = delay_cycles
        for cache in caches.values():
            assert cache.new_rows is not None
            cache.new_rows = -(-cache.new_rows // 2)
        self.selection = Selection(layout, device)
        # Double-buffered: the rows of one layer's list are gathered while the next layer's is made. Before a list
        # is written again, its layer has waited for rows that were asked for later than those of the list.
        self.works = (Workspace(layout, device), Workspace(layout, device))
        # Of the last layers, by reference: until the main stream has waited for what reads them (kept_inputs.py).
        self.queries: dict[int, torch.Tensor] = {}
        self.attended, self.chosen = (
            {index: torch.cuda.Event() for index in caches} if side_stream is not None else {}
            for _ in range(2)
        )

    def follow(self, index: int, query: torch.Tensor, scale: float) -> None:
        """Layer `index` has attended: select by its true query [B, Hq, D] and fetch, for the next step."""
        cache, work = self.caches[index], self.works[index % 2]
        if self.side_stream is None or self.copy_stream is None:
            self._select(cache, query, scale, work)
            cache.gather(work)
            return
        self.queries[index % 2] = query
        self.attended[index].record()
        with torch.cuda.stream(self.side_stream):
            self.side_stream.wait_event(self.attended[index])
            self._delay()
            self._select(cache, query, scale, work)
            self.chosen[index].record()
        with torch.cuda.stream(self.copy_stream):
            self.copy_stream.wait_event(self.chosen[index])
            self._delay()
            cache.gather(work)

    def _delay(self) -> None:
        if self.delay_cycles:
            torch.cuda._sleep(self.delay_cycles)

    def _select(self, cache: LayerCache, query: torch.Tensor, scale: float, work: Workspace) -> None:
        cache.select(query, scale, self.selection, work, TRUE)
        cache.give_slots(self.selection, work, TRUE)

    def finish(self) -> None:
        """End of a step: the main stream waits for the last layers' rows."""
        if self.copy_stream is not None:
            torch.cuda.current_stream().wait_stream(self.copy_stream)
        self.queries.clear()
