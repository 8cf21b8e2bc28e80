"""How much consecutive selections overlap on a real model: measured on the one that ships here, or others.

The model reads a text, then its next tokens are decoded with teacher forcing through the runtime
itself (its labels, its selection), and every layer's selections are compared from step to step.
"""

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.cache.layer_cache import PREDICTED, TRUE, LayerCache
from offload_runtime.cache.selection import Selection, Workspace
from offload_runtime.calibration import Calibration
from offload_runtime.calibration_file import own_calibration
from offload_runtime.cli_options import model_or_embedded
from offload_runtime.config import RuntimeConfig
from offload_runtime.demo import shipped_prose
from offload_runtime.errors import UserError
from offload_runtime.loading import load_model, load_tokenizer
from offload_runtime.session import Session, calibration_from_prompt

SETTLE_STEPS = 4  # until the resident set no longer fills up for the first time


@dataclass(frozen=True)
class Locality:
    """Shares, means over layers, KV heads and steps.

    overlap: of a selection that the previous step selected too; recall: of the true selection
    that the layer-ahead prediction selects.
    """

    source: str
    tokens: int
    budget_tokens: int
    share: float  # budget / context, which is what settings are matched by
    steps: int
    overlap: float
    recall: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Watch:
    """Keeps the selections of a session's layers, phase by phase, step by step; exact ones."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.chosen: dict[tuple[int, int], list[torch.Tensor]] = {}
        for index, cache in session.offloaded.items():
            self._watch(index, cache)

    def _watch(self, index: int, cache: LayerCache) -> None:
        plain = cache.give_slots

        def give_slots(selection: Selection, work: Workspace, phase: int, attended: bool) -> None:
            plain(selection, work, phase, attended)
            self.chosen.setdefault((index, phase), []).append(selection.tokens.clone())

        cache.give_slots = give_slots  # type: ignore[method-assign]

    def overlap(self, count: int) -> float:
        """Of true selections with the step before's."""
        pairs = [
            (old, new)
            for (_, phase), steps in self.chosen.items()
            if phase == TRUE
            for old, new in pairwise(steps)
        ]
        return self._share(pairs, count)

    def recall(self, count: int) -> float:
        """Of true selections in the same step's predicted ones, over the predicted layers."""
        pairs = [
            pair
            for (index, phase), steps in self.chosen.items()
            if phase == PREDICTED
            for pair in zip(steps, self.chosen[index, TRUE], strict=True)
        ]
        return self._share(pairs, count)

    def _share(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], count: int) -> float:
        """Mean part of the second selection [B, Hkv, K] that is in the first."""
        capacity = self.session.layout.capacity
        shares = []
        for first, second in pairs:
            there = torch.zeros((*first.shape[:2], capacity), dtype=torch.bool, device=first.device)
            there.scatter_(-1, first[..., :count].long(), True)
            shares.append(there.gather(-1, second[..., :count].long()).float().mean())
        return float(torch.stack(shares).mean()) if shares else 1.0


@torch.no_grad()
def measure_locality(
    model: str | None, text: Path | None, ctx: int, shares: list[float], steps: int, device: torch.device
) -> list[Locality]:
    """One Locality for each share of the context that a budget is.

    model: a directory, default the embedded one. ctx: tokens wanted; less where the text or
    what the model was trained for is shorter.
    """
    name = model_or_embedded(model)
    prose = shipped_prose() if text is None else text.read_text(encoding="utf-8")
    ids = load_tokenizer(name)(prose, return_tensors="pt").input_ids[0]
    adapter = ModelAdapter(load_model(name, device))
    room = (SETTLE_STEPS + steps) * len(shares)
    tokens = min(ctx, len(ids), adapter.trained_positions or ctx)
    if tokens - room < 4 * room:
        raise UserError(f"a text of {len(ids)} tokens is too short to measure locality on; give --text")
    # Of exact selections: a sticky one overlaps more by what it is.
    config = RuntimeConfig(ctx=tokens, budget=max(shares), cuda_graph=False, new_rows=None)
    file = own_calibration(name)
    if file is not None:
        calibration = Calibration.load(file)
    else:
        calibration = calibration_from_prompt(adapter, config, ids[:tokens], tokens)
    session = Session(adapter, config, calibration, 1, tokens)
    session.prefill([ids[: tokens - room]], room)
    source = f"{Path(name).name} on {'the shipped prose' if text is None else text.name}"
    feed = iter(ids[tokens - room : tokens].to(device))
    return [_measure_share(session, feed, share, steps, source, tokens) for share in shares]


def _measure_share(
    session: Session, feed: Any, share: float, steps: int, source: str, tokens: int
) -> Locality:
    """Decode on with one budget and compare the selections of the steps after the first few."""
    for cache in session.offloaded.values():
        cache.clear()
        cache.__dict__.pop("select", None)
    count = max(1, round(share * tokens))
    for cache in session.offloaded.values():
        cache.budgets.fill_(count)
    for _ in range(SETTLE_STEPS):
        session.step(next(feed)[None])
    watch = Watch(session)
    for _ in range(steps):
        session.step(next(feed)[None])
    return Locality(
        source, tokens, count, share, steps,
        round(watch.overlap(count), 4), round(watch.recall(count), 4),
    )  # fmt: skip
