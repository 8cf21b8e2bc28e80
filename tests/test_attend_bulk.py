"""Decode attention by the bulk copy engine, against the reference and the Triton kernel."""

import pytest
import torch

from offload_runtime.kernels import attend_bulk
from offload_runtime.kernels.attend_bulk import (
    MOST_PIECE,
    attend_bulk_available,
    piece_rows,
    shared_bytes,
    sparse_attention_bulk,
)
from offload_runtime.kernels.sparse_decode import sparse_attention_reference

from .hopper import needs_hopper
from .test_kernels_triton import RECENT, SINKS, TOLERANCE, attention_inputs

LENGTHS = [0, 1, 3, 7, 63, 127, 1000]
CASES = [(1, 64, 0.0, False), (4, 128, 5.0, False), (7, 128, 0.0, True), (8, 64, 3.0, True)]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group", "dim", "softcap", "with_sinks"), CASES)
def test_matches_the_reference(group, dim, softcap, with_sinks, dtype):
    inputs = attention_inputs(LENGTHS, 100, group, dim, dtype, "cuda")
    sink_logits = torch.randn(inputs[0].shape[1], device="cuda") if with_sinks else None
    want = sparse_attention_reference(*inputs, dim**-0.5, softcap, sink_logits)
    got = sparse_attention_bulk(*inputs, dim**-0.5, softcap, sink_logits)
    assert got.dtype == dtype
    assert (got[0] == 0).all()
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("programs", [1, 10, 10_000])
@pytest.mark.parametrize("budget", [1, 300, 900])
def test_pieces_of_any_number_of_blocks(programs, budget, monkeypatch):
    """One CTA for a whole list, and one for every block."""
    monkeypatch.setattr(attend_bulk, "PROGRAMS", programs)
    inputs = attention_inputs([1000, 40], budget, 4, 128, torch.bfloat16, "cuda")
    want = sparse_attention_reference(*inputs, 0.09)
    torch.testing.assert_close(sparse_attention_bulk(*inputs, 0.09), want, **TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@needs_hopper
def test_large_logits_and_long_lists():
    """Logits in the hundreds, and lists of which a CTA has many rounds of its rings."""
    inputs = attention_inputs([40_000], 30_000, 4, 128, torch.bfloat16, "cuda", capacity=40_000)
    want = sparse_attention_reference(*inputs, 3.0)
    torch.testing.assert_close(sparse_attention_bulk(*inputs, 3.0), want, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@needs_hopper
def test_same_bits_wherever_the_rows_lie_and_every_time():
    query, slots, tokens, counts, slot_of_token, *rest = attention_inputs(
        [127, 3000], 700, 4, 128, torch.bfloat16, "cuda", capacity=3000
    )
    moved_to = torch.randperm(slots.shape[2] - SINKS - RECENT).cuda()
    moved, moved_map, resident = slots.clone(), slot_of_token.clone(), slot_of_token >= 0
    moved[:, :, SINKS + RECENT + moved_to] = slots[:, :, SINKS + RECENT :]
    moved_map[resident] = moved_to[slot_of_token[resident].long()].int()
    here = sparse_attention_bulk(query, slots, tokens, counts, slot_of_token, *rest, 0.09)
    for _ in range(5):
        again = sparse_attention_bulk(query, moved, tokens, counts, moved_map, *rest, 0.09)
        assert torch.equal(here, again)


@pytest.mark.gpu
@needs_hopper
def test_available_for_what_it_is_written_for():
    def available(heads, kv_heads, dim, dtype):
        query = torch.empty(1, heads, dim, dtype=dtype, device="cuda")
        return attend_bulk_available(query, torch.empty(1, kv_heads, 8, 2 * dim, dtype=dtype, device="cuda"))

    assert available(32, 8, 128, torch.bfloat16)
    assert available(8, 1, 64, torch.float16)
    assert not available(32, 8, 128, torch.float32)
    assert not available(32, 8, 80, torch.bfloat16)
    assert not available(9, 1, 128, torch.bfloat16)


def test_pieces_fit_and_fill_a_gpu():
    for rows in (16, 2116, 16_452, 262_144):
        for lists in (1, 8, 64, 1000):
            piece = piece_rows(rows, lists)
            assert 0 < piece <= MOST_PIECE
            assert piece % 16 == 0
    assert -(-16_452 // piece_rows(16_452, 8)) * 8 <= 240
    assert 2 * (shared_bytes(128, piece_rows(16_452, 8)) + 2048) <= 228 * 1024
