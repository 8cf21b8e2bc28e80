// Score a CTA's tokens by label and count the scores. label_mma.cuh and cluster_topk.cuh go before this text.
//
// Compile-time: as in label_mma.cuh. No includes.

// Where this lane's token of a batch's first 32 is among them.
__device__ int my_token() { return 8 * (threadIdx.x & 3) + (threadIdx.x >> 2 & 7); }

// Keys of the first `left` of 32 STEPS tokens from `at` on, and counts of the eligible. The others are counted in a
// bin of their own, which costs less than a branch.
template <class Eligible>
__device__ void score_batch(
    const Dots (&dots)[STEPS], const Query& query, int at, int left, unsigned* keys, Shared& shared,
    Eligible eligible) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        float score = score_step(dots[step], query, threadIdx.x & 31);
        score = fmaxf(score, -3e38f);  // a NaN would have another place among bins than among keys
        if (my_token() + 32 * step >= left) continue;
        keys[at + my_token() + 32 * step] = order_key(score);
        bool counts = eligible(at / 32 + step) >> my_token() & 1;
        atomicAdd(&shared.histogram[counts ? score_bin(score) : BINS], 1u);
    }
}

// Fill keys [n] with the scores of this CTA's tokens and count the eligible: eligible(i / 32) has a bit for each.
template <class Eligible>
__device__ void score_tokens(
    const unsigned char* codes, const unsigned* scales, const float* query_labels, const float* offsets, int n,
    unsigned* keys, Shared& shared, Eligible eligible) {
    constexpr int AT_ONCE = 32 * STEPS, STRIDE = WARPS * AT_ONCE;
    int lane = threadIdx.x & 31, at = (threadIdx.x >> 5) * AT_ONCE;
    if (at >= n) return;
    Source source = source_at(codes, scales, at, lane);
    Batch batch;
    if (n - at >= AT_ONCE) load_batch(source, batch);
    else load_last_batch(source, n - at, lane, batch);
    Query query;
    load_query(query_labels, offsets, lane, query);
    for (; at < n; at += STRIDE) {
        Dots dots[STEPS];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) dots[step] = multiply_step(batch, step, query);
        // The registers of these codes take the next ones, which come while the rest is done.
        source = {source.codes + STRIDE * ROW_BYTES, source.scales + STRIDE};
        int left = n - at;
        if (left >= AT_ONCE + STRIDE) load_batch(source, batch);
        else if (left > STRIDE) load_last_batch(source, left - STRIDE, lane, batch);
        if (left >= AT_ONCE) score_batch(dots, query, at, AT_ONCE, keys, shared, eligible);
        else score_batch(dots, query, at, left, keys, shared, eligible);
    }
}
