"""Which tile a decode step's product runs on, or that torch's own is faster: found by a trial.

One trial a process and shape, because `prefetch="off"` and "correct" must make the
same bits, and sessions that chose by trials of their own could choose differently.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .agreement import agree
from .kernels.attention_trial import event_ms
from .kernels.products import Tile, tiles

log = logging.getLogger(__name__)

TRIAL_LAYERS = 8  # weights read in turn, so that none is in L2: 8 x 50 MB for q, k and v of the 8B shape
TIMED_RUNS = 3
# Of the usual tile's time. Another tile is another order of sums, so other bits: processes should not part
# over a few percent of noise. (An assumption: two trials of one attention kernel differ by up to 6 %.)
CLEARLY = 0.95
# Cycles that the GPU idles while the host launches a run: 3 ms for at most 32 launches of 10 to 50 us.
HEAD_START_CYCLES = 5_000_000

# (layers of one input, x [T, 1, E], tile or None for torch's own products) -> outputs
Work = Callable[[Sequence[nn.Linear], torch.Tensor, Tile | None], Sequence[torch.Tensor]]


def choose_tile(name: str, work: Work, sites: Sequence[Sequence[nn.Linear]], tokens: int) -> Tile | None:
    """The fastest tile for sites of one shape, None where torch's own products are faster.

    Without a GPU, where tests ask for it, the first tile that agrees.
    """
    weight = sites[0][0].weight
    shapes = tuple((*part.weight.shape, part.bias is not None) for part in sites[0])
    key = (name, shapes, weight.dtype, weight.device, tokens)
    known = choices()
    if key not in known:
        with torch.no_grad():
            known[key] = trial(work, sites[:TRIAL_LAYERS], tokens)
        log.info("%s of %s, %d tokens: %s", name, shapes, tokens, known[key] or "torch's own")
    return known[key]


@functools.cache
def choices() -> dict[tuple[Any, ...], Tile | None]:
    """What the trials of this process chose, by shape."""
    return {}


def trial(work: Work, sites: Sequence[Sequence[nn.Linear]], tokens: int) -> Tile | None:
    """Try every tile that agrees with torch's own products."""
    weight = sites[0][0].weight
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(tokens, 1, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    expected = work(sites[0], x, None)
    agreeing = []
    for tile in tiles(tokens):
        got = work(sites[0], x, tile)
        if all(agree(ours, theirs) for ours, theirs in zip(got, expected, strict=True)):
            agreeing.append(tile)
    if not agreeing or not weight.is_cuda:
        return agreeing[0] if agreeing else None
    return fastest({tile: time_ms(work, sites, x, tile) for tile in [*agreeing, None]})


def fastest(times: Mapping[Tile | None, float]) -> Tile | None:
    """The fastest; the first, the usual tile, unless another is clearly faster."""
    usual = next(iter(times))
    best = min(times, key=lambda tile: times[tile])
    return best if times[best] < CLEARLY * times[usual] else usual


def time_ms(work: Work, sites: Sequence[Sequence[nn.Linear]], x: torch.Tensor, tile: Tile | None) -> float:
    """Milliseconds of one run over all sites, none of which waits for the host."""

    def run() -> None:
        for site in sites:
            work(site, x, tile)

    run()
    times = []
    for _ in range(TIMED_RUNS):
        torch.cuda._sleep(HEAD_START_CYCLES)
        times.append(event_ms(run))
    return min(times)
