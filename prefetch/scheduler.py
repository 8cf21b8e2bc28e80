"""The layer-ahead prefetcher: predict, select and fetch for layer i+1 while layer i computes.

All streams and events of decoding are here. Layer i's input is kept; a side stream turns
it into layer i+1's query, selects by label and finds the missing rows, and a copy stream
gathers them, so that the next prediction need not wait for this one's rows. In mode "correct",
layer i+1 makes the true selection beside that gather, waits for it and fetches only what the
prediction missed. What layer i waits for comes first: the prediction begins when its own selection
is made, and its late rows go over the link before those for layer i+1.
In mode "predict" (the paper's DS-Offload) layer i+1 waits for the gather and attends to
the predicted selection as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..cache.layer_cache import PREDICTED, TRUE, LayerCache
from ..cache.layout import KVLayout
from ..cache.selection import Selection, Workspace
from .kept_inputs import KeptInputs

URGENT = -1  # stream priority; torch's default is 0, the lowest
# Of predictions and their gathers. The model's products fill every SM with thread blocks; at equal priority a
# short kernel of the next layer's prediction would wait for the last of them to start (20 to 90 us).
AHEAD = -2

# (layer index, its predecessor's input [B, 1, E], the predecessor's keyword arguments)
# -> (query [B, Hq, D], softmax scale)
QueryPredictor = Callable[[int, torch.Tensor, dict[str, Any]], tuple[torch.Tensor, float]]


class Prefetcher:
    """Decides for every layer of a decode step what it attends to, and gets it there.

    caches: the offloaded layers' by layer index; the other layers keep to themselves.
    predicted_layers: the layers whose selection is predicted; empty in mode "off".
    delay_cycles: GPU cycles that every prediction is held back, for tests of ordering.
    """

    def __init__(
        self,
        layout: KVLayout,
        caches: Mapping[int, LayerCache],
        predict_query: QueryPredictor,
        predicted_layers: frozenset[int],
        attend_predicted: bool,
        device: torch.device,
        delay_cycles: int = 0,
    ) -> None:
        self.caches, self.predict_query = caches, predict_query
        self.predicted_layers, self.attend_predicted = predicted_layers, attend_predicted
        self.delay_cycles = delay_cycles
        self.work, self.selection = Workspace(layout, device), Selection(layout, device)
        # Double-buffered: layer i+1's prediction is made while layer i's is in use.
        self.side_works = (Workspace(layout, device), Workspace(layout, device))
        self.predictions = (Selection(layout, device), Selection(layout, device))
        self.inputs = KeptInputs()
        self.waiting: tuple[torch.Tensor, dict[str, Any]]  # what a layer that fetches late predicts from
        self.on_gpu = device.type == "cuda"
        self.ready, self.chosen, self.done, self.fetched = (events(caches, self.on_gpu) for _ in range(4))
        self.capture_stream: torch.cuda.Stream | None = None
        if self.on_gpu:
            # A graph's kernels keep the priority of the streams they were captured on: a step that runs
            # beside a prefill gets the next free SM, not the one after all of the prefill's blocks.
            self.side_stream, self.copy_stream = (torch.cuda.Stream(device, priority=AHEAD) for _ in range(2))
            self.capture_stream = torch.cuda.Stream(device, priority=URGENT)

    def before_layer(self, index: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Called with layer `index`'s input [B, 1, E]: start the prediction for the layer after it."""
        target = index + 1
        if target not in self.predicted_layers:
            return
        kept = self.inputs.keep(target, hidden)
        if self._fetches_late(index):
            self.waiting = kept, arguments
        else:
            self._start(target, kept, arguments)
            self._gather_ahead(target)

    def _start(self, target: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Predict layer `target`'s selection, on the side stream after what the main one was given so far."""
        if not self.on_gpu:
            self._predict(target, hidden, arguments)
            return
        self.ready[target].record()
        with torch.cuda.stream(self.side_stream):
            self.side_stream.wait_event(self.ready[target])
            self._delay()
            self._predict(target, hidden, arguments)
            self.chosen[target].record()

    def _fetches_late(self, index: int) -> bool:
        """Whether layer `index` fetches rows when it attends: those must not queue behind rows for later."""
        return index in self.caches and not (self.attend_predicted and index in self.predicted_layers)

    def _gather_ahead(self, target: int) -> None:
        """Fetch the rows that the prediction for layer `target` misses, on the copy stream."""
        cache, work = self.caches[target], self.side_works[target % 2]
        if not self.on_gpu:
            cache.gather(work)
            return
        with torch.cuda.stream(self.copy_stream):
            self.copy_stream.wait_event(self.chosen[target])
            self._delay()
            cache.gather(work)
            self.done[target].record()

    def _delay(self) -> None:
        if self.delay_cycles:
            torch.cuda._sleep(self.delay_cycles)

    def _predict(self, target: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Select for layer `target` by its predicted query and give the missing rows slots."""
        query, scale = self.predict_query(target, hidden, arguments)
        cache, prediction, work = (
            self.caches[target],
            self.predictions[target % 2],
            self.side_works[target % 2],
        )
        cache.select(query, scale, prediction, work, PREDICTED, self.attend_predicted)
        cache.give_slots(prediction, work, PREDICTED, self.attend_predicted)

    def selection_for(self, index: int, query: torch.Tensor, scale: float) -> Selection:
        """What layer `index` attends to, its rows resident. query [B, Hq, D] is the true query."""
        cache = self.caches[index]
        predicted = index in self.predicted_layers
        if predicted and self.attend_predicted:
            selection = self.predictions[index % 2]
            self._wait(self.done, index)
        else:
            selection = self.selection
            if predicted:
                self._wait(self.chosen, index)  # both selections read the history and change the slots' maps
            cache.select(query, scale, selection, self.work, TRUE, True)
            if index + 1 in self.predicted_layers:
                # Beside each other two selections take 120 us, one after the other 72 each (H100, 262,144
                # tokens), and this layer waits for its own.
                self._start(index + 1, *self.waiting)
            cache.give_slots(selection, self.work, TRUE, True)
            if predicted:
                self._wait(self.done, index)  # a slot of a wrong prediction may be written a second time
            cache.gather(self.work)
            if index + 1 in self.predicted_layers:
                self._after_late_rows(index)
        if predicted:
            self.inputs.release(index)  # the main stream has waited for what read it
        return selection

    def _wait(self, events: dict[int, torch.cuda.Event], index: int) -> None:
        """Order the main stream after an event of layer `index`."""
        if self.on_gpu:
            torch.cuda.current_stream().wait_event(events[index])

    def _after_late_rows(self, index: int) -> None:
        """Layer `index` has its rows: the link is free for those of the next one."""
        if self.on_gpu:
            self.fetched[index].record()
            self.copy_stream.wait_event(self.fetched[index])
        self._gather_ahead(index + 1)


def events(caches: Mapping[int, LayerCache], on_gpu: bool) -> dict[int, torch.cuda.Event]:
    """One event a layer; none without a GPU, where everything runs in order."""
    return {index: torch.cuda.Event() for index in caches} if on_gpu else {}
