// Exact selection of the best tokens of a cluster, whose CTAs each hold the keys of a part of them.
//
// Tokens are ordered by (key descending, token ascending), as one 64-bit number that no two share. The CTAs
// add their histograms up, which leaves a range of that order with the cut in it and at most LIST tokens
// in the range. All CTAs read all of those and rank them; what lies above the range is chosen as it is.
// The first histogram has bins of a fixed width in score, so that it can be counted as scores appear;
// each further one (scores that hardly differ) splits the range that the last one left.
//
// Compile-time: CLUSTER and THREADS, as in select_cluster.cu. cluster.cuh and order_key.cuh go before this text.

constexpr int WARPS = THREADS / 32;
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS;  // 12 take 3 us longer, and 7 in a sticky selection (H100)
constexpr int SLICE = BINS / CLUSTER;  // the bins that a CTA adds up for the cluster
constexpr int AGES = 8;                // steps that a token's byte of history remembers
constexpr int LIST = 256;              // ranking n tokens takes n^2 comparisons: 65,536 are 1 us of one SM
// Scores are log 2 of a weight over the recent tokens': bins of 1/32 from 2^-56 of it (nothing) to 2^8.
constexpr float BINS_A_UNIT = BINS / 64.f, LOWEST = -56.f;

struct Shared {
    unsigned histogram[BINS];             // zero outside of counting
    unsigned slice_total[3][SLICE];       // this CTA's slice of the bins, summed over the cluster; round % 3
    unsigned slice_sum[3];
    unsigned long long list[LIST];        // of this CTA's tokens, those in the range; read by the other CTAs
    unsigned long long cluster_list[LIST];
    int listed, higher;                   // this CTA's tokens in and above the range; read by the other CTAs
    int ages[AGES];                       // of sticky selection: this CTA's tokens selected 1, 2, ... steps ago
    int members, lower_members, all_members;  // and the members among this CTA's, lower CTAs' and all tokens
    unsigned remembered;                  // bits of the steps whose tokens are members
    int warp_marked[WARPS];
    unsigned digit;                       // the bin with the cut, what is wanted of it, and its tokens
    int wanted, inside;
};

// A part of the order, both ends included.
struct Range {
    unsigned long long low, high;
};

// This CTA's part of the tokens: the cluster's tokens position, position + 1, ..., position + n - 1.
struct Part {
    const unsigned* keys;
    int n, position;
};

__device__ unsigned long long order_of(Part part, int i) {
    return (unsigned long long)part.keys[i] << 32 | ~(unsigned)(part.position + i);
}

__device__ unsigned score_bin(float score) {
    float x = fminf(fmaxf(score, LOWEST), LOWEST + (BINS - 1) / BINS_A_UNIT);
    // 2^23 + bin, rounded half to even: the addition is the only rounding, since BINS_A_UNIT is a power of 2
    return __float_as_int(x * BINS_A_UNIT + (8388608.f - LOWEST * BINS_A_UNIT)) & (BINS - 1);
}

__device__ unsigned key_bin(unsigned key) { return score_bin(key_score(key)); }

// The lowest place in the order of a bin; of bin BINS, one past the highest (which wraps to 0).
__device__ unsigned long long bin_start(unsigned bin) {
    if (bin == 0 || bin == BINS) return 0;
    unsigned key = order_key(((float)bin - 0.5f) / BINS_A_UNIT + LOWEST);
    return (unsigned long long)(key + (bin & 1)) << 32;  // an odd bin's edge rounds down to the even one
}

// Zero the counts. No CTA may write another's before a cluster barrier.
__device__ void clear_counts(Shared& shared) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared.histogram[i] = 0;
    for (int i = threadIdx.x; i < SLICE; i += THREADS) shared.slice_total[0][i] = 0;
    if (threadIdx.x == 0) shared.slice_sum[0] = 0, shared.members = 0;
    if (threadIdx.x < AGES) shared.ages[threadIdx.x] = 0;
    __syncthreads();  // ages are counted before the cluster's barrier ends
}

// Add this CTA's counts to the totals, each bin's with the CTA that owns its slice, and zero them.
__device__ void push_histogram(Shared& shared, int round) {
    constexpr int EACH = BINS / THREADS;
    static_assert(SLICE % (32 * EACH) == 0, "a warp's bins lie in one slice");
    int lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * 32 * EACH, owner = first / SLICE;
    unsigned* counts = &shared.histogram[first + lane];
    unsigned* totals = &shared.slice_total[round % 3][first % SLICE + lane];
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        unsigned count = counts[32 * i];
        counts[32 * i] = 0;
        if (count) remote_add(&totals[32 * i], owner, count);
        sum += count;
    }
    sum = __reduce_add_sync(ALL, sum);
    if (sum && lane == 0) remote_add(&shared.slice_sum[round % 3], owner, sum);
    // The next round's totals were last read two rounds ago, before the cluster's last barrier.
    for (int i = threadIdx.x; i < SLICE; i += THREADS) shared.slice_total[(round + 1) % 3][i] = 0;
    if (threadIdx.x == 0) shared.slice_sum[(round + 1) % 3] = 0;
}

// Among 32 counts (one a lane, ascending digits): the lane that holds the wanted-th from the top, and
// what is still wanted within it. With none wanted: the highest lane that holds any.
__device__ int find_lane(int count, int lane, int& wanted) {
    int at_least = count;
    for (int i = 1; i < 32; i <<= 1) {
        int above = __shfl_down_sync(ALL, at_least, i);
        if (lane + i < 32) at_least += above;
    }
    unsigned holds = __ballot_sync(ALL, at_least >= max(wanted, 1));
    int found = holds ? 31 - __clz(holds) : 0;
    wanted -= __shfl_sync(ALL, at_least - count, found);
    return found;
}

// Warp 0: the bin of a round's cut, how many tokens are still wanted of it, and how many it has.
__device__ void find_digit(Shared& shared, int round, int wanted, int lane) {
    constexpr int LANE_BINS = SLICE / 32;
    int slice = find_lane(lane < CLUSTER ? remote_load(&shared.slice_sum[round % 3], lane) : 0, lane, wanted);
    int counts[LANE_BINS], count = 0;
#pragma unroll
    for (int i = 0; i < LANE_BINS; ++i) {
        counts[i] = remote_load(&shared.slice_total[round % 3][lane * LANE_BINS + i], slice);
        count += counts[i];
    }
    if (lane == find_lane(count, lane, wanted)) {
        int bin = LANE_BINS - 1, inside = counts[LANE_BINS - 1];
#pragma unroll
        for (int i = LANE_BINS - 1; i > 0; --i) {
            if (bin == i && wanted > counts[i]) wanted -= counts[i], bin = i - 1, inside = counts[i - 1];
        }
        shared.digit = slice * SLICE + lane * LANE_BINS + bin;
        shared.wanted = wanted, shared.inside = inside;
        shared.listed = 0, shared.higher = 0;
    }
}

// A range of at most LIST tokens that has the wanted-th best in it; wanted becomes what is wanted of the
// range. eligible(i / 32) has a bit for each token that counts; the histogram holds them by score_bin.
template <class Eligible>
__device__ Range find_range(Part part, int& wanted, Shared& shared, Eligible eligible) {
    Range range = {};
    for (int round = 0, shift = -1;; ++round) {
        __syncthreads();
        push_histogram(shared, round);
        cluster_sync();
        if (threadIdx.x < 32) find_digit(shared, round, wanted, threadIdx.x);
        __syncthreads();
        wanted = shared.wanted;
        if (shift < 0) {
            range = {bin_start(shared.digit), bin_start(shared.digit + 1) - 1};
        } else {
            range.low += (unsigned long long)shared.digit << shift;
            range.high = min(range.high, range.low + ((1ull << shift) - 1));
        }
        if (shared.inside <= LIST) return range;
        shift = max(64 - BIN_BITS - __clzll((long long)(range.high - range.low)), 0);
        for (int i = threadIdx.x; i < part.n; i += THREADS) {
            unsigned long long order = order_of(part, i);
            if (order >= range.low && order <= range.high && (eligible(i >> 5) >> (i & 31) & 1))
                atomicAdd(&shared.histogram[(order - range.low) >> shift], 1u);
        }
    }
}

// Bits of this CTA's tokens above the range to chosen [n / 32], those in the range to the list.
template <class Eligible>
__device__ void collect(Part part, Range range, unsigned* chosen, Shared& shared, Eligible eligible) {
    int lane = threadIdx.x & 31, words = (part.n + 31) / 32, higher = 0;
    for (int first = threadIdx.x - lane; first < words; first += THREADS) {  // 32 words a warp, one a lane
        unsigned above = 0, inside = 0;
#pragma unroll 2
        for (int j = 0; j < min(32, words - first); ++j) {
            unsigned long long order = order_of(part, (first + j) * 32 + lane);
            unsigned all_above = __ballot_sync(ALL, order > range.high);
            unsigned all_from_low = __ballot_sync(ALL, order >= range.low);
            if (lane == j) above = all_above, inside = all_from_low & ~all_above;
        }
        int word = first + lane, left = part.n - word * 32;
        if (left <= 0) continue;
        unsigned counts = left < 32 ? eligible(word) & ((1u << left) - 1) : eligible(word);
        chosen[word] = above & counts;
        higher += __popc(above & counts);
        for (inside &= counts; inside; inside &= inside - 1)
            shared.list[atomicAdd(&shared.listed, 1)] = order_of(part, word * 32 + __ffs(inside) - 1);
    }
    higher = __reduce_add_sync(ALL, higher);
    if (lane == 0 && higher) atomicAdd(&shared.higher, higher);
}

// Complete chosen [n / 32] with the `wanted` best of the listed tokens; returns how many tokens are chosen
// in lower CTAs. Reads other CTAs' memory up to its first __syncthreads.
__device__ int choose_listed(Part part, int wanted, unsigned rank, unsigned* chosen, Shared& shared) {
    static_assert(WARPS >= CLUSTER, "a warp copies a CTA's list");
    static_assert(THREADS >= 2 * LIST, "two threads rank a token");
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    cluster_publish();
    cluster_wait();
    int count = lane < CLUSTER ? (int)remote_load(&shared.listed, lane) : 0;
    int higher = lane < (int)rank ? (int)remote_load(&shared.higher, lane) : 0;
    int upto = count;
    for (int i = 1; i < CLUSTER; i <<= 1) {
        int lower = __shfl_up_sync(ALL, upto, i);
        if (lane >= i) upto += lower;
    }
    int total = __shfl_sync(ALL, upto, CLUSTER - 1);
    int mine_end = __shfl_sync(ALL, upto, rank), mine = mine_end - __shfl_sync(ALL, count, rank);
    int cta = warp % CLUSTER, end = __shfl_sync(ALL, upto, cta), start = end - __shfl_sync(ALL, count, cta);
    for (int i = lane; warp < CLUSTER && start + i < end; i += 32)
        shared.cluster_list[start + i] = remote_load_u64(&shared.list[i], cta);
    __syncthreads();
    int candidate = threadIdx.x >> 1, half = threadIdx.x & 1, above = 0;
    unsigned long long order = candidate < total ? shared.cluster_list[candidate] : 0;
    for (int i = half; candidate < total && i < total; i += 2) above += shared.cluster_list[i] > order;
    above += __shfl_xor_sync(ALL, above, 1);
    bool taken = half == 0 && candidate < total && above < wanted;
    if (taken && candidate >= mine && candidate < mine_end) {
        unsigned i = ~(unsigned)order - part.position;
        atomicOr(&chosen[i >> 5], 1u << (i & 31));
    }
    return __reduce_add_sync(ALL, higher) + __syncthreads_count(taken && candidate < mine);
}

// Mark those of this CTA's tokens that are among the cluster's `wanted` best of the eligible in chosen [n / 32];
// returns how many are chosen in lower CTAs. The histogram holds the eligible ones; once in a kernel.
template <class Eligible>
__device__ int choose_best(
    Part part, int wanted, unsigned rank, unsigned* chosen, Shared& shared, Eligible eligible) {
    Range range = find_range(part, wanted, shared, eligible);
    collect(part, range, chosen, shared, eligible);
    return choose_listed(part, wanted, rank, chosen, shared);
}

// Call put(place, i) for this CTA's tokens i that are marked [n / 32], in order, from `place` on; returns the
// place after the last. All threads have put theirs then.
template <class Put>
__device__ int for_each_marked(const unsigned* marks, int n, int place, Shared& shared, Put put) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, words = (n + 31) / 32;
    for (int base = 0; base < words; base += THREADS) {
        int word = base + threadIdx.x;
        unsigned bits = word < words ? marks[word] : 0u;
        int count = __popc(bits), upto = count;
        for (int i = 1; i < 32; i <<= 1) {
            int lower = __shfl_up_sync(ALL, upto, i);
            if (lane >= i) upto += lower;
        }
        if (lane == 31) shared.warp_marked[warp] = upto;
        __syncthreads();
        int of_warp = lane < WARPS ? shared.warp_marked[lane] : 0;
        int to = place + __reduce_add_sync(ALL, lane < warp ? of_warp : 0) + upto - count;
        for (; bits; bits &= bits - 1) put(to++, word * 32 + __ffs(bits) - 1);
        place += __reduce_add_sync(ALL, of_warp);
        __syncthreads();
    }
    return place;
}
