"""Attention over members and then over what entered is attention over the whole selection."""

import pytest
import torch

from offload_runtime.cache.layer_cache import TRUE, LayerCache
from offload_runtime.kernels.attend_in_parts import attend_to_entered, attend_to_members, late_splits
from offload_runtime.kernels.attend_pieces import Inputs
from offload_runtime.kernels.sparse_decode import sparse_attention_reference

from .models import logits_of, offloaded, random_ids, random_llama
from .test_kernels_triton import RECENT, SINKS, TOLERANCE, attention_inputs, by_slots, with_rows_moved

STEP, PHASE = 5, 1
LENGTHS = [0, 1, 3, 7, 63, 127, 1000]


def with_stamps(inputs, share, generator):
    """Of each selection a share that just entered, among others that did not get in: lists and stamps.

    The rest of the selection was listed or attended to before; rows that nothing attends to are NaN.
    """
    _, slots, tokens, counts, slot_of_token, *_ = inputs
    batch, kv_heads, budget = tokens.shape
    n_slots = slots.shape[2] - SINKS - RECENT
    stamps = torch.full((batch, kv_heads, n_slots, 2), STEP - 1, dtype=torch.int32)
    entering, entering_counts = torch.full_like(tokens, 7), torch.zeros_like(counts)
    for b in range(batch):
        for h in range(kv_heads):
            chosen = tokens[b, h, : int(counts[b, h])].long().cpu()
            own = slot_of_token[b, h].cpu()
            new = chosen[torch.rand(len(chosen), generator=generator) < share]
            free = sorted(set(range(n_slots)) - set(own[own >= 0].tolist()))
            outside = (own < 0).nonzero().flatten()[: min(3, len(free))]
            own[outside] = torch.tensor(free[: len(outside)], dtype=torch.int32)
            slot_of_token[b, h] = own.to(slot_of_token.device)
            stamps[b, h, own[chosen].long(), 0] = STEP
            listed = torch.cat([new, outside]).sort().values[:budget]
            new = new[torch.isin(new, listed)]
            stamps[b, h, own[listed].long(), 1] = 2 * STEP + PHASE
            entering[b, h, : len(listed)] = listed.int().to(entering.device)
            entering_counts[b, h] = len(listed)
    return entering, entering_counts, stamps.to(slots.device)


def in_parts(inputs, lists, scale, softcap=0.0, sink_logits=None, new_rows=40):
    query, slots, _, counts, *places = inputs
    entering, entering_counts, stamps = lists
    step = torch.tensor([STEP], dtype=torch.int32, device=query.device)
    shared = Inputs(query, slots, *places, scale, softcap)
    _, _, listed, *_ = by_slots(inputs)  # as the runtime does, where every selected token has a slot
    members = shared._replace(slot_of_token=None)
    pieces = attend_to_members(members, listed, counts, stamps, step, PHASE, new_rows)
    return attend_to_entered(shared, entering, entering_counts, stamps, step, new_rows, pieces, sink_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("group", "dim", "softcap", "with_sinks"), [(1, 64, 0.0, False), (4, 128, 5.0, False), (8, 80, 0.0, True)]
)
def test_both_parts_are_the_whole(group, dim, softcap, with_sinks, share, dtype, device):
    inputs = attention_inputs(LENGTHS, 100, group, dim, dtype, device)
    lists = with_stamps(inputs, share, torch.Generator().manual_seed(group))
    sink_logits = torch.randn(inputs[0].shape[1], device=device) if with_sinks else None
    want = sparse_attention_reference(*inputs, dim**-0.5, softcap, sink_logits)
    got = in_parts(inputs, lists, dim**-0.5, softcap, sink_logits)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])


def test_more_enters_than_at_most_steps(device):
    """At a first step everything does: the pieces take their blocks in turn."""
    inputs = attention_inputs([1000], 600, 4, 64, torch.float32, device)
    lists = with_stamps(inputs, 1.0, torch.Generator().manual_seed(1))
    want = sparse_attention_reference(*inputs, 0.125)
    torch.testing.assert_close(in_parts(inputs, lists, 0.125, new_rows=5), want, **TOLERANCE[torch.float32])


def test_same_bits_wherever_the_rows_lie(device):
    inputs = attention_inputs([127, 1000], 100, 4, 64, torch.bfloat16, device)
    entering, counts, stamps = with_stamps(inputs, 0.2, torch.Generator().manual_seed(2))
    here = in_parts(inputs, (entering, counts, stamps), 0.125)
    moved, moved_to = with_rows_moved(inputs)
    moved_stamps = stamps.clone()
    moved_stamps[:, :, moved_to] = stamps
    assert torch.equal(here, in_parts(moved, (entering, counts, moved_stamps), 0.125))


@pytest.mark.parametrize("slots", [24, 48])
def test_a_session_attends_alike_in_parts_and_as_a_whole(slots, device, monkeypatch):
    """With as many slots as may be selected (some rows are missed late), and with twice as many."""
    model, ids = random_llama(device=device, layers=2), random_ids(200, device=device)

    def logits(in_parts):
        monkeypatch.setattr(LayerCache, "attends_in_parts", in_parts)
        runtime = offloaded(model, budget=24, new_rows=3, slots=slots, prefetch="correct", cuda_graph=False)
        return logits_of(runtime.generate, ids, 4)[1]

    whole = logits(lambda cache, choice: False)
    both = logits(lambda cache, choice: cache.in_two_parts and choice.phase == TRUE)
    torch.testing.assert_close(both, whole, rtol=1e-3, atol=1e-4)


def test_pieces_of_what_enters():
    assert late_splits(2048, 8, 32) == 33
    assert late_splits(40, 8, 32) == 2
    assert late_splits(0, 8, 32) == 1
    assert late_splits(2048, 1000, 32) == 1
