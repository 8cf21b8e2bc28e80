"""Top-k selection: the GPU kernel against the torch reference, exactly."""

import pytest
import torch

from offload_runtime.kernels.topk import select_topk, select_topk_reference, select_topk_triton


def selection(run, scores, budgets, lengths, sinks, recent, k_max):
    """(tokens, counts) of one implementation; what it must write starts as rubbish."""
    batch, kv_heads, _ = scores.shape
    tokens = torch.full((batch, kv_heads, k_max), 12345, dtype=torch.int32, device=scores.device)
    counts = torch.full((batch, kv_heads), 12345, dtype=torch.int32, device=scores.device)
    run(scores, budgets, lengths, sinks, recent, tokens, counts)
    return tokens.cpu(), counts.cpu()


def compare(scores, budgets, lengths, sinks, recent, k_max, device):
    """Both implementations on scores that are NaN outside the selectable span.

    budgets: of each sequence a number, or a list with a number for each KV head.
    """
    scores = scores.clone()
    for b, length in enumerate(lengths):
        scores[b, :, :sinks] = float("nan")
        scores[b, :, max(sinks, length - recent) :] = float("nan")
    budgets = torch.tensor(budgets, dtype=torch.int32, device=device).view(len(lengths), -1)
    budgets = budgets.expand(-1, scores.shape[1]).contiguous()  # [B, Hkv]
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    arguments = (scores.to(device), budgets, lengths, sinks, recent, k_max)
    expected_tokens, expected_counts = selection(select_topk_reference, *arguments)
    tokens, counts = selection(select_topk_triton, *arguments)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(tokens, expected_tokens)
    return tokens, counts


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 63, 127, 1000, 5000])
@pytest.mark.parametrize("budget", [1, 64, 500])
def test_random_scores(length, budget, device):
    compare(normal(1, 2, 5000) * 5 - 10, [budget], [length], 4, 16, 512, device)


def test_ragged_batch(device):
    scores = normal(3, 2, 5000)
    tokens, counts = compare(scores, [300, 7, 400], [4999, 40, 2500], 4, 64, 400, device)
    assert counts.tolist() == [[300] * 2, [0] * 2, [400] * 2]
    assert (tokens[1] == -1).all()


def test_every_kv_head_has_its_own_budget(device):
    lengths, budgets = [4000, 200], [[300, 0, 7], [1, 400, 90]]
    tokens, counts = compare(normal(2, 3, 4000), budgets, lengths, 4, 64, 400, device)
    assert counts.tolist() == [[300, 0, 7], [1, 132, 90]]
    assert ((tokens >= 0).sum(-1) == counts).all()


@pytest.mark.parametrize("kind", ["equal", "two values", "rounded", "negative", "infinite", "zeros"])
def test_ties_go_to_the_earliest(kind, device):
    scores = normal(1, 2, 4500)
    scores = {
        "equal": torch.full_like(scores, -7.25),
        "two values": (scores > 1.5).float(),
        "rounded": (scores * 4).round() / 4,
        "negative": -scores.abs() * 1e4,
        "infinite": torch.where(scores > 0, float("-inf"), scores),
        "zeros": torch.where(scores > 0, 0.0, -0.0),
    }[kind]
    compare(scores, [777], [4321], 4, 16, 1024, device)


def test_a_row_longer_than_a_histogram_group(device):
    # 40,000 tokens are 20 blocks of 2,048: more than the 16 that row_histogram adds at once.
    compare((normal(1, 1, 40000) * 8).round(), [9000], [39000], 4, 16, 9000, device)


@pytest.mark.parametrize("budget", [984, 1000])
def test_budget_of_every_selectable_token(budget, device):
    tokens, counts = compare(normal(1, 2, 1004), [budget], [1004], 4, 16, 1000, device)
    assert counts.tolist() == [[984] * 2]
    assert torch.equal(tokens[0, 0, :984], torch.arange(4, 988, dtype=torch.int32))


@pytest.mark.parametrize("length", [0, 3, 4, 20, 21])
def test_shorter_than_sinks_and_recent(length, device):
    _, counts = compare(normal(1, 2, 1000), [8], [length], 4, 16, 8, device)
    assert counts.tolist() == [[max(0, length - 20)] * 2]


def test_public_name_uses_the_device_of_the_scores(device):
    scores, budgets = normal(1, 1, 500).to(device), torch.tensor([[9]], dtype=torch.int32, device=device)
    lengths = torch.tensor([500], dtype=torch.int32, device=device)
    expected = selection(select_topk_reference, scores, budgets, lengths, 4, 16, 9)
    assert torch.equal(selection(select_topk, scores, budgets, lengths, 4, 16, 9)[0], expected[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("batch", "budget"), [(1, 2048), (1, 16384), (1, 32768), (16, 2048)])
def test_256k_tokens(batch, budget):
    scores = normal(1, 8, 262144).expand(batch, -1, -1) * 3 - 12
    lengths = [262144 - 1000 * b for b in range(batch)]
    compare(scores, [budget] * batch, lengths, 4, 64, budget, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_replays_in_a_cuda_graph_with_new_lengths():
    scores = normal(1, 8, 65536).cuda()
    budgets = torch.full((1, 8), 4096, dtype=torch.int32, device="cuda")
    lengths = torch.tensor([60000], dtype=torch.int32, device="cuda")
    tokens = torch.empty(1, 8, 4096, dtype=torch.int32, device="cuda")
    counts = torch.empty(1, 8, dtype=torch.int32, device="cuda")
    select_topk_triton(scores, budgets, lengths, 4, 64, tokens, counts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select_topk_triton(scores, budgets, lengths, 4, 64, tokens, counts)
    for length in (65536, 3000, 41):
        lengths.fill_(length)
        graph.replay()
        expected = selection(select_topk_reference, scores, budgets, lengths, 4, 64, 4096)
        assert torch.equal(tokens.cpu(), expected[0])
        assert torch.equal(counts.cpu(), expected[1])
