"""How many documents a job decodes together: what fits, and of that what the plan says is fastest."""

from collections.abc import Callable
from dataclasses import dataclass

from .planner import Plan
from .speed import Rates, Traffic, predict
from .speed_prefill import GIB
from .weights import Weights

MOST_PLACES = 8
WORTH = 0.95  # of the time with fewer places: a smaller gain is not worth the memory
# Measured, 8B shape: a 65,536-token prefill beside a decoding sequence takes 4.8 s instead of 4.2, and three
# sequences beside a prefill take 47 ms a token where a batch without one takes some 28.
PREFILL_BESIDE = 4.8 / 4.2
STEPS_BESIDE = 28 / 47


@dataclass(frozen=True)
class Work:
    """What a job has to do: documents of the longest length, and new tokens of each."""

    documents: int
    new_tokens: int
    traffic: Traffic


def choose_places(plan_of: Callable[[int], Plan], weights: Weights, work: Work) -> int:
    """The places, at most 8, with the shortest predicted job among those whose plan fits; at least 1."""
    best, best_s = 1, job_seconds(plan_of(1), weights, work)
    for places in range(2, min(MOST_PLACES, work.documents) + 1):
        plan = plan_of(places)
        if not plan.fits:
            break
        seconds = job_seconds(plan, weights, work)
        if seconds < WORTH * best_s:
            best, best_s = places, seconds
    return best


def job_seconds(plan: Plan, weights: Weights, work: Work) -> float:
    """Pinning once, then a prefill a document, and its tokens at the rate of a batch that is full.

    One place decodes after its prefill; with more, tokens are decoded beside the prefills of
    others as far as there is time, and the last documents have none beside them. With the times
    measured for a prefill (5.2 s) and a token in four places (30 ms) that makes 52 s of six documents,
    where 51.6 were measured (bench/results/continuous.json).
    """
    rates = Rates()
    times = predict(plan, weights, rates, work.traffic, calibrated=True)
    prefill = times.ttft_compute / plan.batch
    decode = work.new_tokens * times.offload_tpot
    pinning = plan.needs.pinned / GIB * rates.prefill.pin_s_gib
    if plan.batch == 1:
        return pinning + work.documents * (prefill + decode)
    beside = PREFILL_BESIDE * prefill
    left = max(0.0, decode / plan.batch - STEPS_BESIDE * beside)
    return pinning + work.documents * (beside + left) + decode
