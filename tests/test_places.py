"""How many places a job takes: what fits, no more than documents, and one where more gain nothing."""

from offload_runtime.config import RuntimeConfig
from offload_runtime.memory import FreeMemory
from offload_runtime.places import Work, choose_places
from offload_runtime.planner import make_plan
from offload_runtime.speed import Traffic
from offload_runtime.weights import count_weights

from .eight_b import LLAMA_8B


def places(host_gb: float, documents: int = 100, new_tokens: int = 512) -> int:
    config = RuntimeConfig(ctx=131072, budget=2048)
    free = FreeMemory(int(host_gb * 1e9), int(78e9))

    def plan_of(count: int):
        return make_plan(config, LLAMA_8B, free, "cuda", batch=count)

    return choose_places(plan_of, count_weights(LLAMA_8B), Work(documents, new_tokens, Traffic()))


def test_memory_documents_and_gain_bound_the_places():
    assert places(25) == 1  # 17.2 GB of rows a place
    assert 2 <= places(130) <= 7
    assert places(130, documents=1) == 1
    assert places(1000) >= places(130)
    assert places(130, new_tokens=1) == 1  # nothing is decoded that others could share
