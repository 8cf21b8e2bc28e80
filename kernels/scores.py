"""Label scores: one number per token and KV head, the guess of its attention mass.

score(t) = log sum over the group's query heads g of exp(ql_g . label_t - offset_g).
A KV head's rows are fetched once for all its query heads, so the best set of k
tokens is the one with the largest summed softmax mass; the log keeps the order
and cannot overflow.
"""

import torch
import triton
import triton.language as tl

from .labels import read_labels


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
    block_tokens: int = 256,
    blocks: int = 8,
    num_stages: int = 4,
    num_warps: int = 4,
) -> None:
    """One launch; a program streams blocks * block_tokens tokens of one KV head.

    Codes go to the tensor cores as exact float16 integers against the query
    labels as a sum of two float16 numbers, so the only rounding is float32's.
    256 x 8 tokens make 1,024 programs at 262,144 tokens and 8 KV heads: one
    wave of 8 programs on each of an H100's 132 SMs.
    """
    batch, kv_heads, capacity = scores.shape
    heads, channels = query_labels.shape[1:]
    group = heads // kv_heads
    assert query_labels.is_contiguous()
    assert offsets.is_contiguous()
    assert scores.stride(2) == 1
    assert codes[0, 0].is_contiguous()
    assert bits == 16 or scales[0, 0].is_contiguous()
    word = channels if bits > 4 else 4 if channels < 32 else 8  # nibbles a word; unused above 4 bits
    if bits == 4:
        codes = codes.view(torch.int16 if word == 4 else torch.int32)  # [B, Hkv, N, R / word]
    if bits < 16:
        scales = scales.view(torch.int32)  # [B, Hkv, N, 1]: offset in the high half
    _label_scores_kernel[(triton.cdiv(capacity, block_tokens * blocks), batch * kv_heads)](
        query_labels, offsets, codes, scales, lengths, scores,
        codes.stride(0), codes.stride(1), scales.stride(0), scales.stride(1),
        scores.stride(0), scores.stride(1), capacity,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(8, triton.next_power_of_2(group)),
        R=channels, BITS=bits, WORD=word, SINKS=sinks, RECENT=recent,
        BLOCK=block_tokens, BLOCKS=blocks, STAGES=num_stages, num_warps=num_warps,
    )  # fmt: skip


@triton.jit
def _label_scores_kernel(
    query_labels, offsets, codes, scales, lengths, scores,
    codes_b, codes_h, scales_b, scales_h, scores_b, scores_h, capacity,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    R: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    WIDTH: tl.constexpr = R // WORD if BITS == 4 else R  # elements of one token's codes
    i_bh = tl.program_id(1)
    i_b = (i_bh // KV_HEADS).to(tl.int64)
    i_h = (i_bh % KV_HEADS).to(tl.int64)
    length = tl.load(lengths + i_b)
    start = tl.program_id(0) * (BLOCK * BLOCKS)
    if start >= length:
        return

    # Query labels as columns, in the order in which the codes are unpacked.
    o_g = tl.arange(0, GROUP_PAD)
    m_g = o_g < GROUP
    o_r = _channel_order(R, BITS, WORD)
    p_query = query_labels + (i_bh * GROUP + o_g[None, :]) * R + o_r[:, None]
    b_query = tl.load(p_query, mask=m_g[None, :], other=0.0) * LOG2E  # [R, G]
    b_offset = tl.load(offsets + i_bh * GROUP + o_g, mask=m_g, other=0.0) * LOG2E  # [G]
    b_sum = tl.sum(b_query, 0)  # [G]
    b_top = tl.max(tl.abs(b_query), 0)
    b_top = tl.where(b_top > 0, b_top, 1.0)
    b_unit = b_query / b_top[None, :]  # within float16's range whatever the model's scale
    b_high = b_unit.to(tl.float16)
    b_low = (b_unit - b_high.to(tl.float32)).to(tl.float16)

    start_64 = start.to(tl.int64)
    p_codes = codes + i_b * codes_b + i_h * codes_h + start_64 * WIDTH
    p_scales = scales + i_b * scales_b + i_h * scales_h + start_64
    p_scores = scores + i_b * scores_b + i_h * scores_h + start_64
    o_w = tl.arange(0, WIDTH)
    for i in tl.range(0, tl.minimum(BLOCKS, tl.cdiv(length - start, BLOCK)), num_stages=STAGES):
        o_t = i * BLOCK + tl.arange(0, BLOCK)
        m_t = (start + o_t >= SINKS) & (start + o_t < length - RECENT)
        b_code = tl.load(p_codes + o_t[:, None] * WIDTH + o_w[None, :], mask=m_t[:, None], other=0)
        if BITS == 4:
            b_code = _unpack(b_code, R, WORD, BLOCK)
        b_code = b_code.to(tl.float16)  # [BLOCK, R]
        b_mass = tl.dot(b_code, b_high)
        b_mass = tl.dot(b_code, b_low, b_mass) * b_top[None, :]  # [BLOCK, G]
        if BITS < 16:
            pair = tl.load(p_scales + o_t, mask=m_t, other=0)  # [BLOCK]
            scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            shift = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            b_mass = b_mass * scale[:, None] + shift[:, None] * b_sum[None, :]
        b_mass = tl.where(m_g[None, :], b_mass - b_offset[None, :], float("-inf"))
        b_score = tl.max(b_mass, 1)  # [BLOCK]
        if GROUP > 1:
            b_score += tl.log2(tl.sum(tl.exp2(b_mass - b_score[:, None]), 1))
        b_score = tl.where(m_t, b_score / LOG2E, float("-inf"))
        tl.store(p_scores + o_t, b_score, mask=start + o_t < capacity)


@triton.jit
def _unpack(b_code, R: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """The codes [BLOCK, R] in packed words [BLOCK, R / WORD], in the order of _channel_order.

    Tensor cores want columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of every 16 in
    thread t of four. Ordered so, a thread unpacks the one word it loaded and
    no nibble crosses threads.
    """
    STEPS: tl.constexpr = WORD // 4  # matrix steps of 16 columns that a word feeds
    o_n = tl.arange(0, WORD)
    b_code = (b_code.to(tl.int32)[:, :, None] >> (4 * o_n)[None, None, :]) & 15  # [BLOCK, R / WORD, WORD]
    b_code = tl.reshape(b_code, [BLOCK, R // (4 * WORD), 4, STEPS, 2, 2])
    b_code = tl.permute(b_code, (0, 1, 3, 4, 2, 5))
    return tl.reshape(b_code, [BLOCK, R])


@triton.jit
def _channel_order(R: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr):
    """The channel in each unpacked column [R]."""
    column = tl.arange(0, R)
    if BITS != 4:
        return column
    high = column % 2  # low or high nibble of its byte
    thread = column // 2 % 4
    byte = column // 8 % (WORD // 2)  # of its word
    word = column // (4 * WORD) * 4 + thread
    return word * (WORD // 2) + byte + high * (R // 2)
