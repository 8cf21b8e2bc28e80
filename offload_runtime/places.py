"""How many documents a job decodes together: what fits, and of that what the plan says is fastest.

Places are of different sizes where memory can be given to parts of a region: a document of 32K tokens
should not hold what one of 128K needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .job_simulation import Simulation, Speeds
from .planner import Plan
from .speed import Rates, Traffic, predict
from .speed_prefill import GIB
from .weights import Weights

MOST_PLACES = 12
WORTH = 0.97  # of the time with fewer places: a smaller gain is not worth the memory
PLACE_STEP_TOKENS = 4096  # places are rounded up to it: a page of managed memory at 512 bytes a row
SIMULATED = 48  # documents: some rounds of every place, in a tenth of a second


@dataclass(frozen=True)
class Work:
    """What a job has to do: an upper bound on each document's tokens, and new tokens of each."""

    bounds: Sequence[int]
    new_tokens: int
    traffic: Traffic


def place_sizes(bounds: Sequence[int], places: int) -> tuple[int, ...]:
    """Tokens of each place, the longest document's first: evenly spread over the documents' bounds."""
    ordered = sorted(bounds, reverse=True)
    chosen = [ordered[len(ordered) * place // places] for place in range(places)]
    return tuple(-(-tokens // PLACE_STEP_TOKENS) * PLACE_STEP_TOKENS for tokens in chosen)


def sizes_within(bounds: Sequence[int], places: int) -> tuple[int, ...]:
    """place_sizes, none larger than the longest document needs."""
    return tuple(min(max(bounds), size) for size in place_sizes(bounds, places))


def choose_places(plan_of: Callable[[int], Plan], weights: Weights, work: Work) -> int:
    """The places, at most 12, with the shortest predicted job among those whose plan fits; at least 1."""
    best, best_s, steps = 1, 0.0, list[float]()
    for places in range(1, min(MOST_PLACES, len(work.bounds)) + 1):
        plan = plan_of(places)
        if places > 1 and not plan.fits:
            break
        seconds = job_seconds(plan, weights, work, steps)
        if places == 1 or seconds < WORTH * best_s:
            best, best_s = places, seconds
    return best


def job_seconds(plan: Plan, weights: Weights, work: Work, steps: list[float]) -> float:
    """Making the memory once, then the first documents of the job, simulated.

    steps: seconds of a step of fewer sequences, which gets the plan's.
    """
    rates, longest = Rates(), max(work.bounds)
    times = predict(plan, weights, rates, work.traffic, calibrated=True)
    steps.append(times.offload_tpot)
    # By tokens of the longest prompt's, so a little too long for the others.
    speeds = Speeds(times.ttft_compute / plan.batch / longest, steps)
    job = Simulation(plan.layout.rooms, work.new_tokens, speeds).run(work.bounds[:SIMULATED])
    share = min(SIMULATED, len(work.bounds)) / len(work.bounds)
    return plan.needs.pinned / GIB * rates.prefill.pin_s_gib + job / share
