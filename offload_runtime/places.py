"""How many documents a job decodes together: what fits, and of that what the plan says is fastest."""

from collections.abc import Callable
from dataclasses import dataclass

from .planner import Plan
from .speed import Rates, Traffic, predict
from .speed_prefill import GIB
from .weights import Weights

MOST_PLACES = 8
WORTH = 0.95  # of the time with fewer places: a smaller gain is not worth the memory


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

    One place decodes after its prefill; with more, the decoding is hidden behind
    the prefills of others as far as it is shorter.
    """
    rates = Rates()
    times = predict(plan, weights, rates, work.traffic, calibrated=True)
    prefill = times.ttft_compute / plan.batch
    decode = work.new_tokens * times.offload_tpot / plan.batch
    each = prefill + decode if plan.batch == 1 else max(prefill, decode)
    return plan.needs.pinned / GIB * rates.prefill.pin_s_gib + work.documents * each
