// Label scoring and exact top-k in one kernel: a thread block cluster for each (sequence, KV head).
//
// The cluster's CTAs share the selectable tokens out, so the scores never leave shared memory:
//   1. score: tensor cores multiply label codes by the group's query labels; the log-sum-exp over
//      the group becomes a uint32 key of the same order, and its top 11 bits are counted;
//   2. cut: three radix rounds of 11, 11 and 10 bits find the k-th key; each CTA adds one slice of
//      the histogram over the cluster (distributed shared memory);
//   3. walk: a prefix over CTAs and warps gives every selected token its place, in token order.
// With RESOLVE, resolve_cluster.cuh then finds the selected tokens' slots.
// Scores are in units of log 2 and differ from label_scores_reference by rounding only.
//
// Compile-time: CHANNELS (16, 32, 64, 128), BITS (4, 8, 16), GROUP (query heads a KV head),
// CLUSTER (8 or 16), STICKY and RESOLVE (0 or 1), STEPS (32-token steps a warp loads at once), PREFETCH (1: load
// the next STEPS while scoring these), RESIDENT (CTAs an SM must be able to hold, which bounds the registers).
// AHEAD: how many rounds of STRIDE tokens before their use labels are asked into the second-level cache.
// The four .cuh files go before this text (SOURCES of select_cluster.py). No includes, so that nvrtc needs no
// header path.

__device__ bool is_member(const unsigned* member_bits, int token) {
    return STICKY && (member_bits[token >> 5] >> (token & 31)) & 1;
}

constexpr int STRIDE = WARPS * 32 * STEPS;  // tokens that a CTA scores at once

// Fill keys [n] with the scores of this CTA's tokens and count their top 11 bits (members left out).
__device__ void score_tokens(
    const unsigned char* codes, const unsigned* scales, const float* query_labels, const float* offsets, int n,
    unsigned* keys, const unsigned* member_bits, Shared& shared) {
    int lane = threadIdx.x & 31, mine = 8 * (lane & 3) + (lane >> 2), base = (threadIdx.x >> 5) * 32 * STEPS;
    if (base >= n) return;
    Batch batch;
    load_batch(codes, scales, base, n, lane, batch);
    Query query;
    load_query(query_labels, offsets, lane, query);
    for (; base < n; base += STRIDE) {
        Batch next;
        if (AHEAD && threadIdx.x == 0) prefetch_labels(codes, scales, base + AHEAD * STRIDE, STRIDE, n);
        if (PREFETCH) load_batch(codes, scales, base + STRIDE, n, lane, next);
        unsigned scored[STEPS];  // all before any is stored, so that the steps' chains of arithmetic overlap
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            scored[step] = order_key(score_step(batch.words[step], batch.pair[step], query, lane));
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            int token = base + 32 * step + mine;
            if (token < n) {
                keys[token] = scored[step];
                if (!is_member(member_bits, token)) atomicAdd(&shared.histogram[0][scored[step] >> 21], 1u);
            }
        }
        if (PREFETCH) batch = next;
        else load_batch(codes, scales, base + STRIDE, n, lane, batch);
    }
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
    unsigned* keys, int n, int entering, unsigned rank, unsigned* member_bits, Shared& shared) {
    auto other = [&](int i) { return !is_member(member_bits, i); };
    Cut cut = {ALL, 0};
    if (entering > 0) cut = find_cut(keys, n, entering, shared, other);
    else cluster_wait();
    // Those that enter become members; the walk is past a token's word of bits when it sets one.
    walk(keys, n, cut, rank, shared, other, [&](int i, int, int) {
        atomicOr(&member_bits[i >> 5], 1u << (i & 31));
    });
    cluster_wait();
    clear_histograms(shared);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        if (other(i)) keys[i] = 0u;
        atomicAdd(&shared.histogram[0][keys[i] >> 21], 1u);
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, RESIDENT)
    select_cluster(
        const float* query_labels, const float* offsets, const unsigned char* codes, const unsigned* scales,
        const int* budgets, const int* lengths, const int* previous, int* tokens, int* counts, int kv_heads,
        int capacity, int sinks, int recent, int new_rows, int previous_max, int k_max
#if RESOLVE
        , int* slot_of_token, int* token_in_slot, int* stamps, int* hand, const int* step, int* miss_tokens,
        int* miss_slots, int* miss_counts, unsigned long long* counters, int n_slots, int phase
#endif
    ) {
    extern __shared__ __align__(16) unsigned dynamic[];
    __shared__ Shared shared;
    unsigned rank = cta_rank();
    int head = blockIdx.y, sequence = blockIdx.z;
    long long row = (long long)sequence * kv_heads + head;
    int end = max(lengths[sequence] - recent, sinks), span = end - sinks;
    int k = max(min(budgets[sequence], span), 0);
    bool all = k == 0 || k == span;
    if (all) span = k;
    int share = (span + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
    int first = sinks + rank * share, n = max(min(share, sinks + span - first), 0);
    unsigned *keys = dynamic, *member_bits = dynamic + share;
    // This warp's selected tokens, in order, take the place of its keys.
    int from = warp_start(threadIdx.x >> 5, n), listed = 0;
    int* target = tokens + row * k_max;
    if (!all) {
        long long place = row * capacity + first;
        codes += place * ROW_BYTES, scales += place;
        if (threadIdx.x == 0) prefetch_labels(codes, scales, 0, AHEAD * STRIDE, n);
        int members = 0;
        if (STICKY) {
            members = mark_members(
                previous + row * previous_max, previous_max, sinks, end, share, rank, member_bits, shared);
        }
        clear_histograms(shared);
        __syncthreads();
        score_tokens(codes, scales, query_labels + row * GROUP * CHANNELS, offsets + row * GROUP, n, keys,
                     member_bits, shared);
        __syncthreads();
        if (STICKY) {
            int entering = min(max(new_rows, k - members), k);
            drop_others(keys, n, min(entering, span - members), rank, member_bits, shared);
        }
        auto any = [](int) { return true; };
        Cut cut = find_cut(keys, n, k, shared, any);
        listed = walk(keys, n, cut, rank, shared, any, [&](int i, int place, int index) {
            target[place] = first + i;
            if (RESOLVE) keys[from + index] = first + i;
        });
        cluster_wait();  // no CTA leaves while another may read its shared memory
    } else {
        listed = warp_start((threadIdx.x >> 5) + 1, n) - from;
        for (int i = from + threadIdx.x % 32; i < from + listed; i += 32) {
            target[first - sinks + i] = first + i;
            if (RESOLVE) keys[i] = first + i;
        }
    }
    for (int i = k + rank * THREADS + threadIdx.x; i < k_max; i += CLUSTER * THREADS) target[i] = -1;
    if (head == 0 && rank == 0 && threadIdx.x == 0) counts[sequence] = k;
#if RESOLVE
    __shared__ ResolveShared resolve_shared;
    Resident resident = {
        slot_of_token + row * capacity, token_in_slot + row * n_slots, stamps + row * n_slots, hand + row,
        miss_tokens + row * k_max, miss_slots + row * k_max, miss_counts + row, counters + 3 * phase,
        n_slots, 2 * *step + phase, phase};
    __syncwarp();  // the list is whole
    resolve_selection(keys + from, listed, k, resident, rank, resolve_shared);
    cluster_wait();
#endif
}
