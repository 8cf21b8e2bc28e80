// Label scoring and exact top-k in one kernel: a thread block cluster for each (sequence, KV head).
//
// The cluster's CTAs share the selectable tokens out, so the scores never leave shared memory:
//   1. score: tensor cores multiply label codes by the group's query labels; the log-sum-exp over
//      the group becomes a uint32 key of the same order, and its top 11 bits are counted;
//   2. cut: three radix rounds of 11, 11 and 10 bits find the k-th key; each CTA adds one slice of
//      the histogram over the cluster (distributed shared memory);
//   3. walk: a prefix over CTAs and warps gives every selected token its place, in token order.
// Scores are in units of log 2 and differ from label_scores_reference by rounding only.
//
// Compile-time: CHANNELS (16, 32, 64, 128), BITS (4, 8, 16), GROUP (query heads a KV head),
// CLUSTER (8 or 16), STICKY (0 or 1), STEPS (32-token steps a warp loads at once), PREFETCH (1: load the
// next STEPS while scoring these), RESIDENT (CTAs an SM must be able to hold, which bounds the registers).
// No includes, so that nvrtc needs no header path.

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int BINS = 2048;    // 11 bits: three rounds fix 32 bits, and 3 x 8 KB fit beside the keys
constexpr int SLICE = BINS / CLUSTER;
constexpr int ROW_BYTES = CHANNELS * BITS / 8;
constexpr int LANE_BYTES = ROW_BYTES / 4;                    // a token's codes are spread over 4 lanes
constexpr int WORDS = LANE_BYTES < 4 ? 1 : LANE_BYTES / 4;
constexpr int UNITS = CHANNELS / 8;                          // pairs of half-precision labels a lane
constexpr int HEAD_TILES = (GROUP + 3) / 4;                  // an mma has 8 columns: 4 heads in two parts
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f;

struct Shared {
    unsigned histogram[3][BINS];
    unsigned slice_total[3][SLICE];  // this CTA's slice of the bins, summed over the cluster
    unsigned slice_sum[3];
    int warp_higher[WARPS], warp_ties[WARPS];
    int cta_higher, cta_ties;        // read by the other CTAs
    int members;                     // of the previous selection, found by this CTA
    unsigned cut_digit;
    int cut_wanted;
};

// A cut through the order (key descending, token ascending): keys above `key`, and the first `ties` equal ones.
struct Cut {
    unsigned key;
    int ties;
};

__device__ unsigned cta_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// The address of another CTA's copy of a shared variable.
__device__ unsigned remote_address(const void* local, unsigned rank) {
    unsigned address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"((unsigned)__cvta_generic_to_shared(local)), "r"(rank));
    return address;
}

__device__ unsigned remote_load(const void* local, unsigned rank) {
    unsigned value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote_address(local, rank)) : "memory");
    return value;
}

__device__ void remote_or(const void* local, unsigned rank, unsigned bits) {
    asm volatile("red.relaxed.cluster.shared::cluster.or.b32 [%0], %1;"
                 :
                 : "r"(remote_address(local, rank)), "r"(bits)
                 : "memory");
}

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

// A uint32 of the same order as the float; 0 is below every number's key.
__device__ unsigned order_key(float score) {
    int bits = __float_as_int(score);
    return (unsigned)(bits ^ ((bits >> 31) | 0x80000000));
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

// The score of token 8 (lane & 3) + lane / 4 of a 32-token step; words [4][WORDS] are rows 8 j + lane / 4.
__device__ float score_step(const unsigned (*words)[WORDS], unsigned scale_offset, const Query& query, int lane) {
    float scale = query.unscale, offset = 0.f;
    if (BITS != 16) {
        scale *= from_half((unsigned short)scale_offset);
        offset = from_half((unsigned short)(scale_offset >> 16));
    }
    float x[HEAD_TILES][4], most = -3e38f;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
        float dots[2][4] = {};
#pragma unroll
        for (int unit = 0; unit < UNITS; unit += 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const unsigned *low = words[2 * half], *high = words[2 * half + 1];
                multiply_add(dots[half], label_pair(low, unit), label_pair(high, unit), label_pair(low, unit + 1),
                             label_pair(high, unit + 1), query.b[tile][unit], query.b[tile][unit + 1]);
            }
        }
        // Columns 2 h and 2 h + 1 are the two parts of head h, and quad lane h holds both.
        float* row = x[tile];
        row[0] = dots[0][0] + dots[0][1], row[1] = dots[0][2] + dots[0][3];
        row[2] = dots[1][0] + dots[1][1], row[3] = dots[1][2] + dots[1][3];
        transpose_quad(row, lane & 3);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            row[i] = scale * row[i] + (offset * query.label_sum[tile][i] + query.minus_offset[tile][i]);
            most = fmaxf(most, row[i]);
        }
    }
    float sum = 0.f;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {  // pairs, so that the sum is the same in every quad lane
        const float* row = x[tile];
        float near = exp2_fast(row[0] - most) + exp2_fast(row[1] - most);
        float far = exp2_fast(row[2] - most) + exp2_fast(row[3] - most);
        sum += near + far;
    }
    return most + log2_fast(sum);
}

__device__ bool is_member(const unsigned* member_bits, int token) {
    return STICKY && (member_bits[token >> 5] >> (token & 31)) & 1;
}

// What a warp loads at once: STEPS times 32 tokens' codes and (scale, offset) pairs.
struct Batch {
    unsigned words[STEPS][4][WORDS], pair[STEPS];
};

// Full batches are loaded at fixed offsets from one address. In the last one, tokens past the CTA's last
// repeat it, so that nothing beyond the written labels is read.
__device__ void load_batch(
    const unsigned char* codes, const unsigned* scales, int base, int n, int lane, Batch& batch) {
    int row = lane >> 2, mine = 8 * (lane & 3) + row;
    codes += (lane & 3) * LANE_BYTES;
    if (base + 32 * STEPS <= n) {
        codes += (long long)(base + row) * ROW_BYTES;
        scales += base + mine;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int j = 0; j < 4; ++j) load_codes(codes + (32 * step + 8 * j) * ROW_BYTES, batch.words[step][j]);
            batch.pair[step] = BITS == 16 ? 0 : __ldg(scales + 32 * step);
        }
    } else if (base < n) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                long long token = min(base + 32 * step + 8 * j + row, n - 1);
                load_codes(codes + token * ROW_BYTES, batch.words[step][j]);
            }
            batch.pair[step] = BITS == 16 ? 0 : __ldg(scales + min(base + 32 * step + mine, n - 1));
        }
    }
}

// Fill keys [n] with the scores of this CTA's tokens and count their top 11 bits (members left out).
__device__ void score_tokens(
    const unsigned char* codes, const unsigned* scales, const float* query_labels, const float* offsets, int n,
    unsigned* keys, const unsigned* member_bits, Shared& shared) {
    constexpr int STRIDE = WARPS * 32 * STEPS;
    int lane = threadIdx.x & 31, mine = 8 * (lane & 3) + (lane >> 2), base = (threadIdx.x >> 5) * 32 * STEPS;
    if (base >= n) return;
    Batch batch;
    load_batch(codes, scales, base, n, lane, batch);
    Query query;
    load_query(query_labels, offsets, lane, query);
    for (; base < n; base += STRIDE) {
        Batch next;
        if (PREFETCH) load_batch(codes, scales, base + STRIDE, n, lane, next);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned key = order_key(score_step(batch.words[step], batch.pair[step], query, lane));
            int token = base + 32 * step + mine;
            if (token < n) {
                keys[token] = key;
                if (!is_member(member_bits, token)) atomicAdd(&shared.histogram[0][key >> 21], 1u);
            }
        }
        if (PREFETCH) batch = next;
        else load_batch(codes, scales, base + STRIDE, n, lane, batch);
    }
}

// Sum this CTA's slice of a round's bins over the cluster. Before it: cluster_sync(), after it too.
__device__ void reduce_slice(Shared& shared, int round, unsigned rank) {
    constexpr int PARTS = THREADS / SLICE;
    int bin = threadIdx.x % SLICE, part = threadIdx.x / SLICE;
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < CLUSTER / PARTS; ++i) {
        unsigned peer = (rank + part * (CLUSTER / PARTS) + i) % CLUSTER;
        sum += remote_load(&shared.histogram[round][rank * SLICE + bin], peer);
    }
    atomicAdd(&shared.slice_total[round][bin], sum);
    sum = __reduce_add_sync(ALL, sum);
    if (threadIdx.x % 32 == 0) atomicAdd(&shared.slice_sum[round], sum);
}

// Among 32 counts (one a lane, ascending digits): the lane that holds the wanted-th from the top, and
// what is still wanted within it.
__device__ int find_lane(int count, int lane, int& wanted) {
    int at_least = count;
    for (int i = 1; i < 32; i <<= 1) {
        int above = __shfl_down_sync(ALL, at_least, i);
        if (lane + i < 32) at_least += above;
    }
    unsigned holds = __ballot_sync(ALL, at_least >= wanted);
    int found = holds ? 31 - __clz(holds) : 0;
    wanted -= __shfl_sync(ALL, at_least - count, found);
    return found;
}

// Warp 0: the digit of a round's cut, and what is still wanted of that digit.
__device__ void find_digit(Shared& shared, int round, int wanted, int lane) {
    constexpr int LANE_BINS = SLICE / 32;
    int slice = find_lane(lane < CLUSTER ? remote_load(&shared.slice_sum[round], lane) : 0, lane, wanted);
    int counts[LANE_BINS], count = 0;
#pragma unroll
    for (int i = 0; i < LANE_BINS; ++i) {
        counts[i] = remote_load(&shared.slice_total[round][lane * LANE_BINS + i], slice);
        count += counts[i];
    }
    int found = find_lane(count, lane, wanted);
    if (lane == found) {
        int bin = LANE_BINS - 1;
#pragma unroll
        for (int i = LANE_BINS - 1; i > 0; --i) {
            if (bin == i && wanted > counts[i]) wanted -= counts[i], bin = i - 1;
        }
        shared.cut_digit = slice * SLICE + lane * LANE_BINS + bin;
        shared.cut_wanted = wanted;
    }
}

// The cut after the `wanted` best keys of the cluster that `counts_in(i)` admits. Round 0 of the histogram
// must be filled, the others zero. wanted is at least 1 and at most the number of such keys.
template <class CountsIn>
__device__ Cut find_cut(const unsigned* keys, int n, int wanted, unsigned rank, Shared& shared, CountsIn counts_in) {
    unsigned prefix = 0;
    for (int round = 0; round < 3; ++round) {
        int shift = round == 0 ? 21 : round == 1 ? 10 : 0;
        if (round > 0) {
            int fixed = round == 1 ? 21 : 10;
            unsigned mask = round == 1 ? 2047u : 1023u;
            for (int i = threadIdx.x; i < n; i += THREADS) {
                unsigned key = keys[i];
                if (key >> fixed == prefix >> fixed && counts_in(i))
                    atomicAdd(&shared.histogram[round][(key >> shift) & mask], 1u);
            }
        }
        cluster_sync();
        reduce_slice(shared, round, rank);
        cluster_sync();
        if (threadIdx.x < 32) find_digit(shared, round, wanted, threadIdx.x);
        __syncthreads();
        prefix |= shared.cut_digit << shift;
        wanted = shared.cut_wanted;
        // cut_digit is written again only after two cluster_sync().
    }
    return {prefix, wanted};
}

// Visit this CTA's tokens in order with (index, taken by the cut, taken tokens of the row before it).
// Ends with an open cluster barrier: the caller does cluster_wait() once it no longer needs to overlap.
template <class CountsIn, class Visit>
__device__ void walk(
    const unsigned* keys, int n, Cut cut, unsigned rank, Shared& shared, CountsIn counts_in, Visit visit) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int share = (n + THREADS - 1) / THREADS * 32;  // consecutive tokens a warp
    int from = warp * share, to = min(from + share, n);
    int higher = 0, ties = 0;
    for (int i = from + lane; i < to; i += 32) {
        unsigned key = counts_in(i) ? keys[i] : 0u;
        higher += key > cut.key;
        ties += key == cut.key;
    }
    higher = __reduce_add_sync(ALL, higher);
    ties = __reduce_add_sync(ALL, ties);
    if (lane == 0) shared.warp_higher[warp] = higher, shared.warp_ties[warp] = ties;
    __syncthreads();
    int warp_higher = lane < WARPS ? shared.warp_higher[lane] : 0;
    int warp_ties = lane < WARPS ? shared.warp_ties[lane] : 0;
    if (warp == 0) {
        higher = __reduce_add_sync(ALL, warp_higher);
        ties = __reduce_add_sync(ALL, warp_ties);
        if (lane == 0) shared.cta_higher = higher, shared.cta_ties = ties;
    }
    cluster_sync();
    higher = lane < warp ? warp_higher : 0;
    ties = lane < warp ? warp_ties : 0;
    if (lane < rank) {
        higher += remote_load(&shared.cta_higher, lane);
        ties += remote_load(&shared.cta_ties, lane);
    }
    higher = __reduce_add_sync(ALL, higher);
    ties = __reduce_add_sync(ALL, ties);
    cluster_arrive();  // this thread reads no other CTA's memory below
    unsigned before = (1u << lane) - 1u;
    for (int first = from; first < to; first += 32) {
        int i = first + lane;
        unsigned key = i < to && counts_in(i) ? keys[i] : 0u;
        bool is_higher = key > cut.key, is_tie = key != 0u && key == cut.key;
        unsigned all_higher = __ballot_sync(ALL, is_higher), all_ties = __ballot_sync(ALL, is_tie);
        int tie = ties + __popc(all_ties & before);
        bool taken = is_higher || (is_tie && tie < cut.ties);
        if (i < to) visit(i, taken, higher + __popc(all_higher & before) + min(tie, cut.ties));
        higher += __popc(all_higher);
        ties += __popc(all_ties);
    }
}

__device__ void clear_histograms(Shared& shared) {
    for (int i = threadIdx.x; i < 3 * BINS; i += THREADS) (&shared.histogram[0][0])[i] = 0;
    for (int i = threadIdx.x; i < 3 * SLICE; i += THREADS) (&shared.slice_total[0][0])[i] = 0;
    if (threadIdx.x < 3) shared.slice_sum[threadIdx.x] = 0;
}

// Mark the previous selection in the bit maps of the cluster; returns how many of it are selectable.
__device__ int mark_members(
    const int* previous, int previous_max, int start, int end, int share, unsigned rank, unsigned* member_bits,
    Shared& shared) {
    for (int i = threadIdx.x; i < share / 32; i += THREADS) member_bits[i] = 0;
    if (threadIdx.x == 0) shared.members = 0;
    cluster_sync();
    for (int base = rank * THREADS; base < previous_max; base += CLUSTER * THREADS) {
        int i = base + threadIdx.x;
        int token = i < previous_max ? previous[i] : -1;
        bool selectable = token >= start && token < end;
        if (selectable) {
            int owner = (token - start) / share, local = token - start - owner * share;
            remote_or(&member_bits[local >> 5], owner, 1u << (local & 31));
        }
        int found = __popc(__ballot_sync(ALL, selectable));
        if (threadIdx.x % 32 == 0 && found) atomicAdd(&shared.members, found);
    }
    cluster_sync();
    int lane = threadIdx.x & 31;
    return __reduce_add_sync(ALL, lane < CLUSTER ? (int)remote_load(&shared.members, lane) : 0);
}

// Sticky selection: drop (key 0) all tokens outside the previous selection but the `entering` best.
__device__ void drop_others(
    unsigned* keys, int n, int entering, unsigned rank, const unsigned* member_bits, Shared& shared) {
    auto other = [&](int i) { return !is_member(member_bits, i); };
    Cut cut = {ALL, 0};
    if (entering > 0) cut = find_cut(keys, n, entering, rank, shared, other);
    walk(keys, n, cut, rank, shared, other, [&](int i, bool taken, int) {
        if (!taken && other(i)) keys[i] = 0u;
    });
    cluster_wait();
    clear_histograms(shared);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) atomicAdd(&shared.histogram[0][keys[i] >> 21], 1u);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, RESIDENT)
    select_cluster(
        const float* query_labels, const float* offsets, const unsigned char* codes, const unsigned* scales,
        const int* budgets, const int* lengths, const int* previous, int* tokens, int* counts, int kv_heads,
        int capacity, int sinks, int recent, int new_rows, int previous_max, int k_max) {
    extern __shared__ __align__(16) unsigned dynamic[];
    __shared__ Shared shared;
    unsigned rank = cta_rank();
    int head = blockIdx.y, sequence = blockIdx.z;
    long long row = (long long)sequence * kv_heads + head;
    int end = max(lengths[sequence] - recent, sinks), span = end - sinks;
    int k = min(budgets[sequence], span);
    if (k > 0 && k < span) {
        int share = (span + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
        int first = sinks + rank * share, n = max(min(share, end - first), 0);
        unsigned *keys = dynamic, *member_bits = dynamic + share;
        clear_histograms(shared);
        int members = 0;
        if (STICKY) {
            members = mark_members(
                previous + row * previous_max, previous_max, sinks, end, share, rank, member_bits, shared);
        }
        __syncthreads();
        long long place = row * capacity + first;
        score_tokens(codes + place * ROW_BYTES, scales + place, query_labels + row * GROUP * CHANNELS,
                     offsets + row * GROUP, n, keys, member_bits, shared);
        __syncthreads();
        if (STICKY) {
            int entering = min(max(new_rows, k - members), k);
            drop_others(keys, n, min(entering, span - members), rank, member_bits, shared);
        }
        auto any = [](int) { return true; };
        Cut cut = find_cut(keys, n, k, rank, shared, any);
        int* target = tokens + row * k_max;
        walk(keys, n, cut, rank, shared, any, [&](int i, bool taken, int place) {
            if (taken) target[place] = first + i;
        });
        cluster_wait();  // no CTA leaves while another may read its shared memory
    } else {
        for (int i = rank * THREADS + threadIdx.x; i < k; i += CLUSTER * THREADS) tokens[row * k_max + i] = sinks + i;
    }
    for (int i = k + rank * THREADS + threadIdx.x; i < k_max; i += CLUSTER * THREADS) tokens[row * k_max + i] = -1;
    if (head == 0 && rank == 0 && threadIdx.x == 0) counts[sequence] = k;
}
