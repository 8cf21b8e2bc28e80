"""Prefill attention in two merged parts: the mathematics on any device, cuDNN and flash on a GPU."""

import itertools

import pytest
import torch

from offload_runtime.kernels import split_attention as split
from offload_runtime.kernels.merge_attention import merge_attention_reference, merge_attention_triton
from offload_runtime.kernels.prefill_attention import prefill_attention, prefill_attention_reference

SCALE = 0.3


def problem(count, prefix, heads=4, kv_heads=2, dim=16, dtype=torch.float32, device="cpu"):
    """query as attention modules hand it over, rows as prefill keeps them: in a larger buffer."""
    torch.manual_seed(count + prefix)
    query = torch.randn(1, count, heads, dim, device=device).to(dtype).transpose(1, 2)
    buffer = torch.randn(kv_heads, prefix + count + 5, 2 * dim, device=device).to(dtype)
    return query, buffer[:, : prefix + count]


@pytest.mark.parametrize("prefix", [0, 1, 7, 63, 200])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_split_equals_unsplit(count, prefix):
    query, rows = problem(count, prefix)
    expected = prefill_attention_reference(query, rows, SCALE)
    got = split.split_attention(query, rows, SCALE, split.attend_reference).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [(50,), (1, 99), (10, 11, 90), (33, 66)])
def test_any_split_of_the_keys_merges_to_the_whole(cuts):
    """The merge does not care where keys are cut, nor in which order the parts come."""
    query, rows = problem(5, 100)
    keys, values = rows[None, :, :100, :16], rows[None, :, :100, 16:]
    whole, whole_lse = split.attend_reference(query, keys, values, SCALE, False)
    edges = [0, *cuts, 100]
    spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
    parts = [
        split.attend_reference(query, keys[:, :, s], values[:, :, s], SCALE, False) for s in reversed(spans)
    ]
    out, lse = parts[0]
    for other, other_lse in parts[1:]:
        merge_attention_reference(out, lse, other, other_lse)
        lse = torch.logaddexp(lse, other_lse)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("far", [0.0, 1e4, -1e4])
def test_merge_of_very_unequal_parts(far):
    """A part whose keys all lose has no say, and nothing overflows."""
    out, other = torch.full((1, 1, 1, 4), 2.0), torch.full((1, 1, 1, 4), 6.0)
    merged = merge_attention_reference(out, torch.zeros(1, 1, 1), other, torch.full((1, 1, 1), far))
    expected = {0.0: 4.0, 1e4: 6.0, -1e4: 2.0}[far]
    torch.testing.assert_close(merged, torch.full((1, 1, 1, 4), expected))


@pytest.mark.parametrize("count", [1, 31, 32, 100])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_kernel(device, count, dim, dtype):
    torch.manual_seed(0)
    # [1, T, H, D] seen as [1, H, T, D] and the other way round: both strides occur.
    out = torch.randn(1, count, 3, dim, device=device).to(dtype).transpose(1, 2)
    other = torch.randn(1, 3, count, dim, device=device).to(dtype)
    lse, other_lse = 40 * torch.randn(2, 1, 3, count, device=device)
    expected = merge_attention_reference(out.clone(), lse, other, other_lse)
    merge_attention_triton(out, lse, other, other_lse)
    tolerance = 4 * torch.finfo(dtype).eps  # two exponentials, a product and a sum
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_flash_when_cudnn_fails(monkeypatch):
    """A length that cuDNN refuses goes to flash; running out of memory is not hidden."""
    query, rows = problem(split.LEAST_TOKENS, 3, heads=1, kv_heads=1)

    def refuse(*_):
        raise RuntimeError("no plan")

    def no_room(*_):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(split, "cudnn_is_faster", lambda *_: True)
    monkeypatch.setattr(split, "flash_attention", lambda *_: "flash")
    monkeypatch.setattr(split, "cudnn_attention", lambda *_: "cudnn")
    assert split.fastest_attention(query, rows, SCALE) == "cudnn"
    assert split.fastest_attention(query[:, :, 1:], rows, SCALE) == "flash"  # too short to matter
    monkeypatch.setattr(split, "cudnn_attention", refuse)
    assert split.fastest_attention(query, rows, SCALE) == "flash"
    monkeypatch.setattr(split, "cudnn_attention", no_room)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        split.fastest_attention(query, rows, SCALE)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (4, 4, 64), (8, 1, 128)])
@pytest.mark.parametrize(("count", "prefix"), [(1027, 0), (1024, 1), (1031, 517), (2048, 6144)])
@pytest.mark.parametrize("attention", [split.flash_attention, split.cudnn_attention])
def test_backends_against_the_reference(attention, count, prefix, heads, kv_heads, dim):
    query, rows = problem(count, prefix, heads, kv_heads, dim, torch.bfloat16, "cuda")
    scale = dim**-0.5
    expected = prefill_attention_reference(query.float(), rows.float(), scale)
    got = attention(query, rows, scale).transpose(1, 2).float()
    # Softmax weights are rounded to bfloat16 before they meet the values, and the output once more.
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
def test_the_trial_decides_and_the_result_is_right():
    query, rows = problem(1500, 900, 32, 8, 128, torch.bfloat16, "cuda")
    assert split.cudnn_is_faster(0, torch.bfloat16, 32, 8, 128) in (True, False)
    expected = prefill_attention_reference(query.float(), rows.float(), 128**-0.5)
    got = prefill_attention(query, rows, 128**-0.5).float()
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
def test_a_wrong_merge_loses_the_trial(monkeypatch):
    """The trial would catch log-sum-exps of another base."""
    attend = split.attend_cudnn

    def base_two(*arguments):
        out, lse = attend(*arguments)
        return out, lse / torch.log(torch.tensor(2.0))

    monkeypatch.setattr(split, "attend_cudnn", base_two)
    assert not split.cudnn_is_faster.__wrapped__(0, torch.bfloat16, 8, 2, 128)
