"""Label scores: one number per token and KV head, the guess of its attention mass.

score(t) = log sum over the group's query heads g of exp(ql_g . label_t - offset_g).
A KV head's rows are fetched once for all its query heads, so the best set of k
tokens is the one with the largest summed softmax mass; the log keeps the order
and cannot overflow.
"""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED
from .labels import code_width, read_labels


def label_scores(
    query_labels: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scores: torch.Tensor,
) -> None:
    """Score the selectable tokens; shapes as in label_scores_reference.

    On a GPU whole blocks past a sequence's length stay unwritten: select_topk
    reads sinks <= t < length - recent only.
    """
    run = label_scores_triton if scores.is_cuda else label_scores_reference
    run(query_labels, offsets, codes, scales, bits, lengths, sinks, recent, scores)


def label_scores_reference(
    query_labels: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scores: torch.Tensor,
) -> None:
    """Fill scores [B, Hkv, N] float32 for every selectable token; others get -inf.

    query_labels [B, Hq, R] and offsets [B, Hq] as query_labels() returns them;
    codes [B, Hkv, N, code_width] and scales [B, Hkv, N, 2]: the label cache;
    lengths [B] int32. Selectable are the tokens sinks <= t < length - recent.
    """
    batch, kv_heads = scores.shape[:2]
    group = query_labels.shape[1] // kv_heads
    ql = query_labels.view(batch, kv_heads, group, -1)  # [B, Hkv, G, R]
    scores.fill_(float("-inf"))
    for b, length in enumerate(lengths.tolist()):
        if length - recent <= sinks:
            continue
        span = slice(sinks, length - recent)
        labels = read_labels(codes[b, :, span], scales[b, :, span], bits)  # [Hkv, T, R]
        mass = torch.einsum("hgr,htr->hgt", ql[b], labels) - offsets[b].view(kv_heads, group, 1)
        scores[b, :, span] = torch.logsumexp(mass, 1)


def label_scores_triton(
    query_labels: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scores: torch.Tensor,
    block_bytes: int = 8192,
    program_tokens: int = 4096,
    num_stages: int = 4,
    num_warps: int = 4,
) -> None:
    """One launch; a program streams program_tokens tokens of one KV head, about block_bytes at a time.

    Codes go to the tensor cores as exact float16 integers against the query
    labels as a sum of two float16 numbers, so the only rounding is float32's.
    A matrix row holds `pack` tokens, against block-diagonal query labels: with
    one token a row, most of the 8 columns a tensor core has would be padding
    and the arithmetic, not memory, would set the pace.
    4,096 tokens make 512 programs at 262,144 tokens and 8 KV heads: four for
    each of an H100's 132 SMs, all of them at work at once.
    """
    batch, kv_heads, capacity = scores.shape
    heads, channels = query_labels.shape[1:]
    group = heads // kv_heads
    assert query_labels.is_contiguous()
    assert offsets.is_contiguous()
    assert scores.stride(2) == 1
    assert codes[0, 0].is_contiguous()
    assert bits == 16 or scales[0, 0].is_contiguous()
    if bits < 16:
        scales = scales.view(torch.int32)  # [B, Hkv, N, 1]: offset in the high half
    width = code_width(channels, bits)
    group_pad = triton.next_power_of_2(group)
    # 8 columns and 16 rows of the query matrix are the least a tensor core takes; 128 rows bound its size.
    pack = max(min(8 // group_pad, 128 // width), 16 // width, 1)
    # At least 64 rows: 16 for each of 4 warps; at most 128, to keep the accumulators in registers.
    rows = max(64, min(128, block_bytes // (pack * width * codes.element_size())))
    blocks = triton.cdiv(program_tokens, rows * pack)
    _label_scores_kernel[(triton.cdiv(capacity, blocks * rows * pack), batch * kv_heads)](
        query_labels, offsets, codes, scales, lengths, scores,
        codes.stride(0), codes.stride(1), scales.stride(0), scales.stride(1),
        scores.stride(0), scores.stride(1), capacity,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(group_pad, 8 // pack), PACK=pack,
        R=channels, WIDTH=width, BITS=bits, SINKS=sinks, RECENT=recent, ASM=scores.is_cuda,
        BLOCK=rows * pack, BLOCKS=blocks, STAGES=num_stages, num_warps=num_warps, **FUSED,
    )  # fmt: skip


@triton.jit
def _label_scores_kernel(
    query_labels, offsets, codes, scales, lengths, scores,
    codes_b, codes_h, scales_b, scales_h, scores_b, scores_h, capacity,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, PACK: tl.constexpr,
    R: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    ASM: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    i_bh = tl.program_id(1)
    i_b = (i_bh // KV_HEADS).to(tl.int64)
    i_h = (i_bh % KV_HEADS).to(tl.int64)
    length = tl.load(lengths + i_b)
    start = tl.program_id(0) * (BLOCK * BLOCKS)
    if start >= length:
        return

    # Query labels [PACK * WIDTH, PACK * G]: a block of columns for each token of a row.
    o_c = tl.arange(0, PACK * WIDTH)
    o_n = tl.arange(0, PACK * GROUP_PAD)
    m_query = (o_c // WIDTH)[:, None] == (o_n // GROUP_PAD)[None, :]
    m_query = m_query & (o_n % GROUP_PAD < GROUP)[None, :]
    p_query = query_labels + (i_bh * GROUP + o_n % GROUP_PAD)[None, :] * R + (o_c % WIDTH)[:, None]
    b_query = tl.load(p_query, mask=m_query, other=0.0) * LOG2E  # 4 bits: channels on low nibbles
    b_unit, b_rest = _two_halves(b_query)
    b_sum = _sum_of_halves(b_unit, b_rest)
    if BITS == 4:
        b_query = tl.load(p_query + WIDTH, mask=m_query, other=0.0) * LOG2E  # on high nibbles
        b_high_unit, b_high_rest = _two_halves(b_query)
        b_sum += _sum_of_halves(b_high_unit, b_high_rest)
    b_sum = tl.max(tl.reshape(b_sum, [PACK, GROUP_PAD]), 0)  # [G]: PACK equal rows
    o_g = tl.arange(0, GROUP_PAD)
    # Padded heads: an infinite offset leaves them no mass.
    b_offset = tl.load(offsets + i_bh * GROUP + o_g, mask=o_g < GROUP, other=float("inf")) * LOG2E  # [G]

    start_64 = start.to(tl.int64)
    p_codes = codes + i_b * codes_b + i_h * codes_h + start_64 * WIDTH
    p_scales = scales + i_b * scales_b + i_h * scales_h + start_64
    p_scores = scores + i_b * scores_b + i_h * scores_h + start_64
    first, end = SINKS - start, length - RECENT - start  # the selectable span, from this program's start
    for i in tl.range(0, tl.minimum(BLOCKS, tl.cdiv(length - start, BLOCK)), num_stages=STAGES):
        o_row = i * (BLOCK // PACK) + tl.arange(0, BLOCK // PACK)
        o_token = o_row[:, None] * PACK + (o_c // WIDTH)[None, :]
        m_code = (o_token >= first) & (o_token < end)
        p_row = p_codes + o_row[:, None] * (PACK * WIDTH) + o_c[None, :]
        b_code = tl.load(p_row, mask=m_code, other=0)  # [BLOCK / PACK, PACK * WIDTH]
        if BITS == 4:
            b_high = _high_nibbles(b_code, ASM)
            b_mass = tl.dot(b_high, b_high_unit)
            b_mass = tl.dot(b_high, b_high_rest, b_mass)
            b_code = _low_nibbles(b_code, ASM)
            b_mass = tl.dot(b_code, b_unit, b_mass)
        else:
            b_code = b_code.to(tl.float16)
            b_mass = tl.dot(b_code, b_unit)
        b_mass = tl.dot(b_code, b_rest, b_mass)  # [BLOCK / PACK, PACK * G]
        b_mass = tl.reshape(b_mass, [BLOCK, GROUP_PAD])
        o_t = i * BLOCK + tl.arange(0, BLOCK)
        m_t = (o_t >= first) & (o_t < end)
        if BITS < 16:
            pair = tl.load(p_scales + o_t, mask=m_t, other=0)  # [BLOCK]
            scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            shift = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            b_mass = b_mass * scale[:, None] + (shift[:, None] * b_sum[None, :] - b_offset[None, :])
        else:
            b_mass = b_mass - b_offset[None, :]
        b_score = tl.max(b_mass, 1)  # [BLOCK]
        if GROUP > 1:
            b_score += _log2(tl.sum(_exp2(b_mass - b_score[:, None], ASM), 1), ASM)
        b_score = tl.where(m_t, b_score * LN2, float("-inf"))
        tl.store(p_scores + o_t, b_score, mask=start + o_t < capacity)


@triton.jit
def _two_halves(b_query):
    """A float32 tile as the sum of two float16 tiles."""
    b_unit = b_query.to(tl.float16)
    return b_unit, (b_query - b_unit.to(tl.float32)).to(tl.float16)


@triton.jit
def _sum_of_halves(b_unit, b_rest):
    """Sums over rows of what the tensor cores multiply.

    Not of the products by LOG2E: each lane would add its own one, unrounded, to the others' rounded ones
    (combine_pieces.py), and lanes that hold the same sum would differ in its last bit.
    """
    return tl.sum(b_unit.to(tl.float32) + b_rest.to(tl.float32), 0)


# Below, ASM is what a GPU runs and the other branch what Triton's interpreter can. The compiler's
# conversions and its log2 and exp2 cost three times the instructions (counted in sm_90 SASS).
# 0x6400 | n is the float16 number 1024 + n, so two codes become numbers in one permute and one subtraction.


@triton.jit
def _low_nibbles(b_code, ASM: tl.constexpr):
    if ASM:
        b_code = tl.inline_asm_elementwise(
            """{
            .reg .b32 codes, magic, unit;
            mov.b32 magic, 0x64646464;
            mov.b32 unit, 0x64006400;
            and.b32 codes, $2, 0x0F0F0F0F;
            prmt.b32 $0, codes, magic, 0x4140;
            prmt.b32 $1, codes, magic, 0x4342;
            sub.f16x2 $0, $0, unit;
            sub.f16x2 $1, $1, unit;
            }""",
            "=&r,=&r,r", [b_code], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        b_code = (b_code & 15).to(tl.float16)
    return b_code


@triton.jit
def _high_nibbles(b_code, ASM: tl.constexpr):
    if ASM:
        b_code = tl.inline_asm_elementwise(
            """{
            .reg .b32 codes, magic, unit;
            mov.b32 magic, 0x64646464;
            mov.b32 unit, 0x64006400;
            shr.b32 codes, $2, 4;
            and.b32 codes, codes, 0x0F0F0F0F;
            prmt.b32 $0, codes, magic, 0x4140;
            prmt.b32 $1, codes, magic, 0x4342;
            sub.f16x2 $0, $0, unit;
            sub.f16x2 $1, $1, unit;
            }""",
            "=&r,=&r,r", [b_code], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        b_code = (b_code >> 4).to(tl.float16)
    return b_code


@triton.jit
def _exp2(b_x, ASM: tl.constexpr):
    if ASM:
        b_x = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        b_x = tl.exp2(b_x)
    return b_x


@triton.jit
def _log2(b_x, ASM: tl.constexpr):
    if ASM:
        b_x = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        b_x = tl.log2(b_x)
    return b_x
