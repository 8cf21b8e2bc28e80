"""The layer-ahead prefetcher: predict, select and fetch for layer i+1 while layer i computes.

All streams and events of decoding are here. Layer i's input is kept; a side stream turns
it into layer i+1's query, selects by label and finds the missing rows, and a copy stream
gathers them, so that the next prediction need not wait for this one's rows. In mode "correct",
layer i+1 makes the true selection beside that gather, waits for it and fetches only what the
prediction missed. What layer i waits for comes first: the prediction begins when its own selection
is made, and its late rows go over the link before those for layer i+1.
In mode "predict" (the paper's DS-Offload) layer i+1 waits for the gather and attends to
the predicted selection as it is. A sticky selection's rows are known before it is: they
travel while the rest of it is made, and after a true one while the layer attends to what is resident.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..cache.layer_cache import PREDICTED, TRUE, LayerCache
from ..cache.layout import KVLayout
from ..cache.selection import Choice, Selection, Workspace
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
        sticky = any(cache.history is not None for cache in caches.values())
        self.work, self.selection = Workspace(layout, device, sticky), Selection(layout, device)
        # Double-buffered: layer i+1's prediction is made while layer i's is in use.
        self.side_works = (Workspace(layout, device, sticky), Workspace(layout, device, sticky))
        self.predictions = (Selection(layout, device), Selection(layout, device))
        self.inputs = KeptInputs()
        self.waiting: tuple[torch.Tensor, dict[str, Any]]  # what a layer that fetches late predicts from
        self.on_gpu = device.type == "cuda"
        # Of a layer: its prediction may begin; what it selects by is known; the first rows to fetch have
        # slots; prediction and slots are settled; the prediction's rows are there; the first late ones are.
        self.ready, self.asked, self.entered, self.chosen, self.done, self.fetched = (
            events(caches, self.on_gpu) for _ in range(6)
        )
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

    def _fetches_late(self, index: int) -> bool:
        """Whether layer `index` fetches rows when it attends: those must not queue behind rows for later."""
        return index in self.caches and not self._attends_prediction(index)

    def _predict(self, target: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        """Select for layer `target` by its predicted query and give the missing rows slots."""
        query, scale = self.predict_query(target, hidden, arguments)
        cache, prediction, work = (
            self.caches[target],
            self.predictions[target % 2],
            self.side_works[target % 2],
        )
        asked = cache.label_query(query, scale, PREDICTED)
        self._record(self.asked, target)
        cache.select(asked, prediction, work, PREDICTED, self.attend_predicted)
        cache.give_slots(prediction, work, PREDICTED, self.attend_predicted)
        self._record(self.entered, target)
        if self.attend_predicted or cache.may_miss_members:
            cache.finish(prediction, work, PREDICTED, self.attend_predicted)
        self._record(self.chosen, target)

    def _gather_ahead(self, target: int) -> None:
        """Fetch the rows that the prediction for layer `target` misses, on the copy stream."""
        cache, work = self.caches[target], self.side_works[target % 2]
        with self._copying(target):
            cache.gather(work)
            if not self.attend_predicted and cache.may_miss_members:
                self._wait(self.chosen, target)
                cache.gather_rest(work)
            self._record(self.done, target)

    @contextmanager
    def _copying(self, index: int) -> Iterator[None]:
        """On the copy stream, after what layer `index` lists first has slots; without a GPU in order."""
        if not self.on_gpu:
            yield
            return
        with torch.cuda.stream(self.copy_stream):
            self._wait(self.entered, index)
            self._delay()
            yield

    def _delay(self) -> None:
        if self.delay_cycles:
            torch.cuda._sleep(self.delay_cycles)

    def selection_for(self, index: int, query: torch.Tensor, scale: float) -> Choice:
        """What layer `index` attends to, given its true query [B, Hq, D]; wait_for_rows() before its rows."""
        if not self._attends_prediction(index):
            self._select_late(index, query, scale)
            return Choice(self.selection, self.work, TRUE)
        if self.caches[index].in_two_parts:
            self._wait(self.chosen, index)
        if index + 1 in self.predicted_layers:
            # Both can begin now, and the next selection should: begun first, the attention has every SM,
            # and the selection's clusters wait for its end (23 us of 450 for two layers, H200).
            self._wait(self.asked, index + 1)
        return Choice(self.predictions[index % 2], self.side_works[index % 2], PREDICTED)

    def wait_for_rows(self, index: int) -> None:
        """Order the main stream after the rows of layer `index`'s selection, and fetch the next layer's."""
        cache = self.caches[index]
        if self._attends_prediction(index):
            self._wait(self.done, index)
            cache.gather_rest(self.side_works[index % 2])
        else:
            self._wait(self.fetched, index)
            cache.gather_rest(self.work)
            if index + 1 in self.predicted_layers:
                self._gather_ahead(index + 1)
        if index in self.predicted_layers:
            self.inputs.release(index)  # the main stream has waited for what read it

    def _attends_prediction(self, index: int) -> bool:
        return self.attend_predicted and index in self.predicted_layers

    def _select_late(self, index: int, query: torch.Tensor, scale: float) -> None:
        """Make layer `index`'s true selection, and fetch what the prediction for it has not."""
        cache, selection, work = self.caches[index], self.selection, self.work
        if index in self.predicted_layers:
            self._wait(self.chosen, index)  # both selections read the history and change the slots' maps
        cache.select(cache.label_query(query, scale, TRUE), selection, work, TRUE, True)
        if index + 1 in self.predicted_layers:
            # Beside each other two selections take 120 us, one after the other 72 each (H100, 262,144
            # tokens), and this layer waits for its own.
            self._start(index + 1, *self.waiting)
        cache.give_slots(selection, work, TRUE, True)
        self._record(self.entered, index)
        with self._copying(index):
            # After the prediction's rows: a slot of a wrong one may be written a second time.
            cache.gather(work)
            self._record(self.fetched, index)
        cache.finish(selection, work, TRUE, True)  # while rows are on their way

    def _record(self, events: dict[int, torch.cuda.Event], index: int) -> None:
        """Mark in layer `index`'s event what the current stream was given so far."""
        if self.on_gpu:
            events[index].record()

    def _wait(self, events: dict[int, torch.cuda.Event], index: int) -> None:
        """Order the current stream after an event of layer `index`."""
        if self.on_gpu:
            torch.cuda.current_stream().wait_event(events[index])


def events(caches: Mapping[int, LayerCache], on_gpu: bool) -> dict[int, torch.cuda.Event]:
    """One event a layer; none without a GPU, where everything runs in order."""
    return {index: torch.cuda.Event() for index in caches} if on_gpu else {}
