"""Sticky selection in two parts selects what it does at once; the cluster kernels against the references."""

import pytest
import torch

from offload_runtime.kernels.admission import (
    admit_reference,
    choose_reference,
    empty_candidates,
    most_candidates,
)
from offload_runtime.kernels.admit_cluster import admit_in_clusters, choose_in_clusters
from offload_runtime.kernels.sticky import sticky_topk_reference

from .admission_problem import SHORTER, Sticky, check_equal_scores, check_shorter, check_sticky_steps
from .hopper import needs_hopper as needs_clusters
from .selection_problem import RECENT, SINKS, Problem
from .test_residency import Resident
from .test_sticky import drifting_scores, run_steps


def in_two_parts(scores, budgets, new_rows, lengths, sinks, recent, history, attended, tokens, counts):
    """sticky_topk_reference's arguments."""
    batch, kv_heads, capacity = scores.shape
    most = most_candidates(tokens.shape[-1], capacity)
    candidates = empty_candidates(batch, kv_heads, most, scores.device)
    entering = torch.full_like(tokens, 55), torch.full_like(counts, 55)
    fixed = (budgets, new_rows, lengths, sinks, recent)
    admit_reference(scores, *fixed, history, attended, *entering, candidates)
    slots = Resident.empty(batch, kv_heads, capacity, 1, 1, "cpu")
    rest = (torch.empty_like(tokens), slots.slot_of_token, slots.stamps, torch.ones(1), 1, slots.counters)
    choose_reference(candidates, budgets, sinks, history, attended, tokens, counts, *rest)


@pytest.mark.parametrize(("drift", "new_rows"), [(0.05, 5), (0.05, 40), (0.8, 0), (0.8, 40), (0.8, 300)])
def test_two_parts_are_the_whole(drift, new_rows):
    scores = list(drifting_scores(9, 2, 2, 1300, drift))
    lengths = [[30 + 150 * step, 1300 - 90 * step] for step in range(9)]
    arguments = (scores, [[150, 9], [90, 0]], new_rows, lengths, 150, "cpu")
    results = zip(
        run_steps(sticky_topk_reference, *arguments), run_steps(in_two_parts, *arguments), strict=True
    )
    for step, (want, got) in enumerate(results):
        for wanted, gotten in zip(want, got, strict=True):
            assert torch.equal(gotten, wanted), step


def test_a_budget_of_everything_has_no_more_candidates_than_tokens():
    assert most_candidates(100, 150) == 150
    scores = list(drifting_scores(3, 1, 1, 150, 0.5))
    arguments = (scores, [150], 20, [[150]] * 3, 150, "cpu")
    expected = run_steps(sticky_topk_reference, *arguments)
    assert all(
        torch.equal(got[0], want[0])
        for got, want in zip(run_steps(in_two_parts, *arguments), expected, strict=True)
    )


def both(_step, _attended):
    return admit_in_clusters, choose_in_clusters


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("new_rows", [0, 100, 5000])
def test_sticky_steps(new_rows):
    check_sticky_steps(Problem([65536, 3000], 65536, [4096, 256]), both, new_rows, 11)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize(("budget", "new_rows"), [(2048, 512), (16384, 2048), (32768, 4096)])
def test_256k_tokens(budget, new_rows):
    check_sticky_steps(Problem([262144], 262144, [budget], kv_heads=8), both, new_rows, 3)


@pytest.mark.gpu
@needs_clusters
def test_a_sequence_that_became_shorter_and_a_head_without_budget():
    check_shorter(Problem(*SHORTER), admit_in_clusters)


@pytest.mark.gpu
@needs_clusters
def test_a_history_of_selections_that_take_all():
    """A budget that is no limit, at odd lengths: every selectable token is remembered."""
    sticky = Sticky(Problem([101, 77, 90], 307, [300, 300, 0], kv_heads=3))
    for _ in range(2):
        sticky.admit(admit_in_clusters, 5, True)
        sticky.choose(choose_in_clusters, True)
    for b, (length, bits) in enumerate(((101, 3), (77, 3), (90, 0))):
        entries = max(length - RECENT - SINKS, 0)
        assert (sticky.history[b, :, :entries] == bits).all()
        assert not sticky.history[b, :, entries:].any()


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("phase", [0, 1])
def test_choosing_among_equal_scores(phase):
    check_equal_scores(Problem([70000, 800], 70000, [[9000, 1], [600, 0]]), choose_in_clusters, phase)


@pytest.mark.gpu
@needs_clusters
def test_replays_in_a_cuda_graph():
    problem = Problem([65536], 65536, [2048], kv_heads=8)
    sticky, twin = Sticky(problem), Sticky(problem)

    def step(of):
        of.admit(admit_in_clusters, 256, True)
        of.choose(choose_in_clusters, True)

    step(sticky.copy())  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(sticky)
    for number, length in enumerate((60000, 61000, 3000, 70, 5)):
        problem.lengths.fill_(length)
        for one in (sticky, twin):
            one.step.fill_(number + 1)
        graph.replay()
        step(twin)
        assert torch.equal(sticky.selection[1], twin.selection[1])
        assert torch.equal(sticky.selection[0], twin.selection[0])
        assert torch.equal(sticky.history, twin.history)
        assert torch.equal(sticky.resident.slot_of_token, twin.resident.slot_of_token)
