"""How many places a job takes: what fits, no more than documents, and one where more gain nothing."""

from offload_runtime.config import RuntimeConfig
from offload_runtime.memory import FreeMemory
from offload_runtime.places import Work, best_fitting, choose_places, place_sizes
from offload_runtime.planner import make_plan
from offload_runtime.speed import Traffic
from offload_runtime.weights import count_weights

from .eight_b import LLAMA_8B


def places(
    host_gb: float, documents: int = 100, new_tokens: int = 512, bounds: list[int] | None = None
) -> int:
    """bounds: places of the sizes that these need; by default each has ctx."""
    config = RuntimeConfig(ctx=131072, budget=2048)
    free = FreeMemory(int(host_gb * 1e9), int(78e9))

    def plan_of(count: int, spare: int):
        sizes = () if bounds is None else place_sizes(bounds, count, spare)
        return make_plan(config, LLAMA_8B, free, "cuda", batch=count, place_tokens=sizes)

    work = Work([131072] * documents if bounds is None else bounds, new_tokens, Traffic())
    return choose_places(plan_of, count_weights(LLAMA_8B), work).batch


def test_memory_documents_and_gain_bound_the_places():
    assert places(25) == 1  # 17.2 GB of rows a place
    assert 2 <= places(130) <= 7
    assert places(130, documents=1) == 1
    assert places(1000) >= places(130)
    assert places(130, new_tokens=1) == 1  # nothing is decoded that others could share


MIXED = [65_536, 130_048, 32_768, 98_304, 49_152, 81_920]


def test_sizes_are_spread_over_the_documents():
    assert place_sizes(MIXED, 1) == (131_072,)
    assert place_sizes(MIXED, 6) == (131_072, 98_304, 81_920, 65_536, 49_152, 32_768)
    assert place_sizes(MIXED * 4, 12) == tuple(n for n in place_sizes(MIXED, 6) for _ in range(2))
    assert place_sizes([100] * 50, 3) == (4096,) * 3
    assert place_sizes(MIXED, 6, 2) == (131_072,) * 3 + (98_304, 81_920, 65_536)
    assert place_sizes(MIXED, 2, 2) == (131_072,) * 2


def test_spare_room_where_memory_allows():
    def plan_of(count: int, spare: int):
        sizes = place_sizes(MIXED, count, spare)
        free = FreeMemory(int(host_gb * 1e9), int(78e9))
        config = RuntimeConfig(ctx=131072, budget=2048)
        return make_plan(config, LLAMA_8B, free, "cuda", batch=count, place_tokens=sizes, continuous=True)

    chosen = {}
    for host_gb in (50, 68, 80, 500):
        plan = best_fitting(plan_of, 6)
        chosen[host_gb] = plan.fits, plan.layout.rooms
    sizes = [place_sizes(MIXED, 6, spare) for spare in (0, 0, 1, 2)]
    assert chosen == dict(zip(chosen, zip((False, True, True, True), sizes, strict=True), strict=True))


def test_documents_of_mixed_lengths_get_more_places():
    assert places(120, bounds=MIXED * 10) > places(120)


def test_a_plan_counts_the_memory_of_each_place():
    sizes = place_sizes(MIXED, 6)
    free = FreeMemory(10**12, int(78e9))
    plan = make_plan(
        RuntimeConfig(ctx=131072), LLAMA_8B, free, "cuda", batch=6, place_tokens=sizes, continuous=True
    )
    whole = make_plan(RuntimeConfig(ctx=131072), LLAMA_8B, free, "cuda", batch=6, continuous=True)
    assert whole.needs.pinned == 6 * 131_072 * 32 * 8 * 512
    page = 2 << 20
    assert plan.needs.pinned == 32 * 8 * (sum(sizes) * 512 + 6 * page)
    assert plan.needs.device == whole.needs.device
