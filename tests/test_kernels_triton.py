"""Every Triton kernel against its torch reference: in the interpreter on a CPU, natively on a GPU.

Unused slots, rows, labels and outputs hold NaN, so a read outside what an op
may read, or a place it forgot to write, fails the comparison.
"""

import pytest
import torch

from offload_runtime.kernels.append import append_rows_reference, append_rows_triton
from offload_runtime.kernels.gather import gather_rows_reference, gather_rows_triton
from offload_runtime.kernels.labels import (
    code_width,
    make_labels_reference,
    make_labels_triton,
    quantise,
    read_labels,
)
from offload_runtime.kernels.query_labels import query_labels_reference, query_labels_triton
from offload_runtime.kernels.scores import label_scores_reference, label_scores_triton
from offload_runtime.kernels.sparse_decode import sparse_attention_reference, sparse_attention_triton

NAN = float("nan")
SINKS, RECENT = 4, 16
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Quest's and Liger's bounds for half-precision attention; float32 differs in summation order only.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 2e-2},
}


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch):
    """Tensors that a wrapper allocates for results and scratch start as NaN too."""
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(NAN) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def nans(*shape, dtype=torch.float32, device="cpu"):
    return torch.full(shape, NAN, dtype=dtype, device=device)


def host(rows: torch.Tensor) -> torch.Tensor:
    """A host copy: pinned where the kernel runs on a GPU."""
    copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
    return copy.copy_(rows)


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_append_writes_both_copies_exactly(dim, dtype, device):
    lengths = ints([1, 5, 64], device)  # a sink, the first ring place, a later lap of the ring
    kv = torch.randn(2, 3, 2, 2 * dim, device=device).to(dtype)
    key, value = kv[0, ..., :dim], kv[1, ..., dim:]  # strided views, as a fused projection gives them
    slots = nans(3, 2, SINKS + RECENT + 3, 2 * dim, dtype=dtype, device=device)
    rows = host(nans(3, 2, 64, 2 * dim, dtype=dtype, device=device))
    want_slots, want_rows = slots.clone(), rows.clone().to(device)
    append_rows_reference(key, value, lengths, want_slots, SINKS, RECENT, want_rows)
    append_rows_triton(key, value, lengths, slots, SINKS, RECENT, rows)
    sync()
    assert torch.equal(slots.nan_to_num(7), want_slots.nan_to_num(7))
    assert torch.equal(rows.nan_to_num(7), want_rows.cpu().nan_to_num(7))
    assert not slots.isnan().all()


@pytest.mark.parametrize("num_programs", [1, 5])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float32), (80, torch.bfloat16), (128, torch.float16)])
def test_gather_moves_the_missed_rows_and_nothing_else(dim, dtype, num_programs, device):
    batch, heads, capacity, budget, n_slots = 2, 3, 127, 63, 70
    rows = torch.randn(batch, heads, capacity, 2 * dim, device=device).to(dtype)
    counts = ints([[0, 1, 63], [17, 0, 32]], device)  # heads with unequal numbers of misses
    tokens = torch.full((batch, heads, budget), 10**8, dtype=torch.int32, device=device)
    places = tokens.clone()
    for b in range(batch):
        for h in range(heads):
            n = int(counts[b, h])
            tokens[b, h, :n] = torch.randperm(capacity)[:n].sort().values.int()
            places[b, h, :n] = torch.randperm(n_slots)[:n].int()
    slots = nans(batch, heads, SINKS + RECENT + n_slots, 2 * dim, dtype=dtype, device=device)
    want = slots.clone()
    gather_rows_reference(rows, tokens, places, counts, want, SINKS + RECENT)
    gather_rows_triton(host(rows), tokens, places, counts, slots, SINKS + RECENT, num_programs=num_programs)
    sync()
    assert torch.equal(slots.nan_to_num(7), want.nan_to_num(7))
    assert int((~slots.isnan()).any(-1).sum()) == int(counts.sum())


def label_cache(batch, heads, capacity, channels, bits, device):
    """A label cache that holds nothing but NaN (and, in byte codes, 255)."""
    shape = (batch, heads, capacity, code_width(channels, bits))
    if bits == 16:
        codes = nans(*shape, dtype=torch.float16, device=device)
    else:
        codes = torch.full(shape, 255, dtype=torch.uint8, device=device)
    return codes, nans(batch, heads, capacity, 2, dtype=torch.float16, device=device)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    ("tokens", "dim", "channels", "dtype"),
    [(1, 128, 32, torch.bfloat16), (63, 64, 16, torch.float16), (127, 80, 64, torch.float32)],
)
def test_labels_equal_the_reference_within_a_rounding_tie(tokens, dim, channels, dtype, bits, device):
    batch, heads = 2, 2
    fused = torch.randn(batch, tokens, heads, 2, dim, device=device).to(dtype)
    keys = fused[:, :, :, 1].transpose(1, 2)  # [B, Hkv, T, D], strided
    key_map = torch.randn(heads, channels, dim, device=device) / dim**0.5
    key_mean = torch.randn(heads, dim, device=device)
    starts = ints([3, 0], device)
    got = label_cache(batch, heads, tokens + 5, channels, bits, device)
    want = label_cache(batch, heads, tokens + 5, channels, bits, device)
    make_labels_reference(keys, key_map, key_mean, starts, *want, bits)
    make_labels_triton(keys, key_map, key_mean, starts, *got, bits)
    step = want[1][..., :1].float().nan_to_num(0) if bits < 16 else torch.tensor(2e-3, device=device)
    read = read_labels(*got, bits), read_labels(*want, bits)
    assert torch.equal(read[0].isnan(), read[1].isnan())  # the same tokens were written
    assert ((read[0] - read[1]).nan_to_num(0).abs() <= step * 1.01 + 2e-3).all()
    if bits < 16:
        same = (got[0] == want[0]).float().mean()
        assert same > 0.99  # ties are rare
    written = ~read[0].isnan().any(-1)
    assert written.sum() == batch * heads * tokens


@pytest.mark.parametrize("include_current", [True, False])
@pytest.mark.parametrize(
    ("group", "dim", "dtype"), [(1, 64, torch.float32), (4, 128, torch.bfloat16), (8, 80, torch.float16)]
)
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_query_labels_and_normalisers(sinks, group, dim, dtype, include_current, device):
    lengths = [1, 3, 5, 63, 1000]
    batch, heads, channels = len(lengths), 2, 16
    query = torch.randn(batch, heads * group, 2 * dim, device=device).to(dtype)[..., dim:]
    query_map = torch.randn(heads * group, channels, dim, device=device)
    key_mean = torch.randn(heads, dim, device=device)
    slots = nans(batch, heads, sinks + RECENT + 2, 2 * dim, dtype=dtype, device=device)
    for b, length in enumerate(lengths):
        for position in range(length if include_current else length - 1):
            place = position if position < sinks else sinks + position % RECENT
            slots[b, :, place] = torch.randn(heads, 2 * dim, device=device).to(dtype)
    args = (query, query_map, key_mean, slots, ints(lengths, device), sinks, RECENT, dim**-0.5)
    want = query_labels_reference(*args, include_current)
    got = query_labels_triton(*args, include_current, block_rows=8)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("channels", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_scores_of_the_selectable_span(bits, channels, group, device):
    lengths = [1, 63, 127, 1000]
    batch, heads, capacity = len(lengths), 1, 1024
    labels = torch.randn(batch, heads, capacity, channels, device=device)
    codes, scales = label_cache(batch, heads, capacity, channels, bits, device)
    for b, length in enumerate(lengths):  # sinks, recent and future tokens keep their poison
        span = slice(SINKS, max(SINKS, length - RECENT))
        if bits == 16:
            codes[b, :, span] = labels[b, :, span].half()
        else:
            codes[b, :, span], scales[b, :, span] = quantise(labels[b, :, span], bits)
    query = torch.randn(batch, heads * group, channels, device=device) / 4
    offsets = torch.randn(batch, heads * group, device=device)
    want = nans(batch, heads, capacity, device=device)
    got = want.clone()
    args = (query, offsets, codes, scales, bits, ints(lengths, device), SINKS, RECENT)
    label_scores_reference(*args, want)
    label_scores_triton(*args, got, program_tokens=256)
    for b, length in enumerate(lengths):
        covered = min(-(-length // 64) * 64, capacity)  # up to the end of the block with the length
        torch.testing.assert_close(got[b, :, :covered], want[b, :, :covered], rtol=1e-5, atol=2e-5)


def attention_inputs(lengths, budget, group, dim, dtype, device, capacity=1000):
    """Rows of random tokens in random slots; every place that no selected token owns is NaN."""
    batch, heads, n_slots = len(lengths), 2, budget + 7
    slots = nans(batch, heads, SINKS + RECENT + n_slots, 2 * dim, dtype=dtype, device=device)
    tokens = torch.full((batch, heads, budget), -1, dtype=torch.int32, device=device)
    slot_of_token = torch.full((batch, heads, capacity), -1, dtype=torch.int32, device=device)
    # The second KV head selects half as many, as adaptive budgets have it.
    counts = [[max(0, min(k, length - RECENT - SINKS)) for k in (budget, budget // 2)] for length in lengths]
    for b, length in enumerate(lengths):
        local = list(range(min(SINKS, length))) + list(range(max(SINKS, length - RECENT), length))
        for position in local:
            place = position if position < SINKS else SINKS + position % RECENT
            slots[b, :, place] = torch.randn(heads, 2 * dim, device=device).to(dtype)
        for h in range(heads):
            n = counts[b][h]
            chosen = SINKS + torch.randperm(max(length - RECENT - SINKS, 0))[:n].sort().values
            where = torch.randperm(n_slots)[:n]
            tokens[b, h, :n] = chosen.int().to(device)
            slot_of_token[b, h, chosen.to(device)] = where.int().to(device)
            slots[b, h, SINKS + RECENT + where.to(device)] = torch.randn(n, 2 * dim, device=device).to(dtype)
    query = torch.randn(batch, heads * group, 2 * dim, device=device).to(dtype)[..., :dim]
    return query, slots, tokens, ints(counts, device), slot_of_token, ints(lengths, device), SINKS, RECENT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("group", "dim", "softcap", "with_sinks"), [(1, 64, 0.0, False), (4, 128, 5.0, False), (8, 80, 0.0, True)]
)
def test_attention_matches_the_reference(group, dim, softcap, with_sinks, dtype, device):
    inputs = attention_inputs([1, 3, 7, 63, 127, 1000], 100, group, dim, dtype, device)
    sink_logits = torch.randn(inputs[0].shape[1], device=device) if with_sinks else None
    want = sparse_attention_reference(*inputs, dim**-0.5, softcap, sink_logits)
    got = sparse_attention_triton(*inputs, dim**-0.5, softcap, sink_logits)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("programs", [1, 10, 10_000])
def test_attention_pieces_of_any_number_of_blocks(programs, device):
    inputs = attention_inputs([1000], 300, 4, 64, torch.float32, device)
    want = sparse_attention_reference(*inputs, 0.125)
    got = sparse_attention_triton(*inputs, 0.125, programs=programs)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


def by_slots(inputs):
    """attention_inputs with lists of the selected tokens' slots."""
    query, slots, tokens, counts, slot_of_token, *rest = inputs
    listed = slot_of_token.gather(-1, tokens.long().clamp_min(0))
    return query, slots, listed, counts, None, *rest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_by_slots_has_the_bits_of_that_by_tokens(dtype, device):
    inputs = attention_inputs([0, 1, 7, 127, 1000], 100, 4, 64, dtype, device)
    for run in (sparse_attention_reference, sparse_attention_triton):
        assert torch.equal(run(*by_slots(inputs), 0.125), run(*inputs, 0.125))


def with_rows_moved(inputs):
    """attention_inputs with the resident rows in other slots, and the new slot of each."""
    query, slots, tokens, counts, slot_of_token, *rest = inputs
    moved_to = torch.randperm(slots.shape[2] - SINKS - RECENT).to(slots.device)
    moved, moved_map = slots.clone(), slot_of_token.clone()
    moved[:, :, SINKS + RECENT + moved_to] = slots[:, :, SINKS + RECENT :]
    resident = slot_of_token >= 0
    moved_map[resident] = moved_to[slot_of_token[resident].long()].int()
    assert not torch.equal(moved_map, slot_of_token)
    return (query, moved, tokens, counts, moved_map, *rest), moved_to


def test_attention_has_the_same_bits_wherever_the_rows_lie(device):
    inputs = attention_inputs([127, 1000], 100, 4, 64, torch.bfloat16, device)
    moved, _ = with_rows_moved(inputs)
    assert torch.equal(sparse_attention_triton(*inputs, 0.125), sparse_attention_triton(*moved, 0.125))
