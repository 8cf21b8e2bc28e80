"""The cluster kernel against label_scores_reference and select_topk_reference.

Its scores are rounded differently, so selections are compared by their scores:
where they differ, the scores may differ by no more than 1e-3 of the scores' spread.
"""

from types import SimpleNamespace

import pytest
import torch

from offload_runtime.kernels.select_cluster import (
    cluster_select_available,
    cluster_sizes,
    dynamic_bytes,
    select_by_labels_cluster,
)
from offload_runtime.kernels.topk import select_topk_reference

from .hopper import needs_hopper as needs_clusters
from .selection_problem import RECENT, SINKS, Problem, check


def select(problem, tokens, counts):
    limits = (problem.budgets, problem.lengths, SINKS, RECENT)
    select_by_labels_cluster(*problem.labels, problem.bits, *limits, tokens, counts)


def compare(problem):
    tokens, counts = problem.empty_selection()
    tokens.fill_(12345)
    counts.fill_(12345)
    select(problem, tokens, counts)
    expected, expected_counts = problem.empty_selection()
    scores = problem.scores()
    select_topk_reference(scores, problem.budgets, problem.lengths, SINKS, RECENT, expected, expected_counts)
    check(tokens, counts, expected, expected_counts, scores)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("length", [1, 63, 127, 1000, 65536, 262144])
@pytest.mark.parametrize("budget", [1, 2048, 16384])
def test_lengths(length, budget):
    compare(Problem([length], max(length, 300), [budget]))


@pytest.mark.gpu
@needs_clusters
def test_a_large_cache_after_a_small_one():
    large = Problem([65536], 65536, [2048])
    compare(large)
    compare(Problem([100], 300, [10]))
    compare(large)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("channels", [16, 32, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_label_formats(group, channels, bits):
    compare(Problem([5001], 5008, [300], group=group, channels=channels, bits=bits))


@pytest.mark.gpu
@needs_clusters
def test_ragged_batch():
    compare(Problem([65536, 1, 70, 40000, 9000], 65536, [4096, 16, 16, 1, 9000], kv_heads=8))


@pytest.mark.gpu
@needs_clusters
def test_every_kv_head_has_its_own_budget():
    compare(Problem([30000, 500], 30000, [[4096, 1, 300, 0], [2, 500, 77, 100]], kv_heads=4))


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0), (300, 0), (1, 1000), (1, -1000)])
def test_scores_that_hardly_differ_or_lie_outside_the_bins(scale, shift):
    problem = Problem([70000], 70000, [5000])
    problem.query_labels *= scale
    problem.offsets += shift
    compare(problem)


@pytest.mark.gpu
@needs_clusters
def test_equal_scores_go_to_the_earliest():
    problem = Problem([20000], 20000, [1500])
    problem.query_labels.zero_()
    tokens, counts = problem.empty_selection()
    select(problem, tokens, counts)
    first = torch.arange(SINKS, SINKS + 1500, dtype=torch.int32, device="cuda")
    assert (tokens == first).all()


@pytest.mark.gpu
@needs_clusters
def test_same_bits_every_time():
    problem = Problem([131072], 131072, [8192], kv_heads=8)
    first, counts = problem.empty_selection()
    select(problem, first, counts)
    for _ in range(10):
        tokens, counts = problem.empty_selection()
        select(problem, tokens, counts)
        assert torch.equal(tokens, first)


@pytest.mark.gpu
@needs_clusters
def test_replays_in_a_cuda_graph_with_new_lengths():
    problem = Problem([65536], 65536, [2048], kv_heads=8)
    tokens, counts = problem.empty_selection()
    select(problem, tokens, counts)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select(problem, tokens, counts)
    for length in (60000, 3000, 70, 5):
        problem.lengths.fill_(length)
        graph.replay()
        expected, expected_counts = problem.empty_selection()
        scores = problem.scores()
        select_topk_reference(
            scores, problem.budgets, problem.lengths, SINKS, RECENT, expected, expected_counts
        )
        check(tokens, counts, expected, expected_counts, scores)


def test_not_available_without_cuda():
    assert not cluster_select_available(torch.device("cpu"), 1000)


def test_shared_memory_holds_every_share():
    for capacity in (1, 100, 262144, 1000001):
        share = (capacity + 511) // 512 * 32  # tokens of one of 16 CTAs
        assert dynamic_bytes(capacity, 16, 1) == share * 4 + share // 8
        assert dynamic_bytes(capacity, 16, 2) == share * 4 + 2 * (share // 8)


@pytest.mark.parametrize(
    ("rows", "capacity", "narrow", "threads"),
    [
        (8, 262144, True, [1024, 512]),
        (8, 1000, True, [1024, 512]),
        (17, 131072, True, [512, 512]),
        (16, 131072, True, [1024, 512]),
        (64, 262144, True, [1024, 512]),
        (64, 262144, False, [512, 512]),
        (8, 524288, True, [1024, 1024]),
    ],
)
def test_as_many_threads_as_an_sm_has_room_for(monkeypatch, rows, capacity, narrow, threads):
    """An H100: 132 SMs of 227 KB for a CTA. Two CTAs of 512 threads share one where the keys of both fit."""
    shared = {"shared_memory_per_block": 49_152, "shared_memory_per_block_optin": 232_448}
    h100 = SimpleNamespace(multi_processor_count=132, **shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    sizes = cluster_sizes(rows, capacity, 2, 1024 if narrow else 512, torch.device("cuda", 0))
    expected = zip((8, 16), threads, strict=True)
    assert sizes == tuple((ctas, each, dynamic_bytes(capacity, ctas, 2)) for ctas, each in expected)
