// Resolve a selection against the resident set: a thread block cluster for each (sequence, KV head).
//
// The bits are those of resolve_reference. Compile-time: CLUSTER (CTAs), THREADS. cluster.cuh, order_key.cuh and
// resolve_list.cuh go before this text. No includes, so that nvrtc needs no header path.

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) resolve_cluster(
    const int* tokens, const int* counts, int* slot_of_token, int* token_in_slot, Stamp* stamps, int* hand,
    const int* step, int* miss_tokens, int* miss_slots, int* miss_counts, unsigned long long* counters,
    int kv_heads, int k_max, int capacity, int n_slots, int phase, int attended, int kept_steps, int part) {
    __shared__ ListShared shared;
    wait_for_inputs();
    unsigned rank = cta_rank();
    long long row = (long long)blockIdx.z * kv_heads + blockIdx.y;
    Slots resident = {slot_of_token + row * capacity, token_in_slot + row * n_slots, stamps + row * n_slots,
                      hand + row, n_slots};
    Missed missed = {miss_tokens + row * k_max, miss_slots + row * k_max, miss_counts + row};
    Purpose purpose = {*step, phase, attended, kept_steps, part, counters + blockIdx.z * 8 + phase * 4};  // [B, 2, 4]
    resolve_list(tokens + row * k_max, cta_segment(counts[row], rank), resident, missed, purpose, rank, shared);
    cluster_wait();  // no CTA leaves while another may read its shared memory
}
