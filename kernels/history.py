"""Which tokens the last steps selected: what sticky selection (sticky.py) lets come back for nothing.

A byte for every token after the sinks: bit s is set if the token was selected s + 1 steps ago, so that the
lowest one is its age.
Members are the tokens of the last steps' selections, of as many steps as together have at most 2 k - new_rows
tokens, eight at most: then a resident set of 2 k slots, the default, holds all members and all that is new,
and no step brings more than new_rows rows. Rows that were selected a few steps ago are often needed again:
with an eighth of the budget new, SmolLM2-135M's selections hold 0.998 of the mass that exact ones hold, and
0.995 if only the last one counts (8,192 tokens, bench/results/sticky_*.json).
"""

import torch
import triton
import triton.language as tl

REMEMBERED = 8  # selections: bits of a byte
VECTOR = 16  # bytes that a GPU thread reads at once: rows begin at multiples of it


def row_bytes(capacity: int) -> int:
    """Bytes of a history for one KV head of a sequence of up to `capacity` tokens."""
    return -(-capacity // VECTOR) * VECTOR


def empty_history(batch: int, kv_heads: int, capacity: int, device: torch.device | str) -> torch.Tensor:
    """[B, Hkv, row_bytes] uint8, entry i for token sinks + i: nothing was selected yet."""
    return torch.zeros(batch, kv_heads, row_bytes(capacity), dtype=torch.uint8, device=device)


def members_of(history: torch.Tensor, k: int, new_rows: int) -> torch.Tensor:
    """Which tokens [n] are members, bool, of some entries [n] of one KV head's history and its k."""
    members = history & 1 != 0
    for steps in range(2, REMEMBERED + 1):
        more = history & ((1 << steps) - 1) != 0
        if int(more.sum()) > 2 * k - new_rows:
            break
        members = more
    return members


@triton.jit
def load_past(history, row, pitch, sinks, positions, selectable):
    """The bytes of a block's tokens; `pitch` entries a row, the first one of token `sinks`."""
    entries = history + row.to(tl.int64) * pitch + positions - sinks
    return tl.load(entries, mask=selectable, other=0).to(tl.int32)


@triton.jit
def count_ages_kernel(history, lengths, ages, kv_heads, pitch, sinks, recent, CHUNK: tl.constexpr):
    """Add a block's tokens of each age to ages [rows, 8], which begin as zeros."""
    block, row = tl.program_id(0), tl.program_id(1)
    end = tl.maximum(tl.load(lengths + row // kv_heads) - recent, sinks)
    if block * CHUNK < end:
        positions = block * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
        selectable = (positions >= sinks) & (positions < end)
        past = load_past(history, row, pitch, sinks, positions, selectable)
        lowest = past & -past
        for age in tl.static_range(8):
            count = tl.sum((lowest == (1 << age)).to(tl.int32), 0)
            tl.atomic_add(ages + row * 8 + age, count, sem="relaxed")


@triton.jit
def remembered_bits(ages, row, k, new_rows):
    """The history's bits of the steps whose tokens are members."""
    age = tl.arange(0, 8)
    upto = tl.cumsum(tl.load(ages + row * 8 + age), 0)  # [8] tokens of the last age + 1 steps
    counted = (upto <= 2 * k - new_rows) | (age == 0)
    return tl.sum(tl.where(counted, 1 << age, 0), 0)
