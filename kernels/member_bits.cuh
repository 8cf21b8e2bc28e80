// Which of a CTA's tokens are members, from the history that kernels/history.py describes: a byte a token.
//
// Compile-time: CLUSTER and THREADS. cluster.cuh and order_key.cuh go before this text.

constexpr int AGES = 8;  // steps that a token's byte of history remembers

struct Members {
    int ages[AGES];  // this CTA's tokens selected last 1, 2, ... steps ago; read by the other CTAs
    int mine, lower, all;  // the members among this CTA's tokens (read by the others), lower CTAs' and all
    unsigned remembered;   // bits of the steps whose tokens are members
};

// A CTA's history is read 16 tokens at a time; its first entry is at a multiple of 16 bytes.
constexpr int VECTOR = 16;

// Which of the bytes of the i-th 16 belong to a token of n: 255 each.
__device__ unsigned inside_word(int i, int word, int n) {
    int left = n - i * VECTOR - 4 * word;
    return left >= 4 ? ALL : left <= 0 ? 0u : (1u << 8 * left) - 1u;
}

// Minus each of four bytes.
__device__ unsigned minus_bytes(unsigned bytes) {
    return ((~bytes & 0x7f7f7f7fu) + 0x01010101u) ^ (~bytes & 0x80808080u);
}

// Copy the history of this CTA's tokens to past [n / 16 rounded up], zeros past the last, and count them by age: how
// many steps ago they were selected last, which is a byte's lowest bit.
__device__ void load_past(const unsigned char* history, int n, uint4* past, Members& members) {
    unsigned counts[AGES] = {};  // four sums of a byte each: a thread has at most 112 tokens (56 K keys fill an SM)
#pragma unroll 2
    for (int i = threadIdx.x; i * VECTOR < n; i += THREADS) {
        uint4 raw = ((const uint4*)history)[i];
        unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            words[word] &= inside_word(i, word, n);
            unsigned lowest = words[word] & minus_bytes(words[word]);
#pragma unroll
            for (int age = 0; age < AGES; ++age) counts[age] += lowest >> age & 0x01010101u;
        }
        past[i] = {words[0], words[1], words[2], words[3]};
    }
#pragma unroll
    for (int age = 0; age < AGES; ++age) {
        int count = __reduce_add_sync(ALL, (int)(counts[age] * 0x01010101u >> 24));
        if (threadIdx.x % 32 == 0 && count) atomicAdd(&members.ages[age], count);
    }
}

// Warp 0: the bits of as many steps as have together at most `limit` tokens, one step at least, and how many tokens
// they have.
__device__ void find_remembered(Members& members, int limit) {
    int lane = threadIdx.x, counts[AGES];
#pragma unroll
    for (int age = 0; age < AGES; ++age)
        counts[age] = lane < CLUSTER ? (int)remote_load(&members.ages[age], lane) : 0;
    unsigned bits = 1;
    int all = __reduce_add_sync(ALL, counts[0]);
    for (int age = 1, upto = all; age < AGES; ++age) {
        upto += __reduce_add_sync(ALL, counts[age]);
        if (upto <= limit) bits |= 1u << age, all = upto;
    }
    if (lane == 0) members.remembered = bits, members.all = all;
}

// Four bytes, each 0 or 1, as four bits.
__device__ unsigned bits_of_bytes(unsigned bytes) { return bytes * 0x01020408u >> 24 & 15; }

// Of this CTA's tokens, those selected in one of the remembered steps to member_bits [n / 32], and their number to
// members.mine. moves_on: what was selected a step ago was now selected two steps ago.
__device__ void mark_members(
    const uint4* past, int n, unsigned char* history, bool moves_on, unsigned* member_bits,
    Members& members) {
    unsigned mask = members.remembered * 0x01010101u;
    int mine = 0;
    for (int i = threadIdx.x; i * VECTOR < n; i += THREADS) {
        uint4 raw = past[i];
        unsigned words[4] = {raw.x, raw.y, raw.z, raw.w}, bits = 0;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            unsigned member = words[word] & mask;
            unsigned any = ((member & 0x7f7f7f7fu) + 0x7f7f7f7fu | member) >> 7 & 0x01010101u;
            bits |= bits_of_bytes(any) << 4 * word;
            words[word] = words[word] << 1 & 0xfefefefeu;
        }
        ((unsigned short*)member_bits)[i] = (unsigned short)bits;
        mine += __popc(bits);
        if (!moves_on) continue;
        if ((i + 1) * VECTOR <= n) {
            ((uint4*)history)[i] = {words[0], words[1], words[2], words[3]};
        } else {  // what lies past the last token stays
            for (int j = 0; j < n - i * VECTOR; ++j) history[i * VECTOR + j] = words[j / 4] >> 8 * (j % 4);
        }
    }
    // The last word's upper half, if no token is in it.
    int halves = (n + VECTOR - 1) / VECTOR;
    if (threadIdx.x == 0 && (halves & 1)) ((unsigned short*)member_bits)[halves] = 0;
    mine = __reduce_add_sync(ALL, mine);
    if (threadIdx.x % 32 == 0 && mine) atomicAdd(&members.mine, mine);
}

// Warp 0: how many members lower CTAs have, after a barrier since they were counted. What it reads of other CTAs has
// arrived at the next __syncthreads, since it is stored.
__device__ void count_lower_members(Members& members, unsigned rank) {
    int lane = threadIdx.x;
    int lower = __reduce_add_sync(ALL, lane < (int)rank ? (int)remote_load(&members.mine, lane) : 0);
    if (lane == 0) members.lower = lower;
}
