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
// cluster.cuh and label_mma.cuh go before this text. No includes, so that nvrtc needs no header path.

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
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

__device__ bool is_member(const unsigned* member_bits, int token) {
    return STICKY && (member_bits[token >> 5] >> (token & 31)) & 1;
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

// Zero the counts, and open a cluster barrier: no CTA may add to the totals before all are zero.
__device__ void clear_histograms(Shared& shared) {
    for (int i = threadIdx.x; i < 3 * BINS; i += THREADS) (&shared.histogram[0][0])[i] = 0;
    for (int i = threadIdx.x; i < 3 * SLICE; i += THREADS) (&shared.slice_total[0][0])[i] = 0;
    if (threadIdx.x < 3) shared.slice_sum[threadIdx.x] = 0;
    cluster_arrive();
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
    if (entering > 0) cut = find_cut(keys, n, entering, shared, other);
    else cluster_wait();
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
    int k = min(budgets[row], span);
    if (k > 0 && k < span) {
        int share = (span + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
        int first = sinks + rank * share, n = max(min(share, end - first), 0);
        unsigned *keys = dynamic, *member_bits = dynamic + share;
        int members = 0;
        if (STICKY) {
            members = mark_members(
                previous + row * previous_max, previous_max, sinks, end, share, rank, member_bits, shared);
        }
        clear_histograms(shared);
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
        Cut cut = find_cut(keys, n, k, shared, any);
        int* target = tokens + row * k_max;
        walk(keys, n, cut, rank, shared, any, [&](int i, bool taken, int place) {
            if (taken) target[place] = first + i;
        });
        cluster_wait();  // no CTA leaves while another may read its shared memory
    } else {
        for (int i = rank * THREADS + threadIdx.x; i < k; i += CLUSTER * THREADS) tokens[row * k_max + i] = sinks + i;
    }
    for (int i = k + rank * THREADS + threadIdx.x; i < k_max; i += CLUSTER * THREADS) tokens[row * k_max + i] = -1;
    if (rank == 0 && threadIdx.x == 0) counts[row] = k;
}
