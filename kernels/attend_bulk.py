"""Decode attention with rows fetched by the bulk copy engine, on GPUs that have one (sm_90 and newer).

Triton's kernel reads tokens, slots and rows one after the other for every block: 28 us for 16,384 rows of 8
heads, where reading those rows takes 18 (H200). Here a CTA finds all its rows' places first. The CUDA source is
compiled at first use through CuPy's RawModule: call it once before a CUDA graph captures it.
"""

import functools
from typing import Any

import numpy as np
import torch

from .combine_pieces import combine_pieces
from .cuda_source import compile_source, runs_hopper_source

SOURCES = ("bulk_copy.cuh", "attend_bulk.cu")  # one text, in this order
DIMS, MOST_GROUP = (64, 128), 8  # head sizes, and query heads a KV head, that the kernel is written for
WARPS, STAGES, BLOCK = 4, 3, 16  # 101 KB of rows a CTA at 128 numbers, so that two share an SM
# CTAs in all: fewer than two for each of an H100's 132 SMs, of which a gather may have eight.
PROGRAMS = 240
MOST_PIECE = 2048  # rows of a CTA, whose places take 4 bytes each


def attend_bulk_available(query: torch.Tensor, slots: torch.Tensor) -> bool:
    """Whether sparse_attention_bulk runs for these."""
    dim, group = query.shape[2], query.shape[1] // slots.shape[1]
    fits = dim in DIMS and group <= MOST_GROUP and query.dtype in (torch.float16, torch.bfloat16)
    return fits and query.dtype == slots.dtype and runs_hopper_source(query.device)


def sparse_attention_bulk(
    query: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """sparse_attention_reference in two launches, for 16-bit rows.

    How the list of rows is cut depends on shapes only, so the bits depend on the selection alone.
    """
    import cupy

    (batch, heads, dim), (kv_heads, budget) = query.shape, tokens.shape[1:]
    assert query.stride(2) == slot_of_token.stride(2) == 1
    assert slots[0, 0].is_contiguous()
    assert slots.data_ptr() % 16 == 0
    assert tokens.is_contiguous()
    piece = piece_rows(sinks + budget + recent, batch * kv_heads)
    splits = -(-(sinks + budget + recent) // piece)
    partial = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=query.device)
    tops = torch.empty(2, batch, heads, splits, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, heads, dim, dtype=query.dtype, device=query.device)
    half, index = int(query.dtype == torch.float16), query.device.index
    kernel = compiled(dim, heads // kv_heads, half, index)
    tensors = (query, slots, tokens, counts, slot_of_token, lengths, partial, tops[0], tops[1])
    strides = [x.stride(i) for x in (query, slots, slot_of_token) for i in (0, 1)]
    numbers = (kv_heads, budget, sinks, recent, piece)
    stream = torch.cuda.current_stream(query.device).cuda_stream
    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(stream):
        kernel(
            (splits, kv_heads, batch),
            (32 * WARPS,),
            (
                *(tensor.data_ptr() for tensor in tensors),
                *(np.int64(stride) for stride in strides),
                *(np.float32(number) for number in (scale, softcap)),
                *(np.int32(number) for number in numbers),
            ),
            shared_mem=shared_bytes(dim, piece),
        )
    combine_pieces(partial, tops[0], tops[1], sink_logits, out)
    return out


def piece_rows(rows: int, lists: int) -> int:
    """Rows of a CTA's piece, whole blocks, when `lists` lists of up to `rows` are cut for PROGRAMS CTAs."""
    blocks = -(-rows // BLOCK)
    return min(-(-blocks // max(PROGRAMS // lists, 1)) * BLOCK, MOST_PIECE)


def shared_bytes(dim: int, piece: int) -> int:
    """Dynamic shared memory of a CTA: padded rows in flight, and the places of a piece's."""
    return WARPS * STAGES * BLOCK * (4 * dim + 16) + 4 * piece


@functools.cache
def compiled(dim: int, group: int, half: int, device_index: int) -> Any:
    import cupy

    defines = {
        "DIM": dim,
        "GROUP": group,
        "HALF": half,
        "WARPS": WARPS,
        "STAGES": STAGES,
        "ROW_BYTES": 4 * dim,
    }
    with cupy.cuda.Device(device_index):
        kernel = compile_source(SOURCES, "attend_bulk", defines)
        kernel.max_dynamic_shared_size_bytes = shared_bytes(dim, MOST_PIECE)
    return kernel
