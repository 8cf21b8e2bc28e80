// Label scoring and exact top-k in one kernel: a thread block cluster for each (sequence, KV head).
//
// The cluster's CTAs share the selectable tokens out, so the scores never leave shared memory:
//   1. score: tensor cores multiply label codes by the group's query labels; the log-sum-exp over
//      the group becomes a uint32 key of the same order, and is counted in a histogram of scores;
//   2. choose (cluster_topk.cuh): the histogram over the cluster finds the cut to within a few tokens, which
//      all CTAs then rank; a sticky selection does so twice, first among the tokens that are no members;
//   3. write: a prefix over CTAs and warps gives every chosen token its place, in token order.
// A sticky selection reads its members from a byte a token with the steps that selected it, and writes those on.
// Scores are in units of log 2 and differ from label_scores_reference by rounding only.
//
// Compile-time: CHANNELS (16, 32, 64, 128), BITS (4, 8, 16), GROUP (query heads a KV head), THREADS,
// CLUSTER (8 or 16), STICKY (0 or 1), STEPS (32-token steps a warp loads at once), PREFETCH (1: load the
// next STEPS while scoring these), RESIDENT (CTAs an SM must be able to hold, which bounds the registers).
// cluster.cuh, label_mma.cuh and cluster_topk.cuh go before this text. No includes: nvrtc needs no header path.

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

// Zero the counts. No CTA may write another's before a cluster barrier.
__device__ void clear_counts(Shared& shared) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared.histogram[i] = 0;
    for (int i = threadIdx.x; i < SLICE; i += THREADS) shared.slice_total[0][i] = 0;
    if (threadIdx.x == 0) shared.slice_sum[0] = 0;
    if (threadIdx.x < AGES) shared.ages[threadIdx.x] = 0;
    __syncthreads();  // ages are counted before the cluster's barrier ends
}

// A CTA's history is read 16 tokens at a time; its first entry is at a multiple of 16 bytes.
constexpr int VECTOR = 16;

// Count this CTA's tokens by age: how many steps ago they were selected last, which is a byte's lowest bit.
__device__ void count_ages(const unsigned char* history, int n, Shared& shared) {
    unsigned long long counts = 0;  // 8 bits an age: a thread has at most 112 tokens (56 K keys fill an SM)
#pragma unroll 2
    for (int i = threadIdx.x; i * VECTOR < n; i += THREADS) {
        uint4 past = ((const uint4*)history)[i];
        unsigned words[4] = {past.x, past.y, past.z, past.w};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            for (unsigned rest = words[word]; rest;) {  // byte by byte, from the lowest that is not zero
                int bit = __ffs(rest) - 1;
                counts += 1ull << 8 * (bit & 7);
                rest &= bit < 24 ? ~0u << ((bit & 24) + 8) : 0u;
            }
        }
    }
    for (int age = 0; age < AGES; ++age) {
        int count = __reduce_add_sync(ALL, (int)(counts >> 8 * age & 255));
        if (threadIdx.x % 32 == 0 && count) atomicAdd(&shared.ages[age], count);
    }
}

// Four bytes, each 0 or 1, as four bits, and back.
__device__ unsigned bits_of_bytes(unsigned bytes) { return bytes * 0x01020408u >> 24 & 15; }
__device__ unsigned bytes_of_bits(unsigned bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }

// The bits of as many steps as have together at most `limit` tokens, one step at least; how many they have.
__device__ unsigned remembered_bits(Shared& shared, int limit, int& members) {
    int lane = threadIdx.x & 31, counts[AGES];
#pragma unroll
    for (int age = 0; age < AGES; ++age)
        counts[age] = lane < CLUSTER ? (int)remote_load(&shared.ages[age], lane) : 0;
    unsigned bits = 1;
    members = __reduce_add_sync(ALL, counts[0]);
    for (int age = 1, upto = members; age < AGES; ++age) {
        upto += __reduce_add_sync(ALL, counts[age]);
        if (upto <= limit) bits |= 1u << age, members = upto;
    }
    return bits;
}

// Of this CTA's tokens, those selected in one of the steps in `remembered` to member_bits [n / 32].
__device__ void load_members(const unsigned char* history, int n, unsigned remembered, unsigned* member_bits) {
    unsigned mask = remembered * 0x01010101u;
#pragma unroll 2
    for (int i = threadIdx.x; i * VECTOR < n; i += THREADS) {
        uint4 past = ((const uint4*)history)[i];
        unsigned words[4] = {past.x & mask, past.y & mask, past.z & mask, past.w & mask}, bits = 0;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            unsigned any = ((words[word] & 0x7f7f7f7fu) + 0x7f7f7f7fu | words[word]) >> 7 & 0x01010101u;
            bits |= bits_of_bytes(any) << 4 * word;
        }
        ((unsigned short*)member_bits)[i] = (unsigned short)bits;
    }
    // The last word's upper half, if no token is in it.
    int halves = (n + VECTOR - 1) / VECTOR;
    if (threadIdx.x == 0 && (halves & 1)) ((unsigned short*)member_bits)[halves] = 0;
}

// One step on: what was selected a step ago was now selected two steps ago, and `chosen` [n / 32] a step ago.
__device__ void write_history(unsigned char* history, int n, const unsigned* chosen) {
#pragma unroll 2
    for (int i = threadIdx.x; i * VECTOR < n; i += THREADS) {
        uint4 past = ((const uint4*)history)[i];
        unsigned bits = ((const unsigned short*)chosen)[i];
        past.x = (past.x << 1 & 0xfefefefeu) | bytes_of_bits(bits);
        past.y = (past.y << 1 & 0xfefefefeu) | bytes_of_bits(bits >> 4);
        past.z = (past.z << 1 & 0xfefefefeu) | bytes_of_bits(bits >> 8);
        past.w = (past.w << 1 & 0xfefefefeu) | bytes_of_bits(bits >> 12);
        ((uint4*)history)[i] = past;
    }
}

// Add `count` to the histogram for each marked token.
__device__ void count_marked(Part part, const unsigned* marks, unsigned count, Shared& shared) {
    for (int word = threadIdx.x; word < (part.n + 31) / 32; word += THREADS) {
        for (unsigned bits = marks[word]; bits; bits &= bits - 1)
            atomicAdd(&shared.histogram[key_bin(part.keys[word * 32 + __ffs(bits) - 1])], count);
    }
}

// Sticky selection: the members and the best other tokens, as many as may enter, to member_bits [n / 32], and
// to the histogram. Closes no cluster barrier that it did not open.
__device__ void admit_others(
    Part part, const unsigned char* history, int span, int k, int new_rows, unsigned rank, int& round,
    unsigned* member_bits, unsigned* chosen, Shared& shared) {
    int members;
    unsigned remembered = remembered_bits(shared, 2 * k - new_rows, members);
    load_members(history, part.n, remembered, member_bits);
    int wanted = min(min(max(new_rows, k - members), k), span - members);
    auto others = [&](int word) { return ~member_bits[word]; };
    __syncthreads();
    count_marked(part, member_bits, ALL, shared);  // they were counted with the others
    Range range = find_range(part, wanted, round, shared, others);
    collect(part, range, chosen, shared, others);
    choose_listed(part, wanted, rank, chosen, shared);
    for (int i = threadIdx.x; i < (part.n + 31) / 32; i += THREADS) member_bits[i] |= chosen[i];
    count_marked(part, member_bits, 1u, shared);  // the words that this thread has just written
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, RESIDENT)
    select_cluster(
        const float* query_labels, const float* offsets, const unsigned char* codes, const unsigned* scales,
        const int* budgets, const int* lengths, unsigned char* history, int* tokens, int* counts, int kv_heads,
        int capacity, int pitch, int sinks, int recent, int new_rows, int attended, int k_max) {
    extern __shared__ __align__(16) unsigned dynamic[];
    __shared__ Shared shared;
    unsigned rank = cta_rank();
    int sequence = blockIdx.z, row = sequence * kv_heads + (int)blockIdx.y;
    int end = max(lengths[sequence] - recent, sinks), span = end - sinks;
    int k = min(budgets[row], span), *target = tokens + (long long)row * k_max;
    int share = (span + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
    int first = sinks + rank * share, n = max(min(share, end - first), 0);
    if (STICKY) history += (long long)row * pitch + first - sinks;
    if (k > 0 && k < span) {
        unsigned *keys = dynamic, *chosen = keys + share, *member_bits = chosen + share / 32;
        clear_counts(shared);
        if (STICKY) count_ages(history, n, shared);
        cluster_publish();
        long long place = (long long)row * capacity + first;
        score_tokens(codes + place * ROW_BYTES, scales + place, query_labels + row * GROUP * CHANNELS,
                     offsets + row * GROUP, n, keys, shared);
        cluster_wait();  // every CTA's totals are zero, and the ages counted
        Part part = {keys, n, (int)rank * share};
        auto eligible = [&](int word) { return STICKY ? member_bits[word] : ALL; };
        int wanted = k, round = 0;
        if (STICKY)
            admit_others(part, history, span, k, new_rows, rank, round, member_bits, chosen, shared);
        Range range = find_range(part, wanted, round, shared, eligible);
        collect(part, range, chosen, shared, eligible);
        int lower = choose_listed(part, wanted, rank, chosen, shared);
        cluster_arrive_relaxed();  // this thread reads no other CTA's memory below
        write_chosen(chosen, n, first, target, lower, shared);
        if (STICKY && attended) write_history(history, n, chosen);
        cluster_wait();  // no CTA leaves while another may read its shared memory
    } else {
        for (int i = rank * THREADS + threadIdx.x; i < k; i += CLUSTER * THREADS) target[i] = sinks + i;
        for (int i = threadIdx.x; STICKY && attended && i < n; i += THREADS)
            history[i] = history[i] << 1 | (k > 0);
    }
    for (int i = k + rank * THREADS + threadIdx.x; i < k_max; i += CLUSTER * THREADS) target[i] = -1;
    if (rank == 0 && threadIdx.x == 0) counts[row] = k;
}
