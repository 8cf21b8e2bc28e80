// The k best keys of a cluster: where the cut through them lies, and a walk over what it takes.
//
// Keys are uint32 in the CTAs' shared memory, higher is better, equal ones go to the earliest token. Three
// radix rounds of 11, 11 and 10 bits find the cut; each CTA adds up one slice of the histogram over the cluster
// through distributed shared memory. cluster.cuh and label_mma.cuh go before this text. No includes.

constexpr int BINS = 2048;    // 11 bits: three rounds fix 32 bits, and 3 x 8 KB fit beside the keys
constexpr int SLICE = BINS / CLUSTER;

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

// Add this CTA's counts of a round to the totals, each bin's with the CTA that owns its slice.
__device__ void push_histogram(Shared& shared, int round) {
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {  // a warp's 32 bins lie in one slice
        unsigned count = shared.histogram[round][bin], sum = __reduce_add_sync(ALL, count);
        if (count) remote_add(&shared.slice_total[round][bin % SLICE], bin / SLICE, count);
        if (sum && threadIdx.x % 32 == 0) remote_add(&shared.slice_sum[round], bin / SLICE, sum);
    }
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
// must be filled, the others zero. wanted is at least 1 and at most the number of such keys. Closes the
// cluster barrier that clear_histograms() opened.
template <class CountsIn>
__device__ Cut find_cut(const unsigned* keys, int n, int wanted, Shared& shared, CountsIn counts_in) {
    unsigned prefix = 0;
    cluster_wait();  // every CTA's totals are zero
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
        __syncthreads();
        push_histogram(shared, round);
        cluster_sync();
        if (threadIdx.x < 32) find_digit(shared, round, wanted, threadIdx.x);
        __syncthreads();
        prefix |= shared.cut_digit << shift;
        wanted = shared.cut_wanted;
        // cut_digit is written again only after the next cluster_sync().
    }
    return {prefix, wanted};
}

// The consecutive tokens of a CTA's n that warp `warp` takes begin here.
__device__ int warp_start(int warp, int n) { return min((n + THREADS - 1) / THREADS * 32 * warp, n); }

// Visit the tokens of this CTA that the cut takes, in order, with (index, taken tokens of the row before it,
// those of them that this warp takes). Returns how many this warp takes. Ends with an open cluster barrier: the caller
// does cluster_wait() once it no longer needs to overlap.
template <class CountsIn, class Visit>
__device__ int walk(
    const unsigned* keys, int n, Cut cut, unsigned rank, Shared& shared, CountsIn counts_in, Visit visit) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int from = warp_start(warp, n), to = warp_start(warp + 1, n);
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
    int start = higher + min(ties, cut.ties);
    for (int first = from; first < to; first += 32) {
        int i = first + lane;
        unsigned key = i < to && counts_in(i) ? keys[i] : 0u;
        bool is_higher = key > cut.key, is_tie = key != 0u && key == cut.key;
        unsigned all_higher = __ballot_sync(ALL, is_higher), all_ties = __ballot_sync(ALL, is_tie);
        if (!(all_higher | all_ties)) continue;  // most groups of 32: a selection is a small part of the tokens
        int tie = ties + __popc(all_ties & before);
        bool taken = is_higher || (is_tie && tie < cut.ties);
        int place = higher + __popc(all_higher & before) + min(tie, cut.ties);
        if (taken) visit(i, place, place - start);
        higher += __popc(all_higher);
        ties += __popc(all_ties);
    }
    return higher + min(ties, cut.ties) - start;
}

// Zero the counts, and open a cluster barrier: no CTA may add to the totals before all are zero.
__device__ void clear_histograms(Shared& shared) {
    for (int i = threadIdx.x; i < 3 * BINS; i += THREADS) (&shared.histogram[0][0])[i] = 0;
    for (int i = threadIdx.x; i < 3 * SLICE; i += THREADS) (&shared.slice_total[0][0])[i] = 0;
    if (threadIdx.x < 3) shared.slice_sum[threadIdx.x] = 0;
    cluster_arrive();
}
