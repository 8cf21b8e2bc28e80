"""What the selections of a real decode hold: attention mass, recall and overlap, by layer.

LayerCache.attend is wrapped for the time of a call; exact scores come from all host
rows. K is the selection's size, fixed are sinks and recent tokens:
    oracle: mass on fixed tokens and on the K best others by exact scores;
    attended: mass on what was attended to (by labels, or by prediction);
    recall: part of the oracle's K that was selected;
    overlap, oracle_overlap: part of K that the step before had selected, too;
    prefetch_recall: part of the selection, of a sticky one of what may enter, that the prediction had too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from rich.table import Table

from ..audit import attended, dense_attention
from ..cache.layer_cache import LayerCache
from ..cache.selection import Choice, Selection
from ..engine import OffloadedModel
from .asking import ForcedTokens, cost, greedy
from .cases import Case, Group
from .plots import pyplot, save
from .records import Row
from .runner import Report
from .summary import by_point, make_table, point_cells, setting_of

FIGURES = ("oracle", "attended", "recall", "overlap", "oracle_overlap", "prefetch_recall")
TITLES = (
    "mass of the exact top-k",
    "mass attended to",
    "recall of the exact top-k",
    "selection kept from the step before",
    "exact top-k kept from the step before",
    "prefetch recall",
)


class LayerWatch:
    """Sums of one layer's figures over decode steps."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None  # selected, best: [Hkv, T] bool

    def look(
        self, cache: LayerCache, query: torch.Tensor, selection: Selection, scale: float, *more: Any
    ) -> None:
        """query [1, Hq, D]; more: softcap and sink logits as attend() gets them."""
        length = int(cache.state.lengths[0])
        rows = cache.host.link_rows[0, :, :length]
        _, logits, lse = dense_attention(query[0], rows, scale, *more)
        mass = (logits - lse[:, None]).exp().unflatten(0, (rows.shape[0], -1)).mean(1)  # [Hkv, T]
        used, counts = attended(cache, selection, 0, length), selection.counts[0]  # counts [Hkv]
        fixed = fixed_tokens(cache, length)
        most = int(counts.max())
        if not most:
            return
        order = mass.masked_fill(fixed, -1.0).topk(most).indices  # [Hkv, K], best first
        within = torch.arange(most, device=counts.device) < counts[:, None]  # [Hkv, K]
        best = torch.zeros_like(used).scatter_(1, order, within)
        chosen = used & ~fixed
        self.add("oracle", (mass * (best | fixed)).sum(-1).mean())
        self.add("attended", (mass * used).sum(-1).mean())
        self.add("recall", (best & chosen).sum() / best.sum())
        if self.last is not None:
            before = [torch.nn.functional.pad(mask, (0, 1)) for mask in self.last]  # one token longer now
            self.add("overlap", (chosen & before[0]).sum() / chosen.sum())
            self.add("oracle_overlap", (best & before[1]).sum() / best.sum())
        self.last = (chosen, best)

    def add(self, name: str, value: torch.Tensor) -> None:
        self.values.setdefault(name, []).append(float(value))

    def means(self) -> dict[str, float]:
        return {name: fmean(values) for name, values in self.values.items()}


def fixed_tokens(cache: LayerCache, length: int) -> torch.Tensor:
    """Sinks and recent tokens: [T] bool."""
    position = torch.arange(length, device=cache.state.lengths.device)
    return (position < cache.resident.sinks) | (position >= length - cache.resident.recent)


@contextmanager
def watched_layers() -> Iterator[list[LayerWatch]]:
    """Watch every attention over a LayerCache; the list is in the order in which layers were first seen."""
    watches: dict[int, LayerWatch] = {}
    ordered: list[LayerWatch] = []
    plain = LayerCache.attend

    def attend(
        cache: LayerCache, query: torch.Tensor, choice: Choice, scale: float, *more: Any
    ) -> torch.Tensor:
        if id(cache) not in watches:
            watches[id(cache)] = LayerWatch()
            ordered.append(watches[id(cache)])
        softcap, sink_logits, _ = more
        watches[id(cache)].look(cache, query, choice.selection, scale, softcap, sink_logits)
        return plain(cache, query, choice, scale, *more)

    watched = cast(Any, LayerCache)  # its method is replaced for a while
    watched.attend = attend
    try:
        yield ordered
    finally:
        watched.attend = plain


def measure(
    model: OffloadedModel, group: Group, cases: Sequence[Case], resume: bool = False
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Decode the case's true tokens and watch. The model must run without a CUDA graph.

    resume: the group's prefix is in the caches.
    """
    for case in cases:
        with watched_layers() as watches:
            processor = ForcedTokens(case.ids)
            model.generate(
                group.prefix[None], max_new_tokens=len(case.ids), resume=resume, **greedy(processor)
            )
        moved = [layer for layer in model.stats["layers"] if "window" not in layer]
        layers = [
            {**watch.means(), "prefetch_recall": layer["recall"]}
            for watch, layer in zip(watches, moved, strict=True)
        ]
        yield case, {"layers": layers, "steps": len(case.ids) - 1, **cost(model)}


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over cases, by layer and over layers, of every point of the grid."""
    lines = []
    for point, mine in by_point(rows):
        layers = [
            {name: mean(layer.get(name) for layer in same) for name in FIGURES}
            for same in zip(*(row["layers"] for row in mine), strict=True)
        ]
        means = {name: mean(layer[name] for layer in layers) for name in FIGURES}
        lines.append(point | means | {"layers": layers})
    return lines


def mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def table(lines: Sequence[dict[str, Any]]) -> Table:
    names = [name.replace("_", " ") for name in FIGURES]
    made = make_table("attention of real decode steps, means over layers", ("ctx", *names), lines)
    for line in lines:
        values = ["-" if line[name] is None else f"{line[name]:.4f}" for name in FIGURES]
        made.add_row(*point_cells(line, lines), str(line["ctx"]), *values)
    return made


def report(rows: list[Row], out: Path) -> Report:
    lines = summarise(rows)
    pictures = [
        draw(
            [li for li in lines if (li["model"], li["ctx"]) == place],
            out / f"attention-{place[0]}-{place[1]}.png",
            f"{place[0]}, {place[1]:,} tokens",
        )
        for place in dict.fromkeys((line["model"], line["ctx"]) for line in lines)
    ]
    return Report(lines, table(lines), pictures)


def draw(lines: Sequence[dict[str, Any]], file: Path, title: str) -> Path:
    """Every figure over the layers, one line a setting."""
    figure, panels = pyplot().subplots(2, 3, figsize=(13, 7))
    for panel, name, heading in zip(panels.flat, FIGURES, TITLES, strict=True):
        for line in lines:
            points = [(i, la[name]) for i, la in enumerate(line["layers"]) if la[name] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", ms=3, label=setting_of(line).label)
        panel.set(title=heading, xlabel="layer")
        panel.set_ylim(top=1.02)
        if panel.lines:
            panel.legend(fontsize=6)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return save(figure, file)
