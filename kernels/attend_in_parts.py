"""Decode attention in two parts: over what is resident, and over the rows that enter, when they have come.

After a sticky selection the first part has most rows to read and none to wait for, so it runs while the
others travel. What enters is the selection's doing (admission.py), never where a row happened to be: the
bits depend on the selection alone. On a GPU only: without one there is nothing to overlap, and
sparse_attention does.
"""

import torch
import triton

from .attend_pieces import ENTERED, MEMBERS, Inputs, attend_pieces, block_rows, cut
from .combine_pieces import Pieces, combine_pieces, empty_pieces

# Programs of the second part: two for each of an H100's 132 SMs, since few blocks are left and each program
# waits for its first. Half as many take as long (two_parts_h200.json).
LATE_PROGRAMS = 264


def late_splits(new_rows: int, lists: int, block: int) -> int:
    """Pieces of a KV head's entering rows: a block each, or as many as there are programs for."""
    return max(min(triton.cdiv(new_rows, block), LATE_PROGRAMS // lists), 1)


def attend_to_members(
    inputs: Inputs,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    stamps: torch.Tensor,
    step: torch.Tensor,
    phase: int,
    new_rows: int,
) -> Pieces:
    """Sinks, selection (tokens [B, Hkv, K], counts [B, Hkv]) and recent tokens, but for what entered.

    stamps, step and phase: as the selection's resolve_reference had them; new_rows: that may enter at most
    steps. With attend_to_entered, the reference is sparse_attention_reference of the whole selection.
    """
    lists, block = tokens.shape[0] * tokens.shape[1], block_rows(inputs.slots)
    chunk, splits = cut(inputs.sinks + tokens.shape[2] + inputs.recent, lists, block)
    pieces = empty_pieces(inputs.query, splits + late_splits(new_rows, lists, block))
    attend_pieces(inputs, tokens, counts, pieces, 0, splits, chunk, block, MEMBERS, stamps, step, phase)
    return pieces


def attend_to_entered(
    inputs: Inputs,
    entering: torch.Tensor,
    counts: torch.Tensor,
    stamps: torch.Tensor,
    step: torch.Tensor,
    new_rows: int,
    pieces: Pieces,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """What is selected of entering [B, Hkv, K] (counts [B, Hkv]); the output [B, Hq, D] of both parts."""
    lists, block = entering.shape[0] * entering.shape[1], block_rows(inputs.slots)
    splits = late_splits(new_rows, lists, block)
    first = pieces.splits - splits
    attend_pieces(inputs, entering, counts, pieces, first, splits, block, block, ENTERED, stamps, step)
    out = torch.empty_like(inputs.query, memory_format=torch.contiguous_format)
    combine_pieces(pieces, sink_logits, out)
    return out
