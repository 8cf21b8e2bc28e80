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
# Places that are one or two sizes larger than they would have to be, if memory allows: with 8 that fit just
# so, documents waited 12 s of 175 for one of their size (bench/results/continuous_8_sized.json).
SPARES = (2, 1, 0)
SIMULATED = 48  # documents: some rounds of every place, in a tenth of a second

PlanOf = Callable[[int, int], Plan]  # (places, spare of place_sizes) -> their plan


@dataclass(frozen=True)
class Work:
    """What a job has to do: an upper bound on each document's tokens, and new tokens of each."""

    bounds: Sequence[int]
    new_tokens: int
    traffic: Traffic


def place_sizes(bounds: Sequence[int], places: int, spare: int = 0) -> tuple[int, ...]:
    """Tokens of each place, the longest document's first: evenly spread over the documents' bounds.

    spare: a place holds what the one so many before it would, for documents do not come sorted.
    """
    ordered = sorted(bounds, reverse=True)
    chosen = [ordered[len(ordered) * max(0, place - spare) // places] for place in range(places)]
    return tuple(-(-tokens // PLACE_STEP_TOKENS) * PLACE_STEP_TOKENS for tokens in chosen)


def sizes_within(bounds: Sequence[int], places: int, spare: int = 0) -> tuple[int, ...]:
    """place_sizes, none larger than the longest document needs."""
    return tuple(min(max(bounds), size) for size in place_sizes(bounds, places, spare))


def best_fitting(plan_of: PlanOf, places: int) -> Plan:
    """The plan with the most spare room that fits; if none does, the one with the least."""
    for spare in SPARES:
        plan = plan_of(places, spare)
        if plan.fits:
            break
    return plan


def choose_places(plan_of: PlanOf, weights: Weights, work: Work) -> Plan:
    """Of plans that fit, with at most 12 places, that of the shortest predicted job; one place at least."""
    best, steps = best_fitting(plan_of, 1), list[float]()
    best_s = job_seconds(best, weights, work, steps)
    for places in range(2, min(MOST_PLACES, len(work.bounds)) + 1):
        plan = best_fitting(plan_of, places)
        if not plan.fits:
            break
        seconds = job_seconds(plan, weights, work, steps)
        if seconds < WORTH * best_s:
            best, best_s = plan, seconds
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
