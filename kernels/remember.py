"""Remember the selections of the last steps: what sticky selection lets come back for nothing.

Rows that were selected a few steps ago still have their slots, and a row that attention needs is often one
that it needed shortly before. With the last four selections as members and at most an eighth of the budget
new, selections hold 0.9995 of the attention mass that exact ones hold on SmolLM2-135M, where the last one
alone keeps 0.9974, and fewer rows are new: 28 of 256 instead of 32 (bench.sticky).
"""

import torch
import triton
import triton.language as tl

BLOCK = 512  # entries a program


def remember(tokens: torch.Tensor, counts: torch.Tensor, history: torch.Tensor) -> None:
    """Put a selection in front of a history; shapes as in remember_reference."""
    run = remember_triton if history.is_cuda else remember_reference
    run(tokens, counts, history)


def remember_reference(tokens: torch.Tensor, counts: torch.Tensor, history: torch.Tensor) -> None:
    """Move a history on by a step.

    tokens [B, Hkv, K] int32: the step's selection, ascending, -1 past counts [B, Hkv]
    int32. history [B, Hkv, W, K] int32: the last W selections, the newest first, every token in
    the newest of them that has it and -1 elsewhere, so that none is in it twice.
    """
    for b, per_head in enumerate(counts.tolist()):
        for h, count in enumerate(per_head):
            older = history[b, h, :-1].clone()  # [W - 1, K]
            older[torch.isin(older, tokens[b, h, :count])] = -1
            history[b, h, 1:] = older
    history[:, :, 0] = tokens


def remember_triton(tokens: torch.Tensor, counts: torch.Tensor, history: torch.Tensor) -> None:
    """One launch; each program moves its entries of every step, so none waits for another."""
    batch, kv_heads, steps, k_max = history.shape
    grid = (triton.cdiv(k_max, BLOCK), batch * kv_heads)
    _remember_kernel[grid](tokens, counts, history, k_max, STEPS=steps, BLOCK=BLOCK, num_warps=4)


@triton.jit
def _remember_kernel(tokens, counts, history, k_max, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = place < k_max
    chosen, past = tokens + row * k_max, history + row * STEPS * k_max
    count = tl.load(counts + row)
    for back in tl.static_range(STEPS - 1):
        step = STEPS - 2 - back  # the oldest first: its place is free, for what was there is forgotten
        token = tl.load(past + step * k_max + place, mask=inside, other=-1)
        again = _contains(chosen, count, token)
        tl.store(past + (step + 1) * k_max + place, tl.where(again, -1, token), mask=inside)
    tl.store(past + place, tl.load(chosen + place, mask=inside, other=-1), mask=inside)


@triton.jit
def _contains(chosen, count, token):
    """Whether each token [BLOCK] is among the `count` ascending ones at chosen; -1 is not."""
    low, size = tl.zeros_like(token), count  # a match is in [low, low + size)
    while size > 1:
        half = size // 2
        low = tl.where(tl.load(chosen + low + half - 1) < token, low + half, low)
        size -= half
    found = tl.load(chosen + low, mask=(token >= 0) & (low < count), other=-1)
    return (found == token) & (token >= 0)
