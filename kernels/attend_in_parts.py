"""Decode attention in two parts: over what is resident, and over the rows that enter, when they have come.

After a sticky selection the first part has most rows to read and none to wait for, so it runs while the
others travel. What enters is the selection's doing (admission.py), never where a row happened to be: the
bits depend on the selection alone. On a GPU only: without one there is nothing to overlap, and
sparse_attention does.
"""

import torch
import triton

from .attend_pieces import ENTERED, MEMBERS, attend_pieces, block_rows, cut
from .combine_pieces import Pieces, combine_pieces, empty_pieces

# Programs of the second part: two for each of an H100's 132 SMs, since few blocks are left and each program
# waits for its first. Half as many take as long (two_parts_h200.json).
LATE_PROGRAMS = 264


def late_splits(new_rows: int, lists: int, block: int) -> int:
    """Pieces of a KV head's entering rows: a block each, or as many as there are programs for."""
    return max(min(triton.cdiv(new_rows, block), LATE_PROGRAMS // lists), 1)


def attend_to_members(
    query: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float,
    stamps: torch.Tensor,
    step: torch.Tensor,
    phase: int,
    new_rows: int,
) -> Pieces:
    """Sinks, selection and recent tokens but for what entered; arguments as in sparse_attention_reference.

    stamps, step and phase: as the selection's resolve_reference had them; new_rows: that may enter at most
    steps. With attend_to_entered, the reference is sparse_attention_reference of the whole selection.
    """
    lists, block = tokens.shape[0] * tokens.shape[1], block_rows(slots)
    chunk, splits = cut(sinks + tokens.shape[2] + recent, lists, block)
    pieces = empty_pieces(query, splits + late_splits(new_rows, lists, block))
    attend_pieces(
        query, slots, tokens, counts, slot_of_token, lengths, sinks, recent, scale, softcap, pieces, 0,
        splits, chunk, block, MEMBERS, stamps, step, phase,
    )  # fmt: skip
    return pieces


def attend_to_entered(
    query: torch.Tensor,
    slots: torch.Tensor,
    entering: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float,
    sink_logits: torch.Tensor | None,
    stamps: torch.Tensor,
    step: torch.Tensor,
    new_rows: int,
    pieces: Pieces,
) -> torch.Tensor:
    """What is selected of entering [B, Hkv, K] (counts [B, Hkv]); the output [B, Hq, D] of both parts."""
    lists, block = entering.shape[0] * entering.shape[1], block_rows(slots)
    splits = late_splits(new_rows, lists, block)
    attend_pieces(
        query, slots, entering, counts, slot_of_token, lengths, sinks, recent, scale, softcap, pieces,
        pieces.splits - splits, splits, block, block, ENTERED, stamps, step,
    )  # fmt: skip
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    combine_pieces(pieces, sink_logits, out)
    return out
