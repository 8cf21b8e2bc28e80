// Sticky selection's first part: score by label, admit the best tokens that are no members, list the candidates.
//
// A thread block cluster for each (sequence, KV head), scoring and choosing as select_cluster.cu does. What may
// enter is known here, before the selection is (choose_cluster.cu): its rows can be on their way meanwhile.
// Scores are in units of log 2 and differ from label_scores_reference by rounding only.
//
// Compile-time: as in select_cluster.cu. cluster.cuh, order_key.cuh, label_mma.cuh, cluster_topk.cuh,
// score_tokens.cuh and member_bits.cuh go before this text. No includes: nvrtc needs no header path.

// Warp 0: the members in lower CTAs to shared.lower_members, after a barrier since they were counted. What it reads
// of other CTAs has arrived at the next __syncthreads, since it is stored.
__device__ void count_lower_members(unsigned rank, Shared& shared) {
    int lane = threadIdx.x;
    int lower = __reduce_add_sync(ALL, lane < (int)rank ? (int)remote_load(&shared.members, lane) : 0);
    if (lane == 0) shared.lower_members = lower;
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, RESIDENT)
    admit_cluster(
        const float* query_labels, const float* offsets, const unsigned char* codes, const unsigned* scales,
        const int* budgets, const int* lengths, unsigned char* history, int* entering, int* entering_counts,
        int* candidates, float* candidate_scores, int* candidate_counts, int kv_heads, int capacity, int pitch,
        int sinks, int recent, int new_rows, int attended, int k_max, int listed_max) {
    extern __shared__ __align__(16) unsigned dynamic[];
    __shared__ Shared shared;
    unsigned rank = cta_rank();
    int sequence = blockIdx.z, row = sequence * kv_heads + (int)blockIdx.y;
    int end = max(lengths[sequence] - recent, sinks), span = end - sinks, k = min(budgets[row], span);
    int share = (span + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
    int first = sinks + rank * share, n = max(min(share, end - first), 0);
    unsigned *keys = dynamic, *chosen = keys + share, *member_bits = chosen + share / 32;
    history += (long long)row * pitch + rank * share;
    entering += (long long)row * k_max;
    candidates += (long long)row * listed_max, candidate_scores += (long long)row * listed_max;

    clear_counts(shared);
    count_ages(history, n, shared);
    cluster_publish();
    long long place = (long long)row * capacity + first;
    score_tokens(codes + place * ROW_BYTES, scales + place, query_labels + row * GROUP * CHANNELS,
                 offsets + row * GROUP, n, keys, shared);
    cluster_wait();  // every CTA's totals are zero, and the ages counted
    if (threadIdx.x < 32) find_remembered(shared, 2 * k - new_rows);
    __syncthreads();
    Part part = {keys, n, (int)rank * share};
    load_members(part, history, attended, member_bits, shared);

    auto others = [&](int word) { return ~member_bits[word]; };
    int members = shared.all_members, round = 0;
    int admitted = max(min(min(max(new_rows, k - members), k), span - members), 0), wanted = admitted;
    Range range = find_range(part, wanted, round, shared, others);
    if (threadIdx.x < 32) count_lower_members(rank, shared);
    collect(part, range, chosen, shared, others);
    int lower = choose_listed(part, wanted, rank, chosen, shared);
    cluster_arrive_relaxed();  // this thread reads no other CTA's memory below
    for_each_marked(chosen, n, lower, shared, [&](int to, int i) { entering[to] = first + i; });
    for (int i = threadIdx.x; i < (n + 31) / 32; i += THREADS) member_bits[i] |= chosen[i];
    __syncthreads();
    for_each_marked(member_bits, n, lower + shared.lower_members, shared, [&](int to, int i) {
        candidates[to] = first + i, candidate_scores[to] = key_score(keys[i]);
    });
    if (rank == 0 && threadIdx.x == 0)
        entering_counts[row] = admitted, candidate_counts[row] = members + admitted;
    cluster_wait();  // no CTA leaves while another may read its shared memory
}
