"""The history of selections: its promises, and the kernel against the reference."""

import pytest
import torch

from offload_runtime.kernels.remember import remember_reference, remember_triton
from offload_runtime.kernels.sticky import sticky_topk_reference, sticky_topk_triton

from .models import logits_of, offloaded, random_ids, random_llama


def selections(steps, batch, kv_heads, k_max, tokens, seed=0):
    """Random ascending selections, -1 past a count that differs by head and step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.full((batch, kv_heads, k_max), -1, dtype=torch.int32)
        counts = torch.randint(0, k_max + 1, (batch, kv_heads), generator=generator, dtype=torch.int32)
        for b in range(batch):
            for h in range(kv_heads):
                count = int(counts[b, h])
                picked = torch.randperm(tokens, generator=generator)[:count].sort().values
                chosen[b, h, :count] = picked.int()
        yield chosen, counts


@pytest.mark.parametrize("kept", [1, 2, 4])
@pytest.mark.parametrize("k_max", [1, 63, 1000])
def test_kernel_equals_reference(kept, k_max, device):
    history = torch.full((2, 3, kept, k_max), -1, dtype=torch.int32)
    ours = history.clone().to(device)
    for number, (chosen, counts) in enumerate(selections(6, 2, 3, k_max, 2 * k_max)):
        step = torch.tensor([number], dtype=torch.int32)
        remember_reference(chosen, counts, step, history)
        remember_triton(chosen.to(device), counts.to(device), step.to(device), ours)
        assert torch.equal(ours.cpu(), history)


def test_every_token_of_the_last_selections_is_there_once():
    history = torch.full((1, 2, 3, 40), -1, dtype=torch.int32)
    seen = []
    for number, (chosen, counts) in enumerate(selections(8, 1, 2, 40, 60)):
        remember_reference(chosen, counts, torch.tensor([number]), history)
        seen.append([set(chosen[0, h, : counts[0, h]].tolist()) for h in range(2)])
        for h in range(2):
            listed = [token for token in history[0, h].flatten().tolist() if token >= 0]
            assert len(listed) == len(set(listed))
            assert set(listed) == set().union(*(step[h] for step in seen[-3:]))


@pytest.mark.parametrize("slots", [24, 30, 48])
def test_slots_change_nothing_but_what_is_fetched(slots):
    model, ids = random_llama(), random_ids(300)

    def logits(count):
        runtime = offloaded(model, budget=24, new_rows=3, slots=count)
        return logits_of(runtime.generate, ids, 12)[1]

    assert torch.equal(logits(slots), logits(300))


def test_a_row_of_some_steps_ago_comes_back_though_nothing_new_may_enter():
    """Scores swing between two sets of tokens: with both remembered, each step selects the better one."""
    low, high = torch.zeros(1, 1, 200), torch.zeros(1, 1, 200)
    low[..., 20:50], high[..., 120:150] = 5.0, 5.0
    tokens = torch.full((1, 1, 30), -1, dtype=torch.int32)
    counts = torch.zeros(1, 1, dtype=torch.int32)
    history = torch.full((1, 1, 2, 30), -1, dtype=torch.int32)
    fixed = (torch.tensor([[30]]), 1, torch.tensor([200]), 4, 16)

    def step(number, scores, new_rows):
        members = history.view(1, 1, -1)
        everything = torch.full((1, 1), members.shape[-1])
        budget, _, *rest = fixed
        sticky_topk_reference(scores, budget, new_rows, *rest, members, everything, tokens, counts)
        remember_reference(tokens, counts, torch.tensor([number]), history)
        return tokens[0, 0].tolist()

    assert step(0, low, 30) == list(range(20, 50))
    assert step(1, high, 30) == list(range(120, 150))
    assert step(2, low, 1) == list(range(20, 50))
    assert step(3, high, 1) == list(range(120, 150))


def test_sticky_kernel_with_a_history_equals_the_reference(device):
    """Members are a list with gaps, longer than a selection."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, 2, 2300, generator=generator)
    budgets, lengths = torch.tensor([[150, 90]], dtype=torch.int32), torch.tensor([2250], dtype=torch.int32)
    history = torch.full((1, 2, 4, 150), -1, dtype=torch.int32)
    ours = history.clone().to(device)
    for number in range(5):
        scores = scores + 0.3 * torch.randn(scores.shape, generator=generator)
        chosen = []
        for run, steps, place in (
            (sticky_topk_reference, history, "cpu"),
            (sticky_topk_triton, ours, device),
        ):
            tokens = torch.full((1, 2, 150), -1, dtype=torch.int32, device=place)
            counts = torch.zeros(1, 2, dtype=torch.int32, device=place)
            everything = torch.full((1, 2), 600, dtype=torch.int32, device=place)
            members = steps.view(1, 2, 600)
            run(
                scores.to(place), budgets.to(place), 12, lengths.to(place), 4, 16,
                members, everything, tokens, counts,
            )  # fmt: skip
            remember = remember_reference if run is sticky_topk_reference else remember_triton
            remember(tokens, counts, torch.tensor([number], dtype=torch.int32, device=place), steps)
            chosen.append(tokens.cpu())
        assert torch.equal(*chosen)
        assert torch.equal(ours.cpu(), history)


def test_a_session_remembers_what_it_attended_to():
    runtime = offloaded(random_llama(), budget=24, new_rows=4, prefetch="correct")
    runtime.generate(random_ids(300), max_new_tokens=4, do_sample=False)
    cache = runtime._session.caches[1]
    assert cache.history.steps.shape == (1, 2, 8, 24)
    assert int((cache.history.steps[:, :, 3] >= 0).sum()) == 2 * 24  # the third step's, the newest
    runtime._session.clear_place(0)
    assert bool((cache.history.tokens == -1).all())
