"""Resolve a selection against the resident set: mark hits, list misses, give them slots.

A slot is free for a miss when the selection at hand does not use it. Free
slots are taken in ring order from a hand that moves on (CLOCK), so rows stay
for as long as the set is larger than what was brought in since.
"""

import torch
import triton
import triton.language as tl

# counters [phase, what]: phase 0 is the prediction, 1 the true selection.
SELECTED, HITS, FROM_PREDICTION = 0, 1, 2


def resolve_reference(
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    token_in_slot: torch.Tensor,
    stamps: torch.Tensor,
    hand: torch.Tensor,
    step: torch.Tensor,
    phase: int,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Update the token-to-slot map so that every selected token has a slot.

    tokens [B, Hkv, K] and counts [B] int32: the selection; slot_of_token
    [B, Hkv, N] int32: resident slot of a token or -1; token_in_slot
    [B, Hkv, n_slots] int32: its inverse; stamps [B, Hkv, n_slots] int32: when
    a slot was last selected, 2 * step + phase; hand [B, Hkv] int32; step [1]
    int32. n_slots >= K. Writes miss_tokens and miss_slots [B, Hkv, K] and
    miss_counts [B, Hkv] int32, and adds to counters [2, 3] int64.
    """
    now = 2 * int(step) + phase
    n_slots = token_in_slot.shape[-1]
    for b in range(tokens.shape[0]):
        for h in range(tokens.shape[1]):
            chosen = tokens[b, h, : int(counts[b])].long()
            slots = slot_of_token[b, h, chosen].long()
            hit = slots[slots >= 0]
            predicted = int((stamps[b, h, hit] == now - 1).sum()) if phase else 0
            stamps[b, h, hit] = now
            missed = chosen[slots < 0]
            ring = (torch.arange(n_slots, device=tokens.device) + int(hand[b, h])) % n_slots
            victims = ring[stamps[b, h, ring] != now][: len(missed)]
            evicted = token_in_slot[b, h, victims].long()
            slot_of_token[b, h, evicted[evicted >= 0]] = -1
            slot_of_token[b, h, missed] = victims.int()
            token_in_slot[b, h, victims] = missed.int()
            stamps[b, h, victims] = now
            if len(victims):
                hand[b, h] = (int(victims[-1]) + 1) % n_slots
            miss_tokens[b, h, : len(missed)] = missed.int()
            miss_slots[b, h, : len(missed)] = victims.int()
            miss_counts[b, h] = len(missed)
            counters[phase] += torch.tensor(
                [len(chosen), len(hit), predicted], dtype=torch.int64, device=counters.device
            )
