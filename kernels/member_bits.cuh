// Which of a CTA's tokens are members, from the history that kernels/history.py describes: a byte a token.
//
// Compile-time: CLUSTER and THREADS. cluster.cuh, order_key.cuh and cluster_topk.cuh go before this text.

// A CTA's history is read 16 tokens at a time; its first entry is at a multiple of 16 bytes.
constexpr int VECTOR = 16;

struct Past {
    unsigned words[4];
};

// Which of the bytes of the i-th 16 belong to a token of n: 255 each.
__device__ unsigned inside_word(int i, int word, int n) {
    int left = n - i * VECTOR - 4 * word;
    return left >= 4 ? ALL : left <= 0 ? 0u : (1u << 8 * left) - 1u;
}

__device__ Past load_past(const unsigned char* history, int i, int n) {
    uint4 past = ((const uint4*)history)[i];
    return {past.x & inside_word(i, 0, n), past.y & inside_word(i, 1, n), past.z & inside_word(i, 2, n),
            past.w & inside_word(i, 3, n)};
}

// Minus each of four bytes.
__device__ unsigned minus_bytes(unsigned bytes) {
    return ((~bytes & 0x7f7f7f7fu) + 0x01010101u) ^ (~bytes & 0x80808080u);
}

// Count this CTA's tokens by age: how many steps ago they were selected last, which is a byte's lowest bit.
__device__ void count_ages(const unsigned char* history, int n, Shared& shared) {
    unsigned counts[AGES] = {};  // four sums of a byte each: a thread has at most 112 tokens (56 K keys fill an SM)
#pragma unroll 2
    for (int i = threadIdx.x; i * VECTOR < n; i += THREADS) {
        Past past = load_past(history, i, n);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            unsigned lowest = past.words[word] & minus_bytes(past.words[word]);
#pragma unroll
            for (int age = 0; age < AGES; ++age) counts[age] += lowest >> age & 0x01010101u;
        }
    }
#pragma unroll
    for (int age = 0; age < AGES; ++age) {
        int count = __reduce_add_sync(ALL, (int)(counts[age] * 0x01010101u >> 24));
        if (threadIdx.x % 32 == 0 && count) atomicAdd(&shared.ages[age], count);
    }
}

// Warp 0: the bits of as many steps as have together at most `limit` tokens, one step at least, to
// shared.remembered, and how many tokens they have to shared.all_members.
__device__ void find_remembered(Shared& shared, int limit) {
    int lane = threadIdx.x, counts[AGES];
#pragma unroll
    for (int age = 0; age < AGES; ++age)
        counts[age] = lane < CLUSTER ? (int)remote_load(&shared.ages[age], lane) : 0;
    unsigned bits = 1;
    int members = __reduce_add_sync(ALL, counts[0]);
    for (int age = 1, upto = members; age < AGES; ++age) {
        upto += __reduce_add_sync(ALL, counts[age]);
        if (upto <= limit) bits |= 1u << age, members = upto;
    }
    if (lane == 0) shared.remembered = bits, shared.all_members = members;
}

// Four bytes, each 0 or 1, as four bits.
__device__ unsigned bits_of_bytes(unsigned bytes) { return bytes * 0x01020408u >> 24 & 15; }

// Of this CTA's tokens, those selected in one of the remembered steps to member_bits [n / 32], their number to
// shared.members, and out of the histogram, in which all tokens were counted. moves_on: what was selected a
// step ago was now selected two steps ago.
__device__ void load_members(
    Part part, unsigned char* history, bool moves_on, unsigned* member_bits, Shared& shared) {
    unsigned mask = shared.remembered * 0x01010101u;
    int n = part.n;
    int members = 0;
    uint4 next = threadIdx.x * VECTOR < n ? ((const uint4*)history)[threadIdx.x] : uint4{};
    for (int i = threadIdx.x; i * VECTOR < n; i += THREADS) {
        uint4 raw = next;
        if ((i + THREADS) * VECTOR < n) next = ((const uint4*)history)[i + THREADS];  // before the store below
        unsigned words[4] = {raw.x, raw.y, raw.z, raw.w}, bits = 0;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            unsigned inside = inside_word(i, word, n), past = words[word] & inside, member = past & mask;
            unsigned any = ((member & 0x7f7f7f7fu) + 0x7f7f7f7fu | member) >> 7 & 0x01010101u;
            bits |= bits_of_bytes(any) << 4 * word;
            words[word] = (past << 1 & 0xfefefefeu) | (words[word] & ~inside);
        }
        ((unsigned short*)member_bits)[i] = (unsigned short)bits;
        members += __popc(bits);
        for (unsigned rest = bits; rest; rest &= rest - 1)
            atomicAdd(&shared.histogram[key_bin(part.keys[i * VECTOR + __ffs(rest) - 1])], ALL);  // minus 1
        if (moves_on) ((uint4*)history)[i] = {words[0], words[1], words[2], words[3]};
    }
    // The last word's upper half, if no token is in it.
    int halves = (n + VECTOR - 1) / VECTOR;
    if (threadIdx.x == 0 && (halves & 1)) ((unsigned short*)member_bits)[halves] = 0;
    members = __reduce_add_sync(ALL, members);
    if (threadIdx.x % 32 == 0 && members) atomicAdd(&shared.members, members);
}
