// Label scoring and exact top-k in one kernel: a thread block cluster for each (sequence, KV head).
//
// The cluster's CTAs share the selectable tokens out, so the scores never leave shared memory:
//   1. score: tensor cores multiply label codes by the group's query labels; the log-sum-exp over
//      the group becomes a uint32 key of the same order, and is counted in a histogram of scores;
//   2. choose (cluster_topk.cuh): the histogram over the cluster finds the cut to within a few tokens, which
//      all CTAs then rank; a sticky selection does so twice, first among the tokens outside of the last one;
//   3. write: a prefix over CTAs and warps gives every chosen token its place, in token order.
// Scores are in units of log 2 and differ from label_scores_reference by rounding only.
//
// Compile-time: CHANNELS (16, 32, 64, 128), BITS (4, 8, 16), GROUP (query heads a KV head), THREADS,
// CLUSTER (8 or 16), STICKY (0 or 1), STEPS (32-token steps a warp loads at once), PREFETCH (1: load the
// next STEPS while scoring these), RESIDENT (CTAs an SM must be able to hold, which bounds the registers).
// cluster.cuh, label_mma.cuh and cluster_topk.cuh go before this text. No includes: nvrtc needs no header path.

// Fill keys [n] with the scores of this CTA's tokens and count them.
__device__ void score_tokens(
    const unsigned char* codes, const unsigned* scales, const float* query_labels, const float* offsets, int n,
    unsigned* keys, Shared& shared) {
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
            float score = score_step(batch.words[step], batch.pair[step], query, lane);
            score = fmaxf(score, -3e38f);  // a NaN would have another place among bins than among keys
            int token = base + 32 * step + mine;
            if (token < n) {
                keys[token] = order_key(score);
                atomicAdd(&shared.histogram[score_bin(score)], 1u);
            }
        }
        if (PREFETCH) batch = next;
        else load_batch(codes, scales, base + STRIDE, n, lane, batch);
    }
}

// Zero the counts, and open a cluster barrier: no CTA may write another's before all are zero.
__device__ void clear_counts(Shared& shared, unsigned* member_bits, int words) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared.histogram[i] = 0;
    for (int i = threadIdx.x; i < SLICE; i += THREADS) shared.slice_total[0][i] = 0;
    for (int i = threadIdx.x; STICKY && i < words; i += THREADS) member_bits[i] = 0;
    if (threadIdx.x == 0) shared.slice_sum[0] = 0, shared.members = 0;
    cluster_publish();
}

// Mark a CTA's part of the previous selection in the bit maps of the cluster.
__device__ void mark_members(
    const int* previous, int previous_max, int start, int end, int share, unsigned rank, unsigned* member_bits,
    Shared& shared) {
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
}

// Add `count` to the histogram for each marked token.
__device__ void count_marked(Part part, const unsigned* marks, unsigned count, Shared& shared) {
    for (int word = threadIdx.x; word < (part.n + 31) / 32; word += THREADS) {
        for (unsigned bits = marks[word]; bits; bits &= bits - 1)
            atomicAdd(&shared.histogram[key_bin(part.keys[word * 32 + __ffs(bits) - 1])], count);
    }
}

// Sticky selection: add to member_bits [n / 32] the best tokens outside of it, as many as may enter, and
// leave the histogram with the tokens of member_bits. Closes no cluster barrier that it did not open.
__device__ void admit_others(
    Part part, int span, int k, int new_rows, unsigned rank, int& round, unsigned* member_bits,
    unsigned* chosen, Shared& shared) {
    int lane = threadIdx.x & 31;
    int members = __reduce_add_sync(ALL, lane < CLUSTER ? (int)remote_load(&shared.members, lane) : 0);
    int wanted = min(min(max(new_rows, k - members), k), span - members);
    auto others = [&](int word) { return ~member_bits[word]; };
    __syncthreads();
    count_marked(part, member_bits, ALL, shared);  // they were counted with the others
    Range range = find_range(part, wanted, round, shared, others);
    collect(part, range, chosen, shared, others);
    choose_listed(part, wanted, rank, chosen, shared);
    for (int i = threadIdx.x; i < (part.n + 31) / 32; i += THREADS) member_bits[i] |= chosen[i];
    count_marked(part, member_bits, 1u, shared);  // the words that this thread has just written
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, RESIDENT)
    select_cluster(
        const float* query_labels, const float* offsets, const unsigned char* codes, const unsigned* scales,
        const int* budgets, const int* lengths, const int* previous, int* tokens, int* counts, int kv_heads,
        int capacity, int sinks, int recent, int new_rows, int previous_max, int k_max) {
    extern __shared__ __align__(16) unsigned dynamic[];
    __shared__ Shared shared;
    unsigned rank = cta_rank();
    int sequence = blockIdx.z, row = sequence * kv_heads + (int)blockIdx.y;
    int end = max(lengths[sequence] - recent, sinks), span = end - sinks;
    int k = min(budgets[row], span), *target = tokens + (long long)row * k_max;
    if (k > 0 && k < span) {
        int share = (span + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
        int first = sinks + rank * share, n = max(min(share, end - first), 0);
        unsigned *keys = dynamic, *chosen = keys + share, *member_bits = chosen + share / 32;
        clear_counts(shared, member_bits, share / 32);
        if (STICKY) {
            cluster_wait();
            previous += (long long)row * previous_max;
            mark_members(previous, previous_max, sinks, end, share, rank, member_bits, shared);
            cluster_arrive();
        }
        long long place = (long long)row * capacity + first;
        score_tokens(codes + place * ROW_BYTES, scales + place, query_labels + row * GROUP * CHANNELS,
                     offsets + row * GROUP, n, keys, shared);
        cluster_wait();  // every CTA's totals are zero, and the members marked
        Part part = {keys, n, (int)rank * share};
        auto eligible = [&](int word) { return STICKY ? member_bits[word] : ALL; };
        int wanted = k, round = 0;
        if (STICKY) admit_others(part, span, k, new_rows, rank, round, member_bits, chosen, shared);
        Range range = find_range(part, wanted, round, shared, eligible);
        collect(part, range, chosen, shared, eligible);
        int lower = choose_listed(part, wanted, rank, chosen, shared);
        cluster_arrive_relaxed();  // this thread reads no other CTA's memory below
        write_chosen(chosen, n, first, target, lower, shared);
        cluster_wait();  // no CTA leaves while another may read its shared memory
    } else {
        for (int i = rank * THREADS + threadIdx.x; i < k; i += CLUSTER * THREADS) target[i] = sinks + i;
    }
    for (int i = k + rank * THREADS + threadIdx.x; i < k_max; i += CLUSTER * THREADS) target[i] = -1;
    if (rank == 0 && threadIdx.x == 0) counts[row] = k;
}
