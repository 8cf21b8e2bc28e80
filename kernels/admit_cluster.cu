// Sticky selection's first part: score by label, admit the best tokens that are no members, list the candidates,
// and give what may enter slots.
//
// A thread block cluster for each (sequence, KV head), scoring and choosing as select_cluster.cu does. What may
// enter is known here, before the selection is (choose_cluster.cu): its rows can be on their way meanwhile. Slots
// are given here too (resolve_list.cuh), since a kernel of its own waits for room beside the model's (26 us
// where it takes 9 alone, H200).
// Scores are in units of log 2 and differ from label_scores_reference by rounding only.
//
// Compile-time: as in select_cluster.cu. cluster.cuh, order_key.cuh, label_mma.cuh, cluster_topk.cuh,
// score_tokens.cuh, member_bits.cuh and resolve_list.cuh go before this text. No includes: nvrtc needs no header path.

struct AdmitShared {
    Shared topk;
    Members members;
    ListShared list;
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, RESIDENT_THREADS / THREADS)
    admit_cluster(
        const float* query_labels, const float* offsets, const unsigned char* codes, const unsigned* scales,
        const int* budgets, const int* lengths, unsigned char* history, int* entering, int* entering_counts,
        int* candidates, float* candidate_scores, int* candidate_counts, int* slot_of_token, int* token_in_slot,
        Stamp* stamps, int* hand, const int* step, int* miss_tokens, int* miss_slots, int* miss_counts,
        unsigned long long* counters, int kv_heads, int capacity, int pitch, int sinks, int recent, int new_rows,
        int attended, int k_max, int listed_max, int n_slots, int phase, int kept_steps) {
    extern __shared__ __align__(16) unsigned dynamic[];
    __shared__ AdmitShared all;
    Shared& shared = all.topk;
    Members& members = all.members;
    wait_for_inputs();
    unsigned rank = cta_rank();
    int sequence = blockIdx.z, row = sequence * kv_heads + (int)blockIdx.y;
    int end = max(lengths[sequence] - recent, sinks), span = end - sinks;
    int share = (span + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
    int first = sinks + rank * share, n = max(min(share, end - first), 0);
    unsigned *keys = dynamic, *chosen = keys + share, *member_bits = chosen + share / 32;
    uint4* past = (uint4*)dynamic;  // until there are keys

    if (threadIdx.x < AGES) members.ages[threadIdx.x] = 0;
    if (threadIdx.x == 0) members.mine = 0;
    clear_counts(shared);
    long long in_history = (long long)row * pitch + rank * share;
    load_past(history + in_history, n, past, members);
    cluster_publish();
    cluster_wait();
    if (threadIdx.x < 32) find_remembered(members, 2 * min(budgets[row], span) - new_rows);
    __syncthreads();
    mark_members(past, n, history + in_history, attended, member_bits, members);
    __syncthreads();
    auto others = [&](int word) { return ~member_bits[word]; };
    long long place = (long long)row * capacity + first;
    score_tokens(codes + place * ROW_BYTES, scales + place, query_labels + row * GROUP * CHANNELS,
                 offsets + row * GROUP, n, keys, shared, others);
    Part part = {keys, n, (int)rank * share};
    int listed = members.all, k = min(budgets[row], span);  // again: the scores need every register
    int admitted = max(min(min(max(new_rows, k - listed), k), span - listed), 0);
    int from = choose_best(part, admitted, rank, chosen, shared, others);
    if (threadIdx.x < 32) count_lower_members(members, rank);
    entering += (long long)row * k_max;
    candidates += (long long)row * listed_max, candidate_scores += (long long)row * listed_max;
    int to = for_each_marked(chosen, n, from, shared, [&](int at, int i) { entering[at] = first + i; });
    for (int i = threadIdx.x; i < (n + 31) / 32; i += THREADS) member_bits[i] |= chosen[i];
    for_each_marked(member_bits, n, from + members.lower, shared, [&](int at, int i) {
        candidates[at] = first + i, candidate_scores[at] = key_score(keys[i]);
    });
    if (rank == 0 && threadIdx.x == 0)
        entering_counts[row] = admitted, candidate_counts[row] = listed + admitted;

    Slots resident = {slot_of_token + (long long)row * capacity, token_in_slot + (long long)row * n_slots,
                      stamps + (long long)row * n_slots, hand + row, n_slots};
    Missed missed = {miss_tokens + (long long)row * k_max, miss_slots + (long long)row * k_max, miss_counts + row};
    // Whether they are attended to is not known yet.
    Purpose purpose = {*step, phase, 0, kept_steps, ENTERING, counters + sequence * 8 + phase * 4};  // [B, 2, 4]
    resolve_list(entering, {from, to}, resident, missed, purpose, rank, all.list);
    cluster_wait();  // no CTA leaves while another may read its shared memory
}
