"""The cluster kernel against label_scores_reference and select_topk_reference.

Its scores are rounded differently, so selections are compared by their scores:
where they differ, the scores may differ by no more than 1e-3 of the scores' spread.
"""

import pytest
import torch

from offload_runtime.kernels.select_cluster import cluster_select_available, dynamic_bytes
from offload_runtime.kernels.sticky import sticky_topk_reference
from offload_runtime.kernels.topk import select_topk_reference

from .cluster_problem import RECENT, SINKS, Problem, needs_clusters


def check(tokens, counts, expected_tokens, expected_counts, scores):
    """Counts and order exactly; the two selections only differ in tokens of nearly equal score."""
    assert torch.equal(counts, expected_counts)
    for b, count in enumerate(counts.tolist()):
        for h in range(tokens.shape[1]):
            got, want = tokens[b, h, :count].long(), expected_tokens[b, h, :count].long()
            assert (tokens[b, h, count:] == -1).all()
            assert (got[1:] > got[:-1]).all()
            if count == 0:
                continue
            selectable = scores[b, h][scores[b, h].isfinite()]
            assert scores[b, h, got].isfinite().all(), "a token outside the selectable span"
            ours, theirs = scores[b, h, got].sort().values, scores[b, h, want].sort().values
            spread = (selectable.max() - selectable.min()).item()
            assert (ours - theirs).abs().max().item() <= 1e-3 * spread


def compare(problem):
    tokens, counts = problem.empty_selection()
    tokens.fill_(12345)
    counts.fill_(12345)
    problem.run(tokens, counts)
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
def test_equal_scores_go_to_the_earliest():
    problem = Problem([20000], 20000, [1500])
    problem.query_labels.zero_()
    tokens, counts = problem.empty_selection()
    problem.run(tokens, counts)
    first = torch.arange(SINKS, SINKS + 1500, dtype=torch.int32, device="cuda")
    assert (tokens == first).all()


@pytest.mark.gpu
@needs_clusters
def test_same_bits_every_time():
    problem = Problem([131072], 131072, [8192], kv_heads=8)
    first, counts = problem.empty_selection()
    problem.run(first, counts)
    for _ in range(10):
        tokens, counts = problem.empty_selection()
        problem.run(tokens, counts)
        assert torch.equal(tokens, first)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("new_rows", [0, 100, 5000])
def test_sticky_selection(new_rows):
    problem = Problem([65536, 3000], 65536, [4096, 256])
    tokens, counts = problem.empty_selection()
    for step in range(3):
        problem.query_labels += torch.randn_like(problem.query_labels) * 0.1
        expected, expected_counts = problem.empty_selection()
        before, before_counts = tokens.clone(), counts.clone()
        scores = problem.scores()
        problem.run(tokens, counts, tokens, new_rows)
        sticky_topk_reference(
            scores, problem.budgets, new_rows, problem.lengths, SINKS, RECENT,
            before, before_counts, expected, expected_counts,
        )  # fmt: skip
        check(tokens, counts, expected, expected_counts, scores)
        if step:
            for b, count in enumerate(counts.tolist()):
                for h in range(tokens.shape[1]):
                    new = ~torch.isin(tokens[b, h, :count], before[b, h])
                    assert int(new.sum()) <= new_rows


@pytest.mark.gpu
@needs_clusters
def test_replays_in_a_cuda_graph_with_new_lengths():
    problem = Problem([65536], 65536, [2048], kv_heads=8)
    tokens, counts = problem.empty_selection()
    problem.run(tokens, counts)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.run(tokens, counts)
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
        share = dynamic_bytes(capacity, 16, False) // 4
        assert share % 32 == 0
        assert share * 16 >= capacity
        assert dynamic_bytes(capacity, 16, True) == share * 4 + share // 8
