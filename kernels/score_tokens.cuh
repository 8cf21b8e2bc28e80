// Score a CTA's tokens by label and count the scores. label_mma.cuh and cluster_topk.cuh go before this text.
//
// Compile-time: as in label_mma.cuh, and PREFETCH (1: load the next STEPS while scoring these). No includes.

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
