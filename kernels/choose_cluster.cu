// Sticky selection's second part: the best of the candidates that admit_cluster.cu listed, in token order, their
// slots, and the stamps of these.
//
// A thread block cluster for each (sequence, KV head), choosing as select_cluster.cu does.
//
// Compile-time: THREADS, CLUSTER. cluster.cuh, order_key.cuh, cluster_topk.cuh and resolve_list.cuh go
// before this text. No includes: nvrtc needs no header path.

constexpr int AT_ONCE = 4;  // loads in flight a thread: one after the other they take 55 us beside the model's products

// Fill keys [n] with those of the scores and count them.
__device__ void load_keys(const float* scores, int n, unsigned* keys, Shared& shared) {
    for (int first = threadIdx.x; first < n; first += THREADS * AT_ONCE) {
        float score[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) score[j] = first + j * THREADS < n ? scores[first + j * THREADS] : 0.f;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (first + j * THREADS >= n) break;
            keys[first + j * THREADS] = order_key(score[j]);
            atomicAdd(&shared.histogram[score_bin(score[j])], 1u);
        }
    }
}

// Write the chosen candidates in order, from tokens[place] on, a lane each; attended: to the history too, and their
// slots, stamped with the step `now`, to slots. candidates: this CTA's n.
__device__ void write_chosen(
    const int* candidates, const unsigned* chosen, int n, int place, int* tokens, int* slots,
    unsigned char* history, const int* slot_of_token, Stamp* stamps, int now, bool attended, Shared& shared) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, words = (n + 31) / 32, each = (words + WARPS - 1) / WARPS;
    int from = min(warp * each, words), to = min(from + each, words), count = 0;
    for (int word = from + lane; word < to; word += 32) count += __popc(chosen[word]);
    count = __reduce_add_sync(ALL, count);
    if (lane == 0) shared.warp_marked[warp] = count;
    __syncthreads();
    place += __reduce_add_sync(ALL, lane < warp ? shared.warp_marked[lane] : 0);
    for (int word = from; word < to; word += AT_ONCE) {
        int token[AT_ONCE], slot[AT_ONCE];
        unsigned bits[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            bits[j] = word + j < to ? chosen[word + j] : 0u;
            token[j] = bits[j] >> lane & 1 ? candidates[(word + j) * 32 + lane] : -1;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) slot[j] = attended && token[j] >= 0 ? slot_of_token[token[j]] : -1;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int to = place + __popc(bits[j] & ((1u << lane) - 1u));
            place += __popc(bits[j]);
            if (token[j] >= 0) tokens[to] = token[j];
            if (slot[j] >= 0) stamps[slot[j]].attended = now;
            if (attended && token[j] >= 0) slots[to] = slot[j], history[token[j]] |= 1;
        }
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) choose_cluster(
    const int* candidates, const float* candidate_scores, const int* candidate_counts, const int* budgets,
    unsigned char* history, int* tokens, int* counts, int* slots, const int* slot_of_token, Stamp* stamps, const int* step,
    unsigned long long* counters, int kv_heads, int listed_max, int pitch, int sinks, int attended, int k_max,
    int capacity, int n_slots, int phase) {
    extern __shared__ __align__(16) unsigned dynamic[];
    __shared__ Shared shared;
    wait_for_inputs();
    unsigned rank = cta_rank();
    long long row = (long long)blockIdx.z * kv_heads + blockIdx.y;
    int count = candidate_counts[row], k = min(budgets[row], count);
    int share = (count + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
    int first = rank * share, n = max(min(share, count - first), 0);
    unsigned *keys = dynamic, *chosen = keys + share;
    candidates += row * listed_max, candidate_scores += row * listed_max;
    history += row * pitch, tokens += row * k_max, slots += row * k_max;
    slot_of_token += row * capacity, stamps += row * n_slots;
    counters += blockIdx.z * 8 + phase * 4;  // [B, 2, 4]
    int now = *step;

    clear_counts(shared);
    load_keys(candidate_scores + first, n, keys, shared);
    Part part = {keys, n, first};
    int lower = choose_best(part, k, rank, chosen, shared, [](int) { return ALL; });
    cluster_arrive_relaxed();  // this thread reads no other CTA's memory below
    write_chosen(candidates + first, chosen, n, lower, tokens, slots, history - sinks, slot_of_token, stamps, now,
                 attended, shared);
    for (int i = k + rank * THREADS + threadIdx.x; i < k_max; i += CLUSTER * THREADS) tokens[i] = -1;
    if (rank == 0 && threadIdx.x < 2) atomicAdd(counters + threadIdx.x, (unsigned long long)k);  // SELECTED, HITS
    if (rank == 0 && threadIdx.x == 0) counts[row] = k;
    cluster_wait();  // no CTA leaves while another may read its shared memory
}
