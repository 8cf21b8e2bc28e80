// Exact selection of the best tokens of a cluster, whose CTAs each hold the keys of a part of them.
//
// Tokens are ordered by (key descending, token ascending), as one 64-bit number that no two share. The CTAs
// add their histograms up, which leaves a range of that order with the cut in it and at most LIST tokens
// in the range. Every CTA reads all of those and ranks its own among them; what lies above the range is chosen
// as it is. The first histogram has bins of a fixed width in score, so that it can be counted as scores appear;
// each further one (scores that hardly differ) splits the range that the last one left.
//
// Compile-time: CLUSTER and THREADS, as in select_cluster.cu. cluster.cuh and order_key.cuh go before this text.

constexpr int WARPS = THREADS / 32;
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS;  // 12 take 3 us longer, and 7 in a sticky selection (H100)
constexpr int SLICES = 32, SLICE = BINS / SLICES;  // of the histogram: summed first, and one read bin by bin
// A bin of 262,144 random tokens has up to a thousand: a second histogram and pass over the keys would be 10 us.
constexpr int LIST = 1024;
// Scores are log 2 of a weight over the recent tokens': bins of 1/64 from 2^-32 of it to 1. A cut beyond them takes a
// second histogram. The best 16th and the best 128th of a head's tokens end between -21.5 and -2.5 (SmolLM2, 8,000
// tokens) and between -38.7 and -5.9, 2% of them below -32 (the embedded model, 16,384 tokens).
constexpr float BINS_A_UNIT = BINS / 32.f, LOWEST = -32.f;

struct Shared {
    // Of this CTA's tokens, read by the other CTAs; then the cluster's list. One bin more, for what does not count.
    alignas(8) unsigned histogram[BINS + 2];
    int slice_count[SLICES];              // and how many are in each slice of the bins
    int total[SLICES], bin_total[SLICE];  // the cluster's of each slice, and of each bin of the slice with the cut
    unsigned long long list[LIST];        // of this CTA's tokens, those in the range; read by the other CTAs
    int listed, chosen;                   // how many those are, and this CTA's chosen ones; read by the others
    int lower_chosen;                     // the chosen ones of lower CTAs
    int warp_marked[WARPS];
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

// Zero the counts of this CTA.
__device__ void clear_histogram(Shared& shared) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared.histogram[i] = 0;
    if (threadIdx.x < SLICES) shared.total[threadIdx.x] = 0;
    if (threadIdx.x < SLICE) shared.bin_total[threadIdx.x] = 0;
}

__device__ void clear_counts(Shared& shared) {
    clear_histogram(shared);
    if (threadIdx.x == 0) shared.listed = 0, shared.chosen = 0;
    __syncthreads();
}

// How many tokens are in each slice of this CTA's histogram.
__device__ void count_slices(Shared& shared) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int slice = warp; slice < SLICES; slice += WARPS) {
        int count = 0;
#pragma unroll
        for (int i = lane; i < SLICE; i += 32) count += shared.histogram[slice * SLICE + i];
        count = __reduce_add_sync(ALL, count);
        if (lane == 0) shared.slice_count[slice] = count;
    }
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

// The bin with a histogram's cut, what is still wanted of it, and its tokens in all CTAs.
struct Cut {
    int bin, wanted, inside;
};

// Find the cut in the cluster's histogram, whose CTAs have published theirs. Every warp finds it.
__device__ Cut find_cut(Shared& shared, int wanted) {
    static_assert(WARPS % CLUSTER == 0, "as many warps read each CTA's counts");
    static_assert(SLICE == 64, "a lane holds two bins of a slice");
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, cta = warp % CLUSTER;
    if (warp < CLUSTER) atomicAdd(&shared.total[lane], (int)remote_load(&shared.slice_count[lane], cta));
    __syncthreads();
    int slice = find_lane(shared.total[lane], lane, wanted);
    for (int i = warp / CLUSTER * 32 + lane; i < SLICE; i += WARPS / CLUSTER * 32)
        atomicAdd(&shared.bin_total[i], (int)remote_load(&shared.histogram[slice * SLICE + i], cta));
    __syncthreads();
    int low = shared.bin_total[2 * lane], high = shared.bin_total[2 * lane + 1];
    int found = find_lane(low + high, lane, wanted);
    low = __shfl_sync(ALL, low, found), high = __shfl_sync(ALL, high, found);
    bool upper = wanted <= high;
    return {slice * SLICE + 2 * found + upper, upper ? wanted : wanted - high, upper ? high : low};
}

// A range of at most LIST tokens that has the wanted-th best in it; wanted becomes what is wanted of the
// range. eligible(i / 32) has a bit for each token that counts; the histogram holds them by score_bin.
template <class Eligible>
__device__ Range find_range(Part part, int& wanted, Shared& shared, Eligible eligible) {
    Range range = {};
    for (int shift = -1;;) {
        __syncthreads();
        count_slices(shared);
        cluster_publish();
        cluster_wait();
        Cut cut = find_cut(shared, wanted);
        wanted = cut.wanted;
        if (shift < 0) {
            range = {bin_start(cut.bin), bin_start(cut.bin + 1) - 1};
        } else {
            range.low += (unsigned long long)cut.bin << shift;
            range.high = min(range.high, range.low + ((1ull << shift) - 1));
        }
        if (cut.inside <= LIST) return range;
        shift = max(64 - BIN_BITS - __clzll((long long)(range.high - range.low)), 0);
        cluster_sync();  // every CTA has read this one's counts
        clear_histogram(shared);
        __syncthreads();
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
    unsigned low = range.low >> 32, high = range.high >> 32;  // keys; only tokens of these two need the whole order
    for (int first = threadIdx.x - lane; first < words; first += THREADS) {  // 32 words a warp, one a lane
        unsigned above = 0, inside = 0;
#pragma unroll 4
        for (int j = 0; j < min(32, words - first); ++j) {
            unsigned key = part.keys[(first + j) * 32 + lane];
            unsigned all_above = __ballot_sync(ALL, key > high), all_from_low = __ballot_sync(ALL, key >= low);
            if (lane == j) above = all_above, inside = all_from_low & ~all_above;
        }
        int word = first + lane, left = part.n - word * 32;
        if (left <= 0) continue;
        unsigned counts = left < 32 ? eligible(word) & ((1u << left) - 1) : eligible(word);
        above &= counts;
        for (inside &= counts; inside; inside &= inside - 1) {
            unsigned long long order = order_of(part, word * 32 + __ffs(inside) - 1);
            if (order > range.high) above |= inside & -inside;
            else if (order >= range.low) shared.list[atomicAdd(&shared.listed, 1)] = order;
        }
        chosen[word] = above;
        higher += __popc(above);
    }
    higher = __reduce_add_sync(ALL, higher);
    if (lane == 0 && higher) atomicAdd(&shared.chosen, higher);
}

// All CTAs' listed tokens, in any order, to list [LIST]; returns how many they are. Complete at the next
// __syncthreads.
__device__ int copy_lists(unsigned long long* list, Shared& shared) {
    static_assert(WARPS % CLUSTER == 0, "as many warps copy each CTA's list");
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, cta = warp % CLUSTER;
    int count = lane < CLUSTER ? (int)remote_load(&shared.listed, lane) : 0, upto = count;
    for (int i = 1; i < CLUSTER; i <<= 1) {
        int lower = __shfl_up_sync(ALL, upto, i);
        if (lane >= i) upto += lower;
    }
    int n = __shfl_sync(ALL, count, cta), start = __shfl_sync(ALL, upto, cta) - n;
    for (int i = warp / CLUSTER * 32 + lane; i < n; i += WARPS / CLUSTER * 32)
        list[start + i] = remote_load_u64(&shared.list[i], cta);
    return __shfl_sync(ALL, upto, CLUSTER - 1);
}

// Complete chosen [n / 32] with this CTA's of the `wanted` best of the listed tokens; returns how many tokens are
// chosen in lower CTAs. What it reads of other CTAs has arrived.
__device__ int choose_listed(Part part, int wanted, unsigned rank, unsigned* chosen, Shared& shared) {
    static_assert(sizeof(shared.histogram) >= sizeof(shared.list), "the histogram's place is the cluster's list");
    unsigned long long* list = (unsigned long long*)shared.histogram;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, taken = 0;
    cluster_publish();
    cluster_wait();
    int total = copy_lists(list, shared);
    __syncthreads();
    for (int mine = warp; mine < shared.listed; mine += WARPS) {
        unsigned long long order = shared.list[mine];
        int above = 0;
        for (int i = lane; i < total; i += 32) above += list[i] > order;
        if (__reduce_add_sync(ALL, above) >= wanted) continue;
        unsigned i = ~(unsigned)order - part.position;
        if (lane == 0) atomicOr(&chosen[i >> 5], 1u << (i & 31));
        ++taken;
    }
    if (lane == 0 && taken) atomicAdd(&shared.chosen, taken);
    cluster_publish();
    cluster_wait();
    if (warp == 0) {
        int lower = __reduce_add_sync(ALL, lane < (int)rank ? (int)remote_load(&shared.chosen, lane) : 0);
        if (lane == 0) shared.lower_chosen = lower;
    }
    __syncthreads();
    return shared.lower_chosen;
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
// place after the last. All threads have put theirs then. A lane puts a token of its own, so that what is written
// together lies together.
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
        for (unsigned marked = __ballot_sync(ALL, bits != 0); marked; marked &= marked - 1) {
            int j = __ffs(marked) - 1;
            unsigned of_word = __shfl_sync(ALL, bits, j);
            int start = __shfl_sync(ALL, to, j);
            if (of_word >> lane & 1) put(start + __popc(of_word & ((1u << lane) - 1u)), (word - lane + j) * 32 + lane);
        }
        place += __reduce_add_sync(ALL, of_warp);
        __syncthreads();
    }
    return place;
}
