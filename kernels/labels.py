"""Labels: the few numbers kept of every key, from which decoding guesses q.k.

label = key_map (k - key_mean), stored as float16 or as 8- or 4-bit codes with
one (scale, offset) pair a token. Choosing R channels (Double Sparsity, arXiv
2408.07092 section 3) is the case where the rows of key_map are unit vectors.
4-bit codes hold channel r in the low nibble of byte r and channel r + R/2 in
its high nibble, so that a kernel unpacks them without a shuffle.
"""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED
from .early_launch import early_launch, wait_for_inputs


def code_width(channels: int, bits: int) -> int:
    """Elements of one token's codes: float16 numbers at 16 bits, else bytes."""
    return channels // 2 if bits == 4 else channels


def make_labels(
    keys: torch.Tensor,
    key_map: torch.Tensor,
    key_mean: torch.Tensor,
    starts: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
) -> None:
    """Write labels into the label cache; shapes as in make_labels_reference."""
    run = make_labels_triton if keys.is_cuda else make_labels_reference
    run(keys, key_map, key_mean, starts, codes, scales, bits)


def make_labels_reference(
    keys: torch.Tensor,
    key_map: torch.Tensor,
    key_mean: torch.Tensor,
    starts: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
) -> None:
    """Write the labels of T consecutive tokens into the label cache, in place.

    keys [B, Hkv, T, D] (after RoPE); key_map [Hkv, R, D] and key_mean [Hkv, D]
    float32; starts [B] int32: the position of each sequence's first key, -1 for an
    empty place, which gets none;
    codes [B, Hkv, N, code_width]; scales [B, Hkv, N, 2] float16 (scale, offset),
    untouched at 16 bits.
    """
    tokens = keys.shape[2]
    centred = keys.float() - key_mean[None, :, None, :]
    labels = torch.einsum("bhtd,hrd->bhtr", centred, key_map)  # [B, Hkv, T, R]
    for b, start in enumerate(starts.tolist()):
        if start < 0:
            continue
        if bits == 16:
            codes[b, :, start : start + tokens] = labels[b].to(codes.dtype)
            continue
        packed, pair = quantise(labels[b], bits)
        codes[b, :, start : start + tokens] = packed
        scales[b, :, start : start + tokens] = pair


def quantise(labels: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Asymmetric codes of [..., R] float32 labels: bytes and [..., 2] float16 (scale, offset)."""
    offset = labels.amin(-1, keepdim=True).half().float()
    scale = ((labels.amax(-1, keepdim=True) - offset) / (2**bits - 1)).half().float()
    safe_scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    code = ((labels - offset) / safe_scale + 0.5).floor().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        half = code.shape[-1] // 2
        code = code[..., :half] | (code[..., half:] << 4)
    return code, torch.cat([scale, offset], -1).half()


def read_labels(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The float32 labels [..., R] that codes [..., code_width] and scales [..., 2] stand for."""
    if bits == 16:
        return codes.float()
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)  # [..., R]
    return codes.float() * scales[..., :1].float() + scales[..., 1:].float()


def make_labels_triton(
    keys: torch.Tensor,
    key_map: torch.Tensor,
    key_mean: torch.Tensor,
    starts: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    block_tokens: int = 64,
    num_warps: int = 4,
) -> None:
    """One launch: a program a KV head for one token (decode), a program a block of tokens for more.

    Labels are float32 sums in either case, so codes differ from the reference
    only where it is a rounding tie away from the next code.
    """
    batch, kv_heads, tokens, dim = keys.shape
    channels = key_map.shape[1]
    assert keys.stride(3) == 1
    assert key_map.is_contiguous()
    assert key_mean.is_contiguous()
    assert codes[0, 0].is_contiguous()
    assert scales[0, 0].is_contiguous()
    # Below 16 tokens a matrix product is mostly padding: one token a program, multiplied and summed.
    block = block_tokens if tokens >= 16 else 1
    # The map's tile of one step: at most 8,192 float32 numbers, 64 registers in each of 128 threads.
    block_d = 32 if block > 1 else min(triton.next_power_of_2(dim), 8192 // channels)
    _make_labels_kernel[(triton.cdiv(tokens, block), batch * kv_heads)](
        keys, key_map, key_mean, starts, codes, scales,
        keys.stride(0), keys.stride(1), keys.stride(2),
        codes.stride(0), codes.stride(1), scales.stride(0), scales.stride(1), tokens,
        KV_HEADS=kv_heads, DIM=dim, BLOCK_D=block_d,
        R=channels, BITS=bits, BLOCK=block, num_warps=num_warps, **early_launch(keys), **FUSED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])  # one compilation for chunks of any length
def _make_labels_kernel(
    keys, key_map, key_mean, starts, codes, scales,
    keys_b, keys_h, keys_t, codes_b, codes_h, scales_b, scales_h, tokens,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    R: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    i_b = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    i_h = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    start = tl.load(starts + i_b).to(tl.int64)
    o_t = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_r = tl.arange(0, R)
    m_t = o_t < tl.where(start >= 0, tokens, 0)  # none in an empty place
    b_label = tl.zeros([BLOCK, R], tl.float32)
    for first in range(0, DIM, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        m_d = o_d < DIM
        p_key = keys + i_b * keys_b + i_h * keys_h + o_t[:, None] * keys_t + o_d[None, :]
        b_key = tl.load(p_key, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [T, D]
        b_mean = tl.load(key_mean + i_h * DIM + o_d, mask=m_d, other=0.0)  # [D]
        b_key = b_key - b_mean[None, :]
        p_map = key_map + (i_h * R + o_r[:, None]) * DIM + o_d[None, :]
        b_map = tl.load(p_map, mask=m_d[None, :], other=0.0)  # [R, D]
        if BLOCK == 1:
            b_label += tl.sum(b_map * b_key, 1)[None, :]
        else:
            b_label = tl.dot(b_key, tl.trans(b_map), b_label, input_precision="ieee")
    if BITS == 16:
        p_code = codes + i_b * codes_b + i_h * codes_h + (start + o_t[:, None]) * R + o_r[None, :]
        tl.store(p_code, b_label.to(codes.dtype.element_ty), mask=m_t[:, None])
    else:
        _store_codes(
            b_label, codes + i_b * codes_b + i_h * codes_h, scales + i_b * scales_b + i_h * scales_h,
            start + o_t, m_t, R, BITS, BLOCK,
        )  # fmt: skip


@triton.jit
def _store_codes(
    b_label, p_codes, p_scales, o_t, m_t, R: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """quantise() of a [BLOCK, R] block, and its stores at token positions o_t."""
    LEVELS: tl.constexpr = 2**BITS - 1
    b_offset = tl.min(b_label, 1).to(tl.float16)  # [BLOCK]
    b_span = tl.max(b_label, 1) - b_offset.to(tl.float32)
    b_scale = (b_span / LEVELS).to(tl.float16)
    safe_scale = tl.where(b_scale > 0, b_scale.to(tl.float32), 1.0)
    b_code = tl.floor((b_label - b_offset.to(tl.float32)[:, None]) / safe_scale[:, None] + 0.5)
    b_code = tl.minimum(tl.maximum(b_code, 0.0), LEVELS).to(tl.int32)  # [BLOCK, R]
    tl.store(p_scales + o_t * 2, b_scale, mask=m_t)
    tl.store(p_scales + o_t * 2 + 1, b_offset, mask=m_t)
    if BITS == 4:
        halves = tl.permute(tl.reshape(b_code, [BLOCK, 2, R // 2]), (0, 2, 1))  # [BLOCK, R / 2, 2]
        low, high = tl.split(halves)
        o_c = tl.arange(0, R // 2)
        p_code = p_codes + o_t[:, None] * (R // 2) + o_c[None, :]
        tl.store(p_code, (low | (high << 4)).to(tl.uint8), mask=m_t[:, None])
    else:
        p_code = p_codes + o_t[:, None] * R + tl.arange(0, R)[None, :]
        tl.store(p_code, b_code.to(tl.uint8), mask=m_t[:, None])
