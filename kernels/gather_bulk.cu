// Gather missed rows from pinned host memory with the bulk copy engine (sm_90 and newer).
//
// A few CTAs share the misses out in groups of up to GROUP rows of one head, consecutive groups to
// consecutive CTAs, so that host memory is walked forwards. In a CTA
//   warp 0 (producer) asks the copy engine for each row of a group, into a ring of STAGES groups in
//     shared memory; nothing waits for the link but the engine, so the whole ring is in flight;
//   warp 1 (consumer) writes each group that has arrived to its slots and frees the stage.
//
// Compile-time: ROW_BYTES (a multiple of 16), GROUP (rows, at most 32: a lane each), STAGES, CLUSTER (CTAs that are
// to be on neighbouring SMs; they share nothing).
// Dynamic shared memory: the ring, the barriers, the miss counts. No includes: nvrtc needs no header path.

constexpr int THREADS = 64;
constexpr unsigned ALL = 0xffffffffu;
constexpr int STAGE_BYTES = GROUP * ROW_BYTES;
constexpr int VECTORS = ROW_BYTES / 16;  // 16-byte pieces of a row
constexpr int AHEAD = 3;   // groups whose entries of a miss list are read in advance
constexpr int SLOTS = AHEAD + 1;
constexpr int UNROLL = 8;  // loads of shared memory in flight a lane, to hide their 30 cycles or so

typedef unsigned long long Barrier;

__device__ unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

// The PTX of the copy engine and its barriers.
__device__ void init_barrier(Barrier* barrier, unsigned arrivals) {  // which complete it, with the bytes it expects
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ void show_barriers_to_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ void arrive_expecting(Barrier* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ bool has_completed(Barrier* barrier, unsigned parity) {
    unsigned done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done;
}

__device__ void copy_row(char* target, const char* source, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(target)),
                 "l"(source), "n"(ROW_BYTES), "r"(shared_address(barrier))
                 : "memory");
}

__device__ void load_entry(int* target, const int* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(target)), "l"(source) : "memory");
}

__device__ void close_load() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ void wait_for_loads_before_the_last() { asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD) : "memory"); }
// End of the PTX.

__device__ void wait(Barrier* barrier, unsigned parity) {
    while (!has_completed(barrier, parity)) {
    }
}

// Up to GROUP consecutive misses of one head, the first of them its first-th. rows 0: there are no more.
struct Group {
    int head, first, rows;
};

// A warp's walk over the groups of its CTA. A lane looks at one head of 32.
struct Walk {
    const int* counts;  // [heads], in shared memory
    int heads;
    int wanted;         // the next group of this CTA, counted over all heads
    int base;           // first of the 32 heads looked at
    int count, end;     // this lane's head: its misses, and the groups up to and including it
};

__device__ int groups_of(int count) { return (count + GROUP - 1) / GROUP; }

// Look at the next 32 heads.
__device__ void advance(Walk& walk, int lane) {
    int before = __shfl_sync(ALL, walk.end, 31);
    walk.base += 32;
    walk.count = walk.base + lane < walk.heads ? walk.counts[walk.base + lane] : 0;
    walk.end = groups_of(walk.count);
    for (int i = 1; i < 32; i <<= 1) {
        int below = __shfl_up_sync(ALL, walk.end, i);
        if (lane >= i) walk.end += below;
    }
    walk.end += before;
}

__device__ Group next_group(Walk& walk, int lane) {
    unsigned above;
    while (!(above = __ballot_sync(ALL, walk.wanted < walk.end))) {
        if (walk.base + 32 >= walk.heads) return {0, 0, 0};
        advance(walk, lane);
    }
    int owner = __ffs(above) - 1;
    int count = __shfl_sync(ALL, walk.count, owner), end = __shfl_sync(ALL, walk.end, owner);
    int first = (walk.wanted - end + groups_of(count)) * GROUP;
    walk.wanted += gridDim.x;
    return {walk.base + owner, first, min(count - first, GROUP)};
}

// Call visit(i, head, rows, entry) for the CTA's i-th group, all lanes together; entry is this lane's of
// the list [heads, budget]. Entries are loaded AHEAD groups before; each lane reads back only its own.
template <class Visit>
__device__ void for_each_group(
    const int* list, const int* counts, int heads, int budget, int* entries, int lane, Visit visit) {
    Walk walk = {counts, heads, (int)blockIdx.x, -32, 0, 0};
    Group kept = {0, 0, 0};  // group i in lane i % 32
#pragma unroll 1
    for (int i = 0;; ++i) {
        Group group = next_group(walk, lane);
        if (lane < group.rows)
            load_entry(entries + i % SLOTS * 32 + lane, list + (long long)group.head * budget + group.first + lane);
        close_load();
        if (lane == i % 32) kept = group;
        int due = i - AHEAD;
        if (due < 0) continue;
        int head = __shfl_sync(ALL, kept.head, due % 32), rows = __shfl_sync(ALL, kept.rows, due % 32);
        if (rows == 0) return;
        wait_for_loads_before_the_last();
        visit(due, head, rows, entries[due % SLOTS * 32 + lane]);
    }
}

// Write a group's rows from its stage to their slots; lane r holds the slot of row r.
__device__ void store_rows(const char* stage, char* slots, int rows, int slot, int lane) {
    int vectors = rows * VECTORS;
#pragma unroll 1
    for (int first = 0; first < vectors; first += 32 * UNROLL) {
        uint4 piece[UNROLL];
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            int vector = first + 32 * j + lane;
            if (vector < vectors) piece[j] = *(const uint4*)(stage + vector * 16);
        }
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            int vector = first + 32 * j + lane;
            int target = __shfl_sync(ALL, slot, vector / VECTORS % 32);
            if (vector < vectors)
                *(uint4*)(slots + (long long)target * ROW_BYTES + vector % VECTORS * 16) = piece[j];
        }
    }
}

// Strides in bytes; slots points at the first resident slot of the first head.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) gather_bulk(
    const char* host_rows, const int* miss_tokens, const int* miss_slots, const int* miss_counts, char* slots,
    long long host_b, long long host_h, long long slots_b, long long slots_h, int kv_heads, int heads,
    int budget) {
    extern __shared__ __align__(128) char ring[];  // [STAGES, GROUP, ROW_BYTES]
    Barrier* arrived = (Barrier*)(ring + STAGES * STAGE_BYTES);
    Barrier* freed = arrived + STAGES;
    int* token_entries = (int*)(freed + STAGES);  // [SLOTS, 32]
    int* slot_entries = token_entries + SLOTS * 32;
    int* counts = slot_entries + SLOTS * 32;  // [heads]
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, misses = 0;
    if (warp == 1) {
#pragma unroll 1
        for (int i = lane; i < STAGES; i += 32) init_barrier(arrived + i, 1), init_barrier(freed + i, 32);
        show_barriers_to_engine();
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < heads; i += THREADS) misses |= counts[i] = miss_counts[i];
    if (!__syncthreads_or(misses)) return;
    if (warp == 0) {
        for_each_group(
            miss_tokens, counts, heads, budget, token_entries, lane, [&](int i, int head, int rows, int token) {
                int stage = i % STAGES, lap = i / STAGES;
                if (lap > 0) wait(freed + stage, (lap - 1) & 1);
                if (lane == 0) arrive_expecting(arrived + stage, rows * ROW_BYTES);
                __syncwarp();
                const char* source = host_rows + head / kv_heads * host_b + head % kv_heads * host_h;
                char* target = ring + stage * STAGE_BYTES + lane * ROW_BYTES;
                if (lane < rows) copy_row(target, source + (long long)token * ROW_BYTES, arrived + stage);
            });
    } else {
        for_each_group(
            miss_slots, counts, heads, budget, slot_entries, lane, [&](int i, int head, int rows, int slot) {
                int stage = i % STAGES, lap = i / STAGES;
                wait(arrived + stage, lap & 1);
                char* target = slots + head / kv_heads * slots_b + head % kv_heads * slots_h;
                store_rows(ring + stage * STAGE_BYTES, target, rows, slot, lane);
                arrive(freed + stage);  // each lane for what it has read: racecheck follows no other order
            });
    }
}
