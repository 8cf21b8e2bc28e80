"""Prefill attention in two merged parts: the mathematics on any device, cuDNN and flash on a GPU."""

import importlib.machinery
import itertools
import sys
import types

import pytest
import torch

from offload_runtime import prefill_backend
from offload_runtime.bench.flex import flex_prefill_attention
from offload_runtime.kernels import attention_trial
from offload_runtime.kernels import split_attention as split
from offload_runtime.kernels.attention_trial import candidates, event_ms, package_function, try_all
from offload_runtime.kernels.merge_attention import merge_attention_reference, merge_attention_triton
from offload_runtime.kernels.prefill_attention import prefill_attention, prefill_attention_reference
from offload_runtime.prefill_backend import PrefillBackend

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


def test_pieces_of_the_prefix():
    """They cover it in order, and a whole prompt needs few lengths: each is a plan of cuDNN's."""
    for prefix, count in [(0, 8), (3, 8), (8, 8), (37, 8), (5 * 8 + 1, 8), (1000, 1)]:
        pieces = split.prefix_pieces(prefix, count)
        assert [edge for piece in pieces for edge in piece] == sorted(e for piece in pieces for e in piece)
        assert [b - a for a, b in pieces] == [b - a for a, b in pieces if b > a]
        assert sum(b - a for a, b in pieces) == prefix
        assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    chunk, first = 4096, 262111 % 4096
    starts = range(first, 262111, chunk)
    lengths = {b - a for start in starts for a, b in split.prefix_pieces(start, chunk)}
    assert lengths == {first, *(chunk << power for power in range(6))}


def test_merge_into_another_tensor(device):
    """Parts merged so far stay float32; the last merge rounds once."""
    torch.manual_seed(0)
    out, other = (torch.randn(1, 40, 3, 64, device=device).bfloat16().transpose(1, 2) for _ in range(2))
    lse, other_lse = torch.randn(2, 1, 3, 40, device=device)
    into = torch.full_like(out, float("nan"), dtype=torch.float32)
    kept = out.clone()
    merge_attention_triton(out, lse, other, other_lse, into)
    expected = merge_attention_reference(out.float(), lse, other, other_lse)
    assert torch.equal(out, kept)
    torch.testing.assert_close(into, expected, rtol=1e-5, atol=1e-5)


def test_the_fastest_that_agrees_wins():
    query, rows = problem(8, 24)
    exact = lambda q, r, s: split.split_attention(q, r, s, split.attend_reference)  # noqa: E731

    def fails(*_):
        raise RuntimeError("no plan\nfor this")

    attentions = {
        "flash": exact,
        "wrong": lambda q, r, s: 1.1 * exact(q, r, s),
        "nan": lambda q, r, s: float("nan") * q,
        "fails": fails,
        "same": exact,
    }
    times = iter([3.0] * attention_trial.TIMED_RUNS + [5.0, 2.0, 4.0])
    results = try_all(attentions, query, rows, SCALE, lambda work: (work(), next(times))[1])
    assert results == {
        "flash": 3.0,
        "wrong": "disagrees with flash attention",
        "nan": "disagrees with flash attention",
        "fails": "no plan",
        "same": 2.0,
    }


def test_a_package_is_tried_where_it_is_installed(monkeypatch):
    """A module of that interface: [1, T, H, D], causal from the last key on, perhaps a tuple."""
    assert package_function("no_such_package", "attend") is None
    assert package_function("json", "no_such_function") is None

    def flash_attn_func(q, k, v, softmax_scale, causal):
        assert causal
        rows = torch.cat([k, v], -1)[0].transpose(0, 1)  # [Hkv, E, 2 D]
        return prefill_attention_reference(q.transpose(1, 2), rows, softmax_scale), None

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    query, rows = problem(9, 20)
    got = candidates()["flash-attn-2"](query, rows, SCALE)
    expected = prefill_attention_reference(query, rows, SCALE).transpose(1, 2)
    torch.testing.assert_close(got, expected)


def single_prefill_with_kv_cache(q, k, v, *, causal, kv_layout, sm_scale):
    """FlashInfer's interface: [T, Hq, D] over [Hkv, E, D], causal from the last key on."""
    assert (causal, kv_layout) == (True, "HND")
    assert k.stride() == v.stride()
    rows = torch.cat([k, v], -1)
    return prefill_attention_reference(q.transpose(0, 1)[None], rows, sm_scale)[0]


def test_flashinfer_is_tried_where_it_is_installed(monkeypatch):
    """One that agrees may win; one whose causal mask begins at the first key is found out."""
    module = types.ModuleType("flashinfer")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    module.single_prefill_with_kv_cache = single_prefill_with_kv_cache
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    query, rows = problem(9, 20)
    attentions = {"flash": reference_attention, "flashinfer": candidates()["flashinfer"]}
    assert isinstance(
        try_all(attentions, query, rows, SCALE, lambda work: (work(), 1.0)[1])["flashinfer"], float
    )

    def other_alignment(q, k, v, **options):
        return single_prefill_with_kv_cache(q, k[:, : len(q)], v[:, : len(q)], **options)

    module.single_prefill_with_kv_cache = other_alignment
    attentions["flashinfer"] = candidates()["flashinfer"]
    results = try_all(attentions, query, rows, SCALE, lambda work: (work(), 1.0)[1])
    assert results["flashinfer"] == "disagrees with flash attention"


def test_an_attention_without_a_compiler_is_out():
    """FlashInfer compiles its kernels at the first call."""

    def fails(*_):
        raise FileNotFoundError("[Errno 2] No such file or directory: 'nvcc'")

    query, rows = problem(9, 20)
    results = try_all({"flash": reference_attention, "x": fails}, query, rows, SCALE, lambda _: 1.0)
    assert "nvcc" in results["x"]


def reference_attention(query, rows, scale):
    return prefill_attention_reference(query, rows, scale).transpose(1, 2)


def test_flex_attention_agrees():
    """The benchmark's, as PyTorch runs it without compiling."""
    query, rows = problem(9, 20)
    got = flex_prefill_attention(query, rows, SCALE)
    torch.testing.assert_close(got, reference_attention(query, rows, SCALE), rtol=1e-4, atol=1e-4)


def test_flash_when_the_chosen_one_fails(monkeypatch, caplog):
    """A failure at work goes to flash and says so; running out of memory is not hidden."""
    query, rows = problem(16, 3)
    backend = PrefillBackend()
    backend.name, backend.full_chunk, backend.attention = "cudnn", 16, lambda *_: "cudnn"

    def refuse(*_):
        raise RuntimeError("no plan")

    def no_room(*_):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(prefill_backend, "flash_attention", lambda *_: "flash")
    assert backend.attend(query, rows, SCALE) == "cudnn"
    assert backend.attend(query[:, :, 1:], rows, SCALE) == "flash"  # not a full chunk
    backend.attention = no_room
    with pytest.raises(torch.cuda.OutOfMemoryError):
        backend.attend(query, rows, SCALE)
    backend.attention = refuse
    assert backend.attend(query, rows, SCALE) == "flash"
    assert "no plan" in caplog.text
    assert backend.figures() == {
        "attention": "flash",
        "attention_trial_ms": {"cudnn": "failed during a prefill"},
    }
    assert backend.attend(query, rows, SCALE) == "flash"


def test_one_trial_decides_for_all_sessions_of_a_process(monkeypatch):
    """Or two sessions could prefill on different attentions, and differ in their bits."""
    results = iter([{"flash": 2.0, "cudnn": 1.0}, {"flash": 1.0, "cudnn": 2.0}])
    monkeypatch.setattr(prefill_backend, "try_all", lambda *_: next(results))
    prefill_backend.trials.cache_clear()
    rows = torch.zeros(2, 64, 32)
    first = dict(prefill_backend.trial_of_process(rows, 4, 16))
    assert prefill_backend.trial_of_process(rows, 4, 16) == first
    assert prefill_backend.fastest(first) == "cudnn"
    assert not rows.any()
    assert prefill_backend.trial_of_process(rows, 8, 16) != first  # another shape
    prefill_backend.trials.cache_clear()


@pytest.mark.parametrize(
    ("trial", "chosen"),
    [({}, "flash"), ({"flash": 1.0, "cudnn": 0.95}, "flash"), ({"flash": 1.0, "cudnn": 0.6}, "cudnn"),
     ({"flash": 1.0, "cudnn": "no plan"}, "flash")],
)  # fmt: skip
def test_another_attention_must_be_clearly_faster(trial, chosen):
    assert prefill_backend.fastest(trial) == chosen


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
    backend, chunk = PrefillBackend(), 1024
    rows = torch.zeros(8, 5 * chunk, 256, device="cuda", dtype=torch.bfloat16)
    backend.choose(rows, 32, chunk, 3 * chunk)  # too short to be worth it
    assert (backend.name, backend.trial) == ("flash", {})
    backend.choose(rows, 32, chunk, 5 * chunk)
    assert isinstance(backend.trial["flash"], float)
    assert isinstance(backend.trial["cudnn"], float), backend.trial
    assert backend.trial[backend.name] == min(t for t in backend.trial.values() if isinstance(t, float))
    assert not rows.any()
    query, rows = problem(chunk, 3 * chunk + 100, 32, 8, 128, torch.bfloat16, "cuda")
    expected = prefill_attention_reference(query.float(), rows.float(), 128**-0.5)
    got = prefill_attention(query, rows, 128**-0.5, attention=backend.attend).float()
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
def test_a_wrong_merge_loses_the_trial(monkeypatch):
    """The trial would catch log-sum-exps of another base."""
    attend = split.attend_cudnn

    def base_two(*arguments):
        out, lse = attend(*arguments)
        return out, lse / torch.log(torch.tensor(2.0))

    monkeypatch.setattr(split, "attend_cudnn", base_two)
    query, rows = problem(1024, 3072, 8, 2, 128, torch.bfloat16, "cuda")
    rows[:, 3072:, 128:] += 1
    results = try_all(candidates(), query, rows, 128**-0.5, event_ms)
    assert results["cudnn"] == "disagrees with flash attention"
