// Sticky selection's second part: the best of the candidates that admit_cluster.cu listed, in token order, and
// the stamps of their slots.
//
// A thread block cluster for each (sequence, KV head), choosing as select_cluster.cu does.
//
// Compile-time: THREADS, CLUSTER. cluster.cuh, order_key.cuh, cluster_topk.cuh and resolve_list.cuh go
// before this text. No includes: nvrtc needs no header path.

// Fill keys [n] with those of the scores and count them.
__device__ void load_keys(const float* scores, int n, unsigned* keys, Shared& shared) {
    for (int i = threadIdx.x; i < n; i += THREADS) {
        float score = scores[i];
        keys[i] = order_key(score);
        atomicAdd(&shared.histogram[score_bin(score)], 1u);
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) choose_cluster(
    const int* candidates, const float* candidate_scores, const int* candidate_counts, const int* budgets,
    unsigned char* history, int* tokens, int* counts, const int* slot_of_token, Stamp* stamps, const int* step,
    unsigned long long* counters, int kv_heads, int listed_max, int pitch, int sinks, int attended, int k_max,
    int capacity, int n_slots, int phase) {
    extern __shared__ __align__(16) unsigned dynamic[];
    __shared__ Shared shared;
    unsigned rank = cta_rank();
    long long row = (long long)blockIdx.z * kv_heads + blockIdx.y;
    int count = candidate_counts[row], k = min(budgets[row], count);
    int share = (count + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
    int first = rank * share, n = max(min(share, count - first), 0);
    unsigned *keys = dynamic, *chosen = keys + share;
    candidates += row * listed_max, candidate_scores += row * listed_max;
    history += row * pitch, tokens += row * k_max;
    slot_of_token += row * capacity, stamps += row * n_slots;
    counters += blockIdx.z * 8 + phase * 4;  // [B, 2, 4]
    int now = *step;

    clear_counts(shared);
    cluster_publish();
    load_keys(candidate_scores + first, n, keys, shared);
    cluster_wait();  // every CTA's totals are zero
    Part part = {keys, n, first};
    auto all = [](int) { return ALL; };
    int wanted = k, round = 0;
    Range range = find_range(part, wanted, round, shared, all);
    collect(part, range, chosen, shared, all);
    int lower = choose_listed(part, wanted, rank, chosen, shared);
    cluster_arrive_relaxed();  // this thread reads no other CTA's memory below
    for_each_marked(chosen, n, lower, shared, [&](int to, int i) {
        int token = candidates[first + i];
        tokens[to] = token;
        int slot = attended ? slot_of_token[token] : -1;
        if (attended) history[token - sinks] |= 1;
        if (slot >= 0) stamps[slot].attended = now;
    });
    for (int i = k + rank * THREADS + threadIdx.x; i < k_max; i += CLUSTER * THREADS) tokens[i] = -1;
    if (rank == 0 && threadIdx.x < 2) atomicAdd(counters + threadIdx.x, (unsigned long long)k);  // SELECTED, HITS
    if (rank == 0 && threadIdx.x == 0) counts[row] = k;
    cluster_wait();  // no CTA leaves while another may read its shared memory
}
