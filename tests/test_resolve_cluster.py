"""The cluster kernel with resolving: the bits of itself without it followed by resolve_reference."""

import pytest
import torch

from offload_runtime.kernels.residency import resolve_reference
from offload_runtime.kernels.select_cluster import select_and_resolve_cluster

from .cluster_problem import RECENT, SINKS, Problem, needs_clusters


class Resolved:
    """A selection, the maps of a resident set and what resolving writes, for one problem."""

    def __init__(self, problem, n_slots):
        batch, kv_heads, capacity = problem.shape

        def full(*shape, value=-1):
            return torch.full((batch, kv_heads, *shape), value, dtype=torch.int32, device="cuda")

        self.tokens, self.counts = problem.empty_selection()
        self.slot_of_token, self.token_in_slot, self.stamps = full(capacity), full(n_slots), full(n_slots)
        self.hand = full(value=0)
        self.miss_tokens, self.miss_slots = full(problem.k_max, value=-9), full(problem.k_max, value=-9)
        self.miss_counts = full(value=-9)
        self.counters = torch.zeros(2, 3, dtype=torch.int64, device="cuda")

    def maps(self):
        return self.slot_of_token, self.token_in_slot, self.stamps, self.hand

    def lists(self):
        return self.miss_tokens, self.miss_slots, self.miss_counts, self.counters

    def run(self, problem, step, phase, new_rows=None):
        """One launch. new_rows: of a sticky selection, whose previous one is this one."""
        select_and_resolve_cluster(
            problem.query_labels, problem.offsets, problem.codes, problem.scales, problem.bits,
            problem.budgets, problem.lengths, SINKS, RECENT, self.tokens, self.counts,
            None if new_rows is None else self.tokens, new_rows or 0,
            *self.maps(), step, phase, *self.lists(),
        )  # fmt: skip

    def run_apart(self, problem, step, phase, new_rows=None):
        """The same kernel without resolving, then the reference."""
        previous = None if new_rows is None else self.tokens
        problem.run(self.tokens, self.counts, previous, new_rows or 0)
        resolve_reference(self.tokens, self.counts, *self.maps(), step, phase, *self.lists())

    def check(self, expected):
        """Every tensor equal; what lies past a count is never written, so the lists are equal in full."""
        for name, want in vars(expected).items():
            assert torch.equal(getattr(self, name), want), f"{name} differs"


def compare_resolved(problem, n_slots, new_rows=None, steps=3, moved=0.1):
    """Two phases a step, the queries moving between them; returns the last state."""
    got, want = Resolved(problem, n_slots), Resolved(problem, n_slots)
    for i in range(2 * steps):
        step = torch.tensor([7 + i // 2], dtype=torch.int32, device="cuda")
        got.run(problem, step, i % 2, new_rows)
        want.run_apart(problem, step, i % 2, new_rows)
        got.check(want)
        problem.query_labels += torch.randn_like(problem.query_labels) * moved
    return got


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("new_rows", [None, 100])
@pytest.mark.parametrize("n_slots", [2048, 2049, 4096, 8192])
def test_resolves_as_the_reference(n_slots, new_rows):
    got = compare_resolved(Problem([65536], 65536, [2048], kv_heads=8), n_slots, new_rows)
    counters = got.counters.tolist()
    assert counters[0][0] == counters[1][0] == 3 * 8 * 2048
    assert 0 < counters[1][2] <= counters[1][1] < counters[1][0]  # hits and misses in both phases


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize(
    ("budget", "n_slots"),
    [(16384, 16384), (16384, 18432), (40000, 40000), (40000, 65536)],  # 40000: two passes over the ring
)
def test_resolves_a_large_budget(budget, n_slots):
    compare_resolved(Problem([262144], 262144, [budget], kv_heads=2), n_slots, steps=2, moved=0.3)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("new_rows", [None, 50])
def test_resolves_a_ragged_batch(new_rows):
    problem = Problem([65536, 1, 70, 40000, 9000], 65536, [4096, 16, 16, 1, 9000], kv_heads=4)
    compare_resolved(problem, 9000, new_rows)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("new_rows", [None, 10])
def test_resolves_when_all_tokens_are_selected(new_rows):
    problem = Problem([3000, 69], 3000, [3000, 3000])
    got = compare_resolved(problem, 3000, new_rows, steps=1)
    assert got.miss_counts.tolist() == [[0, 0], [0, 0]]  # the second phase finds what the first brought
    assert got.counters.tolist()[0] == [2 * (3000 - SINKS - RECENT + 1), 0, 0]


@pytest.mark.gpu
@needs_clusters
def test_resolves_tokens_that_lie_together():
    problem = Problem([65536], 65536, [4096])
    problem.query_labels.zero_()  # equal scores: one CTA's first tokens
    compare_resolved(problem, 5000, steps=1, moved=0.1)


@pytest.mark.gpu
@needs_clusters
def test_resolves_in_a_cuda_graph():
    problem = Problem([65536], 65536, [2048], kv_heads=8)
    got, want = Resolved(problem, 3000), Resolved(problem, 3000)
    step = torch.tensor([0], dtype=torch.int32, device="cuda")
    Resolved(problem, 3000).run(problem, step, 0)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got.run(problem, step, 0)
        got.run(problem, step, 1)
    for i, length in enumerate((65536, 60000, 3000, 70, 5)):
        problem.lengths.fill_(length)
        step.fill_(i)
        graph.replay()
        want.run_apart(problem, step, 0)
        want.run_apart(problem, step, 1)
        got.check(want)
        problem.query_labels += torch.randn_like(problem.query_labels) * 0.1
