// Label scores on tensor cores: a warp scores 32 tokens of one KV head at a time for its query group.
//
// Codes become half-precision numbers without arithmetic, an mma multiplies 16 tokens by four query heads
// (split in two parts for 22 bits of precision), and the log-sum-exp over the group is the score, in units
// of log 2. A score depends on its token's label and the queries only, not on where the token lies.
//
// Compile-time: CHANNELS, BITS, GROUP and STEPS, as in select_cluster.cu. order_key.cuh goes before this text.

constexpr int ROW_BYTES = CHANNELS * BITS / 8;
constexpr int LANE_BYTES = ROW_BYTES / 4;                    // a token's codes are spread over 4 lanes
constexpr int WORDS = LANE_BYTES < 4 ? 1 : LANE_BYTES / 4;
constexpr int UNITS = CHANNELS / 8;                          // pairs of half-precision labels a lane
constexpr int HEAD_TILES = (GROUP + 3) / 4;                  // an mma has 8 columns: 4 heads in two parts
constexpr float LOG2E = 1.4426950408889634f;

__device__ unsigned short to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ float from_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// d[4] += a[16 tokens, 16 channels] b[16 channels, 8 columns], half precision in, float32 out.
__device__ void multiply_add(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// This lane's share of one token's codes. Nothing writes the label cache while the kernel runs.
__device__ void load_codes(const unsigned char* codes, unsigned* words) {
    if constexpr (LANE_BYTES == 2) {
        words[0] = __ldg((const unsigned short*)codes);
    } else if constexpr (LANE_BYTES == 4) {
        words[0] = __ldg((const unsigned*)codes);
    } else if constexpr (LANE_BYTES == 8) {
        uint2 v = __ldg((const uint2*)codes);
        words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < LANE_BYTES / 16; ++i) {
            uint4 v = __ldg((const uint4*)codes + i);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    }
}

// Pair `unit` of this lane's labels as two half-precision numbers. A code n is left where a mask finds
// it: as the subnormal n 2^-24, or 16 n 2^-24 for a high nibble, which the query labels make up for.
__device__ unsigned label_pair(const unsigned* words, int unit) {
    if constexpr (BITS == 16) return words[unit];
    if constexpr (BITS == 8) return (words[unit / 2] >> (8 * (unit & 1))) & 0x00ff00ffu;
    if constexpr (LANE_BYTES == 2) {
        unsigned spread = (words[0] & 0xffu) | ((words[0] & 0xff00u) << 8);
        return spread & (unit & 1 ? 0x00f000f0u : 0x000f000fu);
    }
    return (words[unit / 4] >> (8 * ((unit >> 1) & 1))) & (unit & 1 ? 0x00f000f0u : 0x000f000fu);
}

// The channel that half `half` of pair `unit` holds in quad lane `quad_lane`.
__device__ int channel_of(int unit, int half, int quad_lane) {
    if constexpr (BITS == 16) return quad_lane * (CHANNELS / 4) + 2 * unit + half;
    if constexpr (BITS == 8) return quad_lane * (CHANNELS / 4) + unit / 2 * 4 + (unit & 1) + 2 * half;
    int high = (unit & 1) * (CHANNELS / 2);
    if constexpr (LANE_BYTES == 2) return high + 2 * quad_lane + half;
    return high + quad_lane * LANE_BYTES + unit / 4 * 4 + ((unit >> 1) & 1) + 2 * half;
}

// What a lane keeps of the group's queries: its part of the mma's b operand, and per head (in the order
// quad lane, ^1, ^2, ^3) the sum of its query labels and minus its offset.
struct Query {
    unsigned b[HEAD_TILES][UNITS];
    float label_sum[HEAD_TILES][4];
    float minus_offset[HEAD_TILES][4];
    float unscale;  // undoes the scaling of b and of the codes
};

// Sums of the query labels of four heads, in the lane's order (quad lane ^ 0, 1, 2, 3).
__device__ void sum_labels(const float* labels, int first_head, int lane, float* sums) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[i] = 0.f;
        if (first_head + i >= GROUP) continue;
        for (int r = lane; r < CHANNELS; r += 32) sums[i] += labels[(first_head + i) * CHANNELS + r] * LOG2E;
#pragma unroll
        for (int step = 16; step; step >>= 1) sums[i] += __shfl_xor_sync(ALL, sums[i], step);
    }
    float a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    bool odd = lane & 1, upper = lane & 2;
    float even_low = odd ? b : a, odd_low = odd ? a : b, even_high = odd ? d : c, odd_high = odd ? c : d;
    sums[0] = upper ? even_high : even_low, sums[1] = upper ? odd_high : odd_low;
    sums[2] = upper ? even_low : even_high, sums[3] = upper ? odd_low : odd_high;
}

// Query labels are split into two half-precision numbers (22 bits), scaled so that the largest is near 2^8.
__device__ void load_query(const float* labels, const float* offsets, int lane, Query& query) {
    float largest = 0.f;
    for (int i = lane; i < GROUP * CHANNELS; i += 32) largest = fmaxf(largest, fabsf(labels[i] * LOG2E));
    for (int i = 16; i; i >>= 1) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, i));
    int exponent = min(max(262 - (__float_as_int(largest) >> 23), 30), 220);
    float scale = __int_as_float(exponent << 23);
    query.unscale = __int_as_float((254 - exponent) << 23) * (BITS == 16 ? 1.f : 16777216.f);
    int column = lane >> 2, quad_lane = lane & 3;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
        int head = tile * 4 + (column >> 1);
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
            float down = BITS == 4 && (unit & 1) ? scale / 16.f : scale;
            unsigned pair = 0;
            for (int half = 0; half < 2 && head < GROUP; ++half) {
                float label = labels[head * CHANNELS + channel_of(unit, half, quad_lane)] * LOG2E * down;
                unsigned short part = to_half(label);
                if (column & 1) part = to_half(label - from_half(part));
                pair |= (unsigned)part << (16 * half);
            }
            query.b[tile][unit] = pair;
        }
        sum_labels(labels, tile * 4, lane, query.label_sum[tile]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int other = tile * 4 + (quad_lane ^ i);  // -inf: no such head
            query.minus_offset[tile][i] = other < GROUP ? -offsets[other] * LOG2E : __int_as_float(0xff800000);
        }
    }
}

// Row j of 4 for head `quad_lane` in, row `quad_lane` for heads quad_lane ^ {0, 1, 2, 3} out.
__device__ void transpose_quad(float* d, int quad_lane) {
    bool odd = quad_lane & 1, upper = quad_lane & 2;
    float near0 = odd ? d[1] : d[0], near1 = odd ? d[3] : d[2];
    float far0 = __shfl_xor_sync(ALL, odd ? d[0] : d[1], 1);
    float far1 = __shfl_xor_sync(ALL, odd ? d[2] : d[3], 1);
    d[0] = upper ? near1 : near0;
    d[1] = upper ? far1 : far0;
    d[2] = __shfl_xor_sync(ALL, upper ? near0 : near1, 2);
    d[3] = __shfl_xor_sync(ALL, upper ? far0 : far1, 2);
}

// What a warp loads at once: STEPS times 32 tokens' codes and (scale, offset) pairs.
struct Batch {
    unsigned words[STEPS][4][WORDS], pair[STEPS];
};

// A step's products that a lane has: of its quad lane's head with the tokens 8 j + lane / 4, before scale and offset;
// and the (scale, offset) pair of the token that it will score.
struct Dots {
    float rows[HEAD_TILES][4];
    unsigned pair;
};

// A step's codes, rows 8 j + lane / 4 of 32, times the queries.
__device__ Dots multiply_step(const Batch& batch, int step, const Query& query) {
    Dots out;
    out.pair = batch.pair[step];
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
        float dots[2][4] = {};
#pragma unroll
        for (int unit = 0; unit < UNITS; unit += 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const unsigned *low = batch.words[step][2 * half], *high = batch.words[step][2 * half + 1];
                multiply_add(dots[half], label_pair(low, unit), label_pair(high, unit), label_pair(low, unit + 1),
                             label_pair(high, unit + 1), query.b[tile][unit], query.b[tile][unit + 1]);
            }
        }
        // Columns 2 h and 2 h + 1 are the two parts of head h, and quad lane h holds both.
        float* row = out.rows[tile];
        row[0] = dots[0][0] + dots[0][1], row[1] = dots[0][2] + dots[0][3];
        row[2] = dots[1][0] + dots[1][1], row[3] = dots[1][2] + dots[1][3];
    }
    return out;
}

// The score of token 8 (lane & 3) + lane / 4 of a step.
__device__ float score_step(Dots dots, const Query& query, int lane) {
    float scale = query.unscale, offset = 0.f;
    if (BITS != 16) {
        scale *= from_half((unsigned short)dots.pair);
        offset = from_half((unsigned short)(dots.pair >> 16));
    }
    float most;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
        float* row = dots.rows[tile];
        transpose_quad(row, lane & 3);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            row[i] = scale * row[i] + (offset * query.label_sum[tile][i] + query.minus_offset[tile][i]);
            most = tile + i ? fmaxf(most, row[i]) : row[i];
        }
    }
    float sum;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {  // pairs, so that the sum is the same in every quad lane
        const float* row = dots.rows[tile];
        float near = exp2_fast(row[0] - most) + exp2_fast(row[1] - most);
        float far = exp2_fast(row[2] - most) + exp2_fast(row[3] - most);
        sum = tile ? sum + (near + far) : near + far;
    }
    return most + log2_fast(sum);
}

// Where a lane's part of a batch lies: of the first 8 tokens' codes, and the pair of its own token.
struct Source {
    const unsigned char* codes;
    const unsigned* scales;
};

__device__ Source source_at(const unsigned char* codes, const unsigned* scales, int token, int lane) {
    int row = lane >> 2, mine = 8 * (lane & 3) + row;
    return {codes + (long long)(token + row) * ROW_BYTES + (lane & 3) * LANE_BYTES, scales + token + mine};
}

// A batch of tokens that are all there: at fixed offsets from one address.
__device__ void load_batch(Source source, Batch& batch) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int j = 0; j < 4; ++j) load_codes(source.codes + (32 * step + 8 * j) * ROW_BYTES, batch.words[step][j]);
        batch.pair[step] = BITS == 16 ? 0 : __ldg(source.scales + 32 * step);
    }
}

// The last batch, of `left` tokens: what is past them repeats the last one, so that nothing beyond the written labels
// is read.
__device__ void load_last_batch(Source source, int left, int lane, Batch& batch) {
    int row = lane >> 2, mine = 8 * (lane & 3) + row;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int token = min(32 * step + 8 * j + row, left - 1);
            load_codes(source.codes + (long long)(token - row) * ROW_BYTES, batch.words[step][j]);
        }
        batch.pair[step] = BITS == 16 ? 0 : __ldg(source.scales + min(32 * step + mine, left - 1) - mine);
    }
}
