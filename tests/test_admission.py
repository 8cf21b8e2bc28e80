"""Sticky selection in two parts selects what it does at once; the cluster kernels against the references."""

import pytest
import torch

from offload_runtime.kernels.admission import (
    Candidates,
    admit_reference,
    choose_reference,
    empty_candidates,
    most_candidates,
)
from offload_runtime.kernels.admit_cluster import admit_in_clusters, choose_in_clusters
from offload_runtime.kernels.sticky import sticky_topk_reference

from .hopper import needs_hopper as needs_clusters
from .selection_problem import RECENT, SINKS, Problem, check_admission, check_sticky_steps
from .test_sticky import drifting_scores, run_steps


def in_two_parts(scores, budgets, new_rows, lengths, sinks, recent, history, attended, tokens, counts):
    """sticky_topk_reference's arguments."""
    batch, kv_heads, capacity = scores.shape
    most = most_candidates(tokens.shape[-1], capacity)
    candidates = empty_candidates(batch, kv_heads, most, scores.device)
    entering = torch.full_like(tokens, 55), torch.full_like(counts, 55)
    fixed = (budgets, new_rows, lengths, sinks, recent)
    admit_reference(scores, *fixed, history, attended, *entering, candidates)
    choose_reference(candidates, budgets, sinks, history, attended, tokens, counts)


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


def admit(problem, history, new_rows, attended):
    entering, counts, candidates = problem.empty_admission()
    limits = (problem.budgets, new_rows, problem.lengths, SINKS, RECENT)
    admit_in_clusters(*problem.labels, problem.bits, *limits, history, attended, entering, counts, candidates)
    return entering, counts, candidates


def choose(problem, candidates, history, attended):
    tokens, counts = problem.empty_selection()
    tokens.fill_(77)
    choose_in_clusters(candidates, problem.budgets, SINKS, history, attended, tokens, counts)
    return tokens, counts


def both_parts(problem, history, new_rows, attended):
    admitted = admit(problem, history, new_rows, attended)
    return *admitted, *choose(problem, admitted[2], history, attended)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize("new_rows", [0, 100, 5000])
def test_sticky_steps(new_rows):
    problem = Problem([65536, 3000], 65536, [4096, 256])
    check_sticky_steps(problem, lambda *given: both_parts(problem, *given[:3]), new_rows, 11)


@pytest.mark.gpu
@needs_clusters
@pytest.mark.parametrize(("budget", "new_rows"), [(2048, 512), (16384, 2048), (32768, 4096)])
def test_256k_tokens(budget, new_rows):
    problem = Problem([262144], 262144, [budget], kv_heads=8)
    check_sticky_steps(problem, lambda *given: both_parts(problem, *given[:3]), new_rows, 3)


@pytest.mark.gpu
@needs_clusters
def test_a_sequence_that_became_shorter_and_a_head_without_budget():
    problem = Problem([900, 500, 60], 1003, [[90, 300], [0, 20], [30, 30]])
    problem.lengths -= torch.tensor([333, 0, 0], dtype=torch.int32, device="cuda")
    history = problem.empty_history()
    history.random_(0, 256, generator=problem.generator)
    check_admission(problem, lambda *given: admit(problem, *given), history, 16, True)


@pytest.mark.gpu
@needs_clusters
def test_a_history_of_selections_that_take_all():
    """A budget that is no limit, at odd lengths: every selectable token is remembered."""
    problem = Problem([101, 77, 90], 307, [300, 300, 0], kv_heads=3)
    history = problem.empty_history()
    for _ in range(2):
        both_parts(problem, history, 5, True)
    for b, (length, bits) in enumerate(((101, 3), (77, 3), (90, 0))):
        entries = max(length - RECENT - SINKS, 0)
        assert (history[b, :, :entries] == bits).all()
        assert not history[b, :, entries:].any()


@pytest.mark.gpu
@needs_clusters
def test_choosing_among_equal_scores():
    problem = Problem([70000], 70000, [[9000, 1]])
    candidates = problem.empty_admission()[2]
    shape = candidates.scores.shape
    scores = torch.randint(-3, 4, shape, generator=problem.generator, device="cuda") * 0.5
    tokens = (
        (torch.arange(shape[-1], dtype=torch.int32, device="cuda") * 2 + SINKS).expand(shape).contiguous()
    )
    counts = torch.tensor([[17000, 12000]], dtype=torch.int32, device="cuda")
    candidates = Candidates(tokens, scores, counts)
    history, expected_history, wanted = (
        problem.empty_history(),
        problem.empty_history(),
        problem.empty_selection(),
    )
    choose_reference(candidates, problem.budgets, SINKS, expected_history, True, *wanted)
    got = choose(problem, candidates, history, True)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(history, expected_history)


@pytest.mark.gpu
@needs_clusters
def test_replays_in_a_cuda_graph():
    problem = Problem([65536], 65536, [2048], kv_heads=8)
    history, twin = problem.empty_history(), problem.empty_history()
    both_parts(problem, history.clone(), 256, True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_parts(problem, history, 256, True)
    for length in (60000, 61000, 3000, 70, 5):
        problem.lengths.fill_(length)
        graph.replay()
        expected = both_parts(problem, twin, 256, True)
        assert torch.equal(captured[3], expected[3])
        assert torch.equal(captured[4], expected[4])
        assert torch.equal(history, twin)
