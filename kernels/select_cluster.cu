// Label scoring and exact top-k in one kernel: a thread block cluster for each (sequence, KV head).
//
// The cluster's CTAs share the selectable tokens out, so the scores never leave shared memory:
//   1. score: tensor cores multiply label codes by the group's query labels; the log-sum-exp over
//      the group becomes a uint32 key of the same order, and is counted in a histogram of scores;
//   2. choose (cluster_topk.cuh): the histogram over the cluster finds the cut to within a few tokens, which
//      all CTAs then rank;
//   3. write: a prefix over CTAs and warps gives every chosen token its place, in token order.
// Scores are in units of log 2 and differ from label_scores_reference by rounding only.
//
// Compile-time: CHANNELS (16, 32, 64, 128), BITS (4, 8, 16), GROUP (query heads a KV head), THREADS,
// CLUSTER (8 or 16), STEPS (32-token steps a warp loads at once), RESIDENT_THREADS (that an SM must be able to hold,
// which bounds the registers). cluster.cuh, order_key.cuh, label_mma.cuh, cluster_topk.cuh and score_tokens.cuh go
// before this text. No includes: nvrtc needs no header path.

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, RESIDENT_THREADS / THREADS)
    select_cluster(
        const float* query_labels, const float* offsets, const unsigned char* codes, const unsigned* scales,
        const int* budgets, const int* lengths, int* tokens, int* counts, int kv_heads, int capacity, int sinks,
        int recent, int k_max) {
    extern __shared__ __align__(16) unsigned dynamic[];
    __shared__ Shared shared;
    wait_for_inputs();
    unsigned rank = cta_rank();
    int sequence = blockIdx.z, row = sequence * kv_heads + (int)blockIdx.y;
    int end = max(lengths[sequence] - recent, sinks), span = end - sinks;
    int k = min(budgets[row], span), *target = tokens + (long long)row * k_max;
    if (k > 0 && k < span) {
        int share = (span + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
        int first = sinks + rank * share, n = max(min(share, end - first), 0);
        unsigned *keys = dynamic, *chosen = keys + share;
        auto all = [](int) { return ALL; };
        clear_counts(shared);
        long long place = (long long)row * capacity + first;
        score_tokens(codes + place * ROW_BYTES, scales + place, query_labels + row * GROUP * CHANNELS,
                     offsets + row * GROUP, n, keys, shared, all);
        Part part = {keys, n, (int)rank * share};
        int lower = choose_best(part, k, rank, chosen, shared, all);
        cluster_arrive_relaxed();  // this thread reads no other CTA's memory below
        for_each_marked(chosen, n, lower, shared, [&](int to, int i) { target[to] = first + i; });
        cluster_wait();  // no CTA leaves while another may read its shared memory
    } else {
        for (int i = rank * THREADS + threadIdx.x; i < k; i += CLUSTER * THREADS) target[i] = sinks + i;
    }
    for (int i = k + rank * THREADS + threadIdx.x; i < k_max; i += CLUSTER * THREADS) target[i] = -1;
    if (rank == 0 && threadIdx.x == 0) counts[row] = k;
}
