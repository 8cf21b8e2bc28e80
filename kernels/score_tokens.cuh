// Score a CTA's tokens by label and count the scores. label_mma.cuh and cluster_topk.cuh go before this text.
//
// Compile-time: as in label_mma.cuh, and PREFETCH (1: load the next STEPS while scoring these). No includes.

// Where this lane's token of a batch's first 32 is among them.
__device__ int my_token() { return 8 * (threadIdx.x & 3) + (threadIdx.x >> 2 & 7); }

// Keys of a batch's first `left` tokens, and their counts; FULL: of all 32 STEPS. key: of this lane's first one.
template <bool FULL>
__device__ void score_batch(const Batch& batch, const Query& query, int left, unsigned* key, Shared& shared) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        float score = score_step(batch.words[step], batch.pair[step], query, threadIdx.x & 31);
        score = fmaxf(score, -3e38f);  // a NaN would have another place among bins than among keys
        if (FULL || my_token() + 32 * step < left) {
            key[32 * step] = order_key(score);
            atomicAdd(&shared.histogram[score_bin(score)], 1u);
        }
    }
}

// Fill keys [n] with the scores of this CTA's tokens and count them.
__device__ void score_tokens(
    const unsigned char* codes, const unsigned* scales, const float* query_labels, const float* offsets, int n,
    unsigned* keys, Shared& shared) {
    constexpr int AT_ONCE = 32 * STEPS, STRIDE = WARPS * AT_ONCE;
    int lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * AT_ONCE, left = n - first;  // tokens not scored yet
    if (left <= 0) return;
    Source source = source_at(codes, scales, first, lane);
    unsigned* key = keys + first + my_token();
    Batch batch;
    if (left >= AT_ONCE) load_batch(source, batch);
    else load_last_batch(source, left, lane, batch);
    Query query;
    load_query(query_labels, offsets, lane, query);
    for (; left >= AT_ONCE; key += STRIDE) {
        Batch next;
        left -= STRIDE;
        source = {source.codes + STRIDE * ROW_BYTES, source.scales + STRIDE};
        if (!PREFETCH) score_batch<true>(batch, query, AT_ONCE, key, shared);
        if (left >= AT_ONCE) load_batch(source, next);
        else if (left > 0) load_last_batch(source, left, lane, next);
        if (PREFETCH) score_batch<true>(batch, query, AT_ONCE, key, shared);
        batch = next;
    }
    if (left > 0) score_batch<false>(batch, query, left, key, shared);
}
