"""Prefill attention with windows, softcap and sinks: fast forms against the reference."""

import pytest
import torch

from offload_runtime.kernels import prefill_attention as module
from offload_runtime.kernels.masked_prefill import masked_prefill_triton
from offload_runtime.kernels.prefill_attention import (
    prefill_attention,
    prefill_attention_reference,
    with_sinks,
)

from .test_kernels_triton import DTYPES, TOLERANCE

NAN = float("nan")


def problem(count, prefix, dim, dtype, device, heads=4, kv_heads=2):
    """query as attention modules hand it over; rows as prefill keeps them, NaN where none is written yet."""
    torch.manual_seed(count + prefix + dim)
    query = torch.randn(1, count, heads, dim, device=device).to(dtype).transpose(1, 2)
    end = prefix + count
    buffer = torch.full((kv_heads, end + 5, 2 * dim), NAN, device=device, dtype=dtype)
    buffer[:, :end] = torch.randn(kv_heads, end, 2 * dim, device=device).to(dtype)
    return query, buffer[:, :end]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (0, 2.0), (24, 0.0), (24, 2.0), (1, 2.0)])
@pytest.mark.parametrize(("count", "prefix"), [(1, 0), (1, 70), (63, 0), (33, 100), (70, 131)])
def test_kernel_equals_reference(device, dtype, window, softcap, count, prefix):
    dim = 16 if count == 33 else 20
    query, rows = problem(count, prefix, dim, dtype, device)
    expected = prefill_attention_reference(query, rows, 0.5, window, softcap)
    got, lse = masked_prefill_triton(query, rows, 0.5, window, softcap)
    torch.testing.assert_close(got, expected, **TOLERANCE[dtype])
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("window", [0, 5])
def test_sinks_by_log_sum_exp_equal_sinks_in_the_softmax(device, window):
    query, rows = problem(40, 30, 16, torch.float32, device)
    sinks = torch.tensor([-3.0, 0.0, 2.0, 9.0], device=device)
    expected = prefill_attention_reference(query, rows, 0.5, window, 0.0, sinks)
    got = with_sinks(*masked_prefill_triton(query, rows, 0.5, window, 0.0), sinks)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_far_apart_lse_and_sink_do_not_overflow():
    out, lse = torch.ones(1, 2, 1, 4), torch.tensor([[[1e4, -1e4]]])
    assert torch.equal(with_sinks(out, lse, torch.zeros(1))[0, :, 0, 0], torch.tensor([1.0, 0.0]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    "kind", ["window", "window of one", "wide window", "sinks", "both", "softcap", "all"]
)
def test_fast_forms_on_a_gpu(monkeypatch, dtype, dim, kind):
    """Chunks at the start, in the middle and of one query; and none of them takes the reference."""
    sinks = torch.randn(8, device="cuda", dtype=dtype) if kind in ("sinks", "both", "all") else None
    window = {"window": 300, "window of one": 1, "wide window": 10**6, "both": 128, "all": 300}.get(kind, 0)
    softcap = 5.0 if kind in ("softcap", "all") else 0.0
    slow = prefill_attention_reference
    monkeypatch.setattr(module, "prefill_attention_reference", None)
    for count, prefix in [(1, 0), (1, 999), (500, 0), (257, 1000), (1024, 3001)]:
        query, rows = problem(count, prefix, dim, dtype, "cuda", heads=8)
        expected = slow(query.float(), rows.float(), dim**-0.5, window, softcap, sinks)
        got = prefill_attention(query, rows, dim**-0.5, window, softcap, sinks)
        assert got.shape == expected.shape
        torch.testing.assert_close(got.float(), expected, **TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_a_long_chunk_takes_no_square_memory(softcap):
    """8,192 queries over 65,536 keys: logits would be 4.3 GB a head in bfloat16."""
    query, rows = problem(8192, 57344, 128, torch.bfloat16, "cuda", heads=8)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prefill_attention(query, rows, 128**-0.5, 4096, softcap)
    assert torch.cuda.max_memory_allocated() - before < 100e6  # out is 17 MB, lse 0.3 MB
