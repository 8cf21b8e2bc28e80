"""The cluster kernel against label_scores_reference and select_topk_reference.

Its scores are rounded differently, so selections are compared by their scores:
where they differ, the scores may differ by no more than 1e-3 of the scores' spread.
"""

import pytest
import torch

from offload_runtime.kernels.history import empty_history, members_of
from offload_runtime.kernels.labels import quantise
from offload_runtime.kernels.scores import label_scores_reference
from offload_runtime.kernels.select_cluster import (
    cluster_select_available,
    dynamic_bytes,
    select_by_labels_cluster,
)
from offload_runtime.kernels.sticky import sticky_topk_reference
from offload_runtime.kernels.topk import select_topk_reference

from .hopper import needs_hopper as needs_clusters

SINKS, RECENT = 4, 64


class Problem:
    """Random labels and queries on the GPU; label cache entries past the lengths are NaN or 255.

    budgets: of each sequence a number, or a list with a number for each KV head.
    """

    def __init__(self, lengths, capacity, budgets, kv_heads=2, group=4, channels=32, bits=4, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device="cuda")

        batch = len(lengths)
        self.query_labels = normal(batch, kv_heads * group, channels) * 0.3
        self.offsets = normal(batch, kv_heads * group) * 2 + 10
        labels = normal(batch, kv_heads, capacity, channels) * 2 + normal(channels)
        scales = torch.full((batch, kv_heads, capacity, 2), float("nan"), device="cuda").half()
        codes = labels.half()
        if bits != 16:
            codes, scales = quantise(labels, bits)
        for b, length in enumerate(lengths):
            codes[b, :, length:] = float("nan") if bits == 16 else 255
            scales[b, :, length:] = float("nan")
        self.codes, self.scales, self.bits = codes.contiguous(), scales.contiguous(), bits
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        per_head = torch.tensor(budgets, dtype=torch.int32, device="cuda").view(batch, -1)
        self.budgets = per_head.expand(-1, kv_heads).contiguous()  # [B, Hkv]
        self.shape = (batch, kv_heads, capacity)
        self.k_max = int(self.budgets.max())

    def empty_selection(self):
        batch, kv_heads, _ = self.shape
        tokens = torch.full((batch, kv_heads, self.k_max), -1, dtype=torch.int32, device="cuda")
        return tokens, torch.zeros(batch, kv_heads, dtype=torch.int32, device="cuda")

    def scores(self):
        scores = torch.empty(self.shape, device="cuda")
        label_scores_reference(
            self.query_labels, self.offsets, self.codes, self.scales, self.bits, self.lengths,
            SINKS, RECENT, scores,
        )  # fmt: skip
        return scores

    def empty_history(self):
        return empty_history(*self.shape, "cuda")

    def run(self, tokens, counts, history=None, new_rows=0, attended=True):
        select_by_labels_cluster(
            self.query_labels, self.offsets, self.codes, self.scales, self.bits, self.budgets, self.lengths,
            SINKS, RECENT, tokens, counts, history, new_rows, attended,
        )  # fmt: skip


def check(tokens, counts, expected_tokens, expected_counts, scores):
    """Counts and order exactly; the two selections only differ in tokens of nearly equal score."""
    assert torch.equal(counts, expected_counts)
    for b, per_head in enumerate(counts.tolist()):
        for h, count in enumerate(per_head):
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
    """Each step's selection from the same history as the reference's, and the history it leaves."""
    problem = Problem([65536, 3000], 65536, [4096, 256])
    tokens, counts = problem.empty_selection()
    history = problem.empty_history()
    for step in range(11):
        problem.query_labels += torch.randn_like(problem.query_labels) * 0.1
        expected, expected_counts = problem.empty_selection()
        before, scores = history.clone(), problem.scores()
        problem.run(tokens, counts, history, new_rows, attended=False)
        assert torch.equal(history, before)
        problem.run(tokens, counts, history, new_rows)
        sticky_topk_reference(
            scores, problem.budgets, new_rows, problem.lengths, SINKS, RECENT,
            before.clone(), True, expected, expected_counts,
        )  # fmt: skip
        check(tokens, counts, expected, expected_counts, scores)
        chosen = torch.zeros(history.shape, dtype=torch.int32, device="cuda")  # entry i is token SINKS + i
        chosen.scatter_add_(2, (tokens.long() - SINKS).clamp_min(0), (tokens >= 0).int())
        assert torch.equal(history.int(), (before.int() << 1 & 255) | chosen)
        if step:
            for b in range(2):
                for h in range(2):
                    members = members_of(before[b, h], int(counts[b, h]), new_rows)
                    assert int(((chosen[b, h] > 0) & ~members).sum()) <= new_rows


@pytest.mark.gpu
@needs_clusters
def test_a_history_of_selections_that_take_all():
    """A budget that is no limit, at odd lengths: every selectable token is remembered."""
    problem = Problem([101, 77, 90], 307, [300, 300, 0], kv_heads=3)
    tokens, counts = problem.empty_selection()
    history = problem.empty_history()
    for _ in range(2):
        problem.run(tokens, counts, history, 5)
    for b, (length, bits) in enumerate(((101, 3), (77, 3), (90, 0))):
        entries = max(length - RECENT - SINKS, 0)
        assert (history[b, :, :entries] == bits).all()
        assert not history[b, :, entries:].any()


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
        share = (capacity + 511) // 512 * 32  # tokens of one of 16 CTAs
        assert dynamic_bytes(capacity, 16, False) == share * 4 + share // 8
        assert dynamic_bytes(capacity, 16, True) == share * 4 + 2 * (share // 8)
