// Label scores of all selectable tokens as order-preserving uint32 keys, by every SM of the GPU.
//
// select_cluster.cu cuts them. Scoring alone is a stream over the labels, which clusters would spread badly:
// a GPU of 132 SMs holds seven clusters of 16, and there are eight KV heads.
//
// Compile-time: CHANNELS, BITS, GROUP, STEPS (32-token steps a warp loads at once), RESIDENT (CTAs an SM must
// be able to hold). label_mma.cuh goes before this text. No includes.

constexpr int SCORE_WARPS = 8;

// keys [B, Hkv, N]: those of tokens sinks ... length - recent - 1 are written.
extern "C" __global__ void __launch_bounds__(32 * SCORE_WARPS, RESIDENT)
    score_keys(
        const float* query_labels, const float* offsets, const unsigned char* codes, const unsigned* scales,
        const int* lengths, unsigned* keys, int kv_heads, int capacity, int sinks, int recent) {
    int lane = threadIdx.x & 31, mine = 8 * (lane & 3) + (lane >> 2);
    int row = blockIdx.z * kv_heads + blockIdx.y, n = lengths[blockIdx.z] - recent - sinks;
    int base = (blockIdx.x * SCORE_WARPS + (threadIdx.x >> 5)) * 32 * STEPS;
    if (base >= n) return;
    long long place = (long long)row * capacity + sinks;
    codes += place * ROW_BYTES, scales += place, keys += place;
    Batch batch;
    load_batch(codes, scales, base, n, lane, batch);
    Query query;
    load_query(query_labels + row * GROUP * CHANNELS, offsets + row * GROUP, lane, query);
    for (int stride = gridDim.x * SCORE_WARPS * 32 * STEPS; base < n; base += stride) {
        float scores[STEPS];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) scores[step] = score_step(batch.words[step], batch.pair[step], query, lane);
        int written = base;
        load_batch(codes, scales, base + stride, n, lane, batch);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            int token = written + 32 * step + mine;
            if (token < n) keys[token] = order_key(fmaxf(scores[step], -3e38f));  // no NaN has a key
        }
    }
}
