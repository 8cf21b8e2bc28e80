"""Sticky selection: what it promises, and the GPU kernel against the reference, exactly."""

import pytest
import torch

from offload_runtime.kernels.history import empty_history
from offload_runtime.kernels.sticky import sticky_topk, sticky_topk_reference, sticky_topk_triton
from offload_runtime.kernels.topk import select_topk_reference

SINKS, RECENT = 4, 16


def drifting_scores(steps, batch, kv_heads, capacity, drift):
    """Scores of consecutive steps: each keeps most of what the one before had."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(batch, kv_heads, capacity, generator=generator)
    for _ in range(steps):
        yield scores * 3 - 5
        fresh = torch.randn(batch, kv_heads, capacity, generator=generator)
        scores = scores * (1 - drift) + fresh * drift


def run_steps(run, all_scores, budgets, new_rows, all_lengths, k_max, device):
    """Of consecutive steps, from an empty history: the selection (tokens, counts), the history after it."""
    batch, kv_heads, capacity = all_scores[0].shape
    history = empty_history(batch, kv_heads, capacity, device)
    budgets = torch.tensor(budgets, dtype=torch.int32, device=device).view(batch, -1)
    budgets = budgets.expand(-1, kv_heads).contiguous()  # a number a sequence, or a list of one a KV head
    results = []
    for scores, lengths in zip(all_scores, all_lengths, strict=True):
        scores = scores.clone()
        for b, length in enumerate(lengths):
            scores[b, :, :SINKS] = float("nan")
            scores[b, :, max(SINKS, length - RECENT) :] = float("nan")
        lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        fixed = (scores.to(device), budgets, new_rows, lengths, SINKS, RECENT, history)
        for attended in (False, True):  # a prediction, which leaves no trace, then the selection
            tokens = torch.full((batch, kv_heads, k_max), 777, dtype=torch.int32, device=device)
            counts = torch.full((batch, kv_heads), 777, dtype=torch.int32, device=device)
            run(*fixed, attended, tokens, counts)
            results.append((tokens.cpu(), counts.cpu(), history.cpu().clone()))
    return results


def compare(all_scores, budgets, new_rows, all_lengths, k_max, device):
    arguments = (all_scores, budgets, new_rows, all_lengths, k_max, device)
    expected = run_steps(sticky_topk_reference, *arguments)
    for step, (want, got) in enumerate(zip(expected, run_steps(sticky_topk_triton, *arguments), strict=True)):
        for part, (wanted, gotten) in enumerate(zip(want, got, strict=True)):
            assert torch.equal(gotten, wanted), (step, part)
    return expected[1::2]


@pytest.mark.parametrize(("drift", "new_rows"), [(0.05, 5), (0.05, 40), (0.8, 0), (0.8, 40), (0.8, 300)])
def test_kernel_equals_reference(drift, new_rows, device):
    scores = list(drifting_scores(3, 1, 1, 2600, drift))
    compare(scores, [300], new_rows, [[2500], [2501], [2600]], 300, device)


@pytest.mark.parametrize("step", [2.0, 1e6])
def test_ties(step, device):
    """Few distinct scores, or (1e6) one in the first and last step."""
    scores = [(s / step).round() * step for s in drifting_scores(3, 1, 1, 3000, 0.5)]
    scores[1] = next(drifting_scores(1, 1, 1, 3000, 0.5))
    compare(scores, [200], 20, [[2900], [2901], [2902]], 256, device)


def test_ragged_batch_and_growing_spans(device):
    """Few tokens at first: every one is selected, later the budget binds; one sequence shrinks."""
    scores = list(drifting_scores(4, 3, 1, 2500, 0.5))
    lengths = [[30, 2500, 5], [100, 2400, 20], [400, 1200, 21], [2500, 90, 22]]
    compare(scores, [128, 60, 9], 16, lengths, 128, device)


def test_every_kv_head_has_its_own_budget(device):
    """One head selects few, one all that there are, and one grows into its budget."""
    scores = list(drifting_scores(3, 1, 3, 2500, 0.5))
    results = compare(scores, [[9, 700, 128]], 16, [[600], [650], [2500]], 700, device)
    assert [counts.tolist() for _, counts, _ in results] == [
        [[9, 580, 128]],
        [[9, 630, 128]],
        [[9, 700, 128]],
    ]


def test_reference_keeps_its_promises():
    """At most new_rows are new; those are the best others; without need it is the exact top-k."""
    scores = list(drifting_scores(2, 1, 1, 2000, 0.7))
    lengths = [[2000], [2000]]
    found = run_steps(sticky_topk_reference, scores, [200], 25, lengths, 200, "cpu")
    first, second = found[1][0], found[3][0]
    new = sorted(set(second[0, 0].tolist()) - set(first[0, 0].tolist()))
    assert len(new) == 25
    others = scores[1][0, 0].clone()
    others[:SINKS] = others[2000 - RECENT :] = float("-inf")
    others[first[0, 0].long()] = float("-inf")
    assert new == sorted(others.topk(25).indices.tolist())
    exact = torch.empty_like(second)
    counts = torch.empty(1, 1, dtype=torch.int32)
    budgets, length = torch.tensor([[200]]), torch.tensor([2000])
    select_topk_reference(scores[1], budgets, length, SINKS, RECENT, exact, counts)
    loose = run_steps(sticky_topk_reference, scores, [200], 200, lengths, 200, "cpu")[3][0]
    assert torch.equal(loose, exact)


@pytest.mark.parametrize("run", [sticky_topk_reference, sticky_topk_triton])
def test_a_token_of_some_steps_ago_comes_back_though_nothing_new_may_enter(run, device):
    """Scores swing between two sets of tokens: with both remembered, each step selects the better one."""
    low, high = torch.zeros(1, 1, 200), torch.zeros(1, 1, 200)
    low[..., 20:50], high[..., 120:150] = 5.0, 5.0
    history = empty_history(1, 1, 200, device)
    fixed = (torch.tensor([200], dtype=torch.int32, device=device), SINKS, RECENT, history, True)
    budgets = torch.tensor([[30]], dtype=torch.int32, device=device)

    def step(scores, new_rows):
        tokens = torch.full((1, 1, 30), -1, dtype=torch.int32, device=device)
        counts = torch.zeros(1, 1, dtype=torch.int32, device=device)
        run(scores.to(device), budgets, new_rows, *fixed, tokens, counts)
        return tokens[0, 0].tolist()

    assert step(low, 0) == list(range(20, 50))  # the first is exact
    assert step(high, 30) == list(range(120, 150))
    assert step(low, 0) == list(range(20, 50))
    assert step(high, 0) == list(range(120, 150))


def test_the_history_holds_eight_steps(device):
    scores = list(drifting_scores(11, 1, 1, 600, 0.6))
    found = compare(scores, [40], 15, [[600]] * 11, 40, device)
    for entry, bits in enumerate(found[-1][2][0, 0].tolist()):
        steps = [SINKS + entry in found[10 - back][0][0, 0].tolist() for back in range(8)]
        assert bits == sum(1 << back for back, selected in enumerate(steps) if selected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("budget", "new_rows"), [(2048, 128), (16384, 2048)])
def test_256k_tokens(budget, new_rows):
    scores = list(drifting_scores(3, 1, 4, 262144, 0.5))
    compare(scores, [budget], new_rows, [[262142], [262143], [262144]], budget, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_captured_in_a_cuda_graph():
    scores = [s.cuda() for s in drifting_scores(3, 1, 2, 20000, 0.5)]
    buffer = scores[0].clone()
    budgets = torch.full((1, 2), 1000, dtype=torch.int32, device="cuda")
    lengths = torch.tensor([20000], dtype=torch.int32, device="cuda")
    tokens, expected = (torch.full((1, 2, 1000), -1, dtype=torch.int32, device="cuda") for _ in range(2))
    counts = torch.zeros(1, 2, dtype=torch.int32, device="cuda")
    history, expected_history = (empty_history(1, 2, 20000, "cuda") for _ in range(2))
    shared = (budgets, 60, lengths, SINKS, RECENT)
    sticky_topk(buffer, *shared, history.clone(), True, tokens.clone(), counts.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sticky_topk(buffer, *shared, history, True, tokens, counts)
    for step_scores in scores:
        buffer.copy_(step_scores)
        graph.replay()
        sticky_topk_reference(step_scores, *shared, expected_history, True, expected, counts.clone())
        assert torch.equal(tokens, expected)
        assert torch.equal(history, expected_history)
