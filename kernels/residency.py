"""Resolve a selection against the resident set: mark hits, list misses, give them slots.

A slot is free for a miss when the selection at hand does not use it and no step attended
to its row lately: in the last `kept_steps`, or in so many fewer that there are free slots for all
misses. Free slots are taken in ring order from a hand that moves on (CLOCK), so rows
stay for as long as the set is larger than what was brought in since.
"""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED
from .cuda_source import runs_hopper_source
from .resolve_cluster import resolve_in_clusters

# counters [sequence, phase, what]: phase 0 is the prediction, 1 the true selection. WANTED are tokens that
# a prediction of the selection should have had, FROM_PREDICTION those of them that it had.
SELECTED, HITS, FROM_PREDICTION, WANTED = 0, 1, 2, 3

# What a list of tokens is of its selection: all of it, or of one made in two parts (admission.py) what may
# enter, and afterwards all of it. These count misses only: what is selected counts where it is chosen.
WHOLE, ENTERING, REST = 0, 1, 2


def resolve_reference(
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    token_in_slot: torch.Tensor,
    stamps: torch.Tensor,
    hand: torch.Tensor,
    step: torch.Tensor,
    phase: int,
    attended: bool,
    kept_steps: int,
    part: int,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Update the token-to-slot map so that every selected token has a slot.

    tokens [B, Hkv, K] and counts [B, Hkv] int32: the selection, or its part; slot_of_token
    [B, Hkv, N] int32: resident slot of a token or -1; token_in_slot
    [B, Hkv, n_slots] int32: its inverse; stamps [B, Hkv, n_slots, 2] int32: the steps
    when a slot's row was last attended to, and last listed for less (2 step + phase), -1 never; hand [B, Hkv]
    int32; step [1] int32. attended: the step attends to these tokens, else it only may;
    kept_steps: of how many steps, 8 at most, the rows attended to keep their slots as
    long as there are others. n_slots >= K. Writes miss_tokens and miss_slots [B, Hkv, K] and
    miss_counts [B, Hkv] int32, and adds to counters [B, 2, 4] int64.
    """
    now, mine = int(step), 0 if attended else 1
    mark = now if attended else 2 * now + phase
    n_slots = token_in_slot.shape[-1]
    for b in range(tokens.shape[0]):
        for h in range(tokens.shape[1]):
            chosen = tokens[b, h, : int(counts[b, h])].long()
            slots = slot_of_token[b, h, chosen].long()
            hit = slots[slots >= 0]
            predicted = int((stamps[b, h, hit, 1] == 2 * now).sum()) if phase else 0
            stamps[b, h, hit, mine] = mark
            missed = chosen[slots < 0]
            ring = (torch.arange(n_slots, device=tokens.device) + int(hand[b, h])) % n_slots
            unused = stamps[b, h, ring, mine] != mark
            for steps in range(kept_steps, -1, -1):
                free = ring[unused & (stamps[b, h, ring, 0] < max(now - steps, 0))]
                if len(free) >= len(missed):
                    break
            victims = free[: len(missed)]
            evicted = token_in_slot[b, h, victims].long()
            slot_of_token[b, h, evicted[evicted >= 0]] = -1
            slot_of_token[b, h, missed] = victims.int()
            token_in_slot[b, h, victims] = missed.int()
            stamps[b, h, victims] = -1
            stamps[b, h, victims, mine] = mark
            if len(victims):
                hand[b, h] = (int(victims[-1]) + 1) % n_slots
            miss_tokens[b, h, : len(missed)] = missed.int()
            miss_slots[b, h, : len(missed)] = victims.int()
            miss_counts[b, h] = len(missed)
            selected = len(chosen) if part == WHOLE else 0
            wanted = 0 if part == REST else len(chosen)
            counted = [selected, selected - len(missed), predicted if wanted else 0, wanted]
            counters[b, phase] += torch.tensor(counted, dtype=torch.int64, device=counters.device)


def resolve_triton(
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    token_in_slot: torch.Tensor,
    stamps: torch.Tensor,
    hand: torch.Tensor,
    step: torch.Tensor,
    phase: int,
    attended: bool,
    kept_steps: int,
    part: int,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """resolve_reference as one program a (sequence, KV head), with the same bits."""
    batch, kv_heads, k_max = tokens.shape
    # The look-ups are two dependent reads, so a block takes as many tokens as fit: 8 a thread.
    block = min(8192, max(1024, triton.next_power_of_2(k_max)))
    resolve_kernel[(batch * kv_heads,)](
        tokens, counts, slot_of_token, token_in_slot, stamps, hand, step,
        miss_tokens, miss_slots, miss_counts, counters,
        kv_heads, k_max, slot_of_token.shape[-1], token_in_slot.shape[-1], kept_steps,
        PHASE=phase, ATTENDED=attended, PART=part, BLOCK=block, SCAN=min(block, 4096), num_warps=block // 256,
        **FUSED,
    )  # fmt: skip


@triton.jit
def resolve_kernel(
    tokens, counts, slot_of_token, token_in_slot, stamps, hand, step,
    miss_tokens, miss_slots, miss_counts, counters,
    kv_heads, k_max, capacity, n_slots, kept_steps,
    PHASE: tl.constexpr, ATTENDED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Stamp the hits and list the misses, then give the misses the next free slots."""
    row = tl.program_id(0)
    count = tl.load(counts + row)
    now = tl.load(step)
    mark = now if ATTENDED else 2 * now + PHASE
    tokens += row.to(tl.int64) * k_max
    miss_tokens += row.to(tl.int64) * k_max
    miss_slots += row.to(tl.int64) * k_max
    slot_of_token += row.to(tl.int64) * capacity
    token_in_slot += row.to(tl.int64) * n_slots
    stamps += row.to(tl.int64) * n_slots * 2
    mine = stamps + (0 if ATTENDED else 1)

    misses = 0
    predicted = 0
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)  # [BLOCK] places in the selection
        token = tl.load(tokens + index, mask=index < count, other=0)
        slot = tl.load(slot_of_token + token, mask=index < count, other=0)
        hit = (index < count) & (slot >= 0)
        miss = (index < count) & (slot < 0)
        if PHASE == 1:
            stamp = tl.load(stamps + 2 * slot + 1, mask=hit, other=-1)
            predicted += tl.sum((hit & (stamp == 2 * now)).to(tl.int32), 0)
        tl.store(mine + 2 * slot, tl.zeros([BLOCK], tl.int32) + mark, mask=hit)
        place = misses + tl.cumsum(miss.to(tl.int32), 0) - 1
        tl.store(miss_tokens + place, token, mask=miss)
        misses += tl.sum(miss.to(tl.int32), 0)
    tl.debug_barrier()  # the stamps and the miss list are read below by other threads

    ages = tl.arange(0, 16)
    of_age = tl.zeros([16], tl.int32)
    for first in range(0, tl.where(misses > 0, n_slots, 0), SCAN):
        slot = first + tl.arange(0, SCAN)  # [SCAN]
        of_age += tl.histogram(ages_of(stamps, mine, slot, slot < n_slots, now, mark), 16)
    older = tl.sum(of_age, 0) - tl.cumsum(of_age, 0)  # [16] slots of a higher age
    steps = tl.max(tl.where((older >= misses) & (ages <= kept_steps), ages, 0), 0)

    start = tl.load(hand + row)
    scanned = 0
    given = 0
    last = start - 1
    while (given < misses) & (scanned < n_slots):
        offset = scanned + tl.arange(0, SCAN)  # [SCAN] slots in ring order from the hand
        inside = offset < n_slots
        slot = start + offset
        slot = tl.where(slot >= n_slots, slot - n_slots, slot)
        free = ages_of(stamps, mine, slot, inside, now, mark) > steps
        place = given + tl.cumsum(free.to(tl.int32), 0) - 1
        taken = free & (place < misses)
        evicted = tl.load(token_in_slot + slot, mask=taken, other=-1)
        token = tl.load(miss_tokens + place, mask=taken, other=0)
        tl.store(slot_of_token + evicted, tl.full([SCAN], -1, tl.int32), mask=taken & (evicted >= 0))
        tl.store(slot_of_token + token, slot, mask=taken)
        tl.store(token_in_slot + slot, token, mask=taken)
        tl.store(stamps + 2 * slot, tl.zeros([SCAN], tl.int32) + (mark if ATTENDED else -1), mask=taken)
        tl.store(stamps + 2 * slot + 1, tl.zeros([SCAN], tl.int32) + (-1 if ATTENDED else mark), mask=taken)
        tl.store(miss_slots + place, slot, mask=taken)
        furthest = tl.max(tl.where(taken, offset, -1), 0)
        last = tl.where(furthest >= 0, start + furthest, last)
        given += tl.sum(taken.to(tl.int32), 0)
        scanned += SCAN

    tl.store(hand + row, (last + 1) % n_slots)
    tl.store(miss_counts + row, misses)
    counters += (row // kv_heads) * 8 + PHASE * 4
    selected = count if PART == 0 else 0  # WHOLE
    tl.atomic_add(counters + 0, tl.cast(selected, tl.int64), sem="relaxed")
    tl.atomic_add(counters + 1, tl.cast(selected - misses, tl.int64), sem="relaxed")
    if PART != 2:  # REST
        tl.atomic_add(counters + 2, tl.cast(predicted, tl.int64), sem="relaxed")
        tl.atomic_add(counters + 3, tl.cast(count, tl.int64), sem="relaxed")


@triton.jit
def ages_of(stamps, mine, slot, inside, now, mark):
    """How many steps ago the rows in slots were attended to, 9 at most; 0 where this selection uses them."""
    attended = tl.load(stamps + 2 * slot, mask=inside, other=0)
    used = tl.load(mine + 2 * slot, mask=inside, other=0) == mark
    age = tl.where(attended < 0, 9, tl.minimum(now - attended, 9))
    return tl.where(inside & (used == 0), age, 0)


def resolve(
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    token_in_slot: torch.Tensor,
    stamps: torch.Tensor,
    hand: torch.Tensor,
    step: torch.Tensor,
    phase: int,
    attended: bool,
    kept_steps: int,
    part: int,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """resolve_reference, on the GPU where the selection is there."""
    run = resolve_reference
    if tokens.is_cuda:
        run = resolve_in_clusters if runs_hopper_source(tokens.device) else resolve_triton
    run(
        tokens, counts, slot_of_token, token_in_slot, stamps, hand, step, phase, attended, kept_steps, part,
        miss_tokens, miss_slots, miss_counts, counters,
    )  # fmt: skip
