// Resolve a selection against the resident set: a thread block cluster for each (sequence, KV head).
//
//   1. look up: each warp takes consecutive selected tokens, stamps the slots of the hits and counts misses;
//   2. list: a prefix over warps and CTAs gives every miss its place, in token order;
//   3. give: the free slots, counted the same way in ring order from the hand, go to the misses. Rows that
//      the last `kept_steps` steps attended to stay, or of fewer steps if there are too few others.
// The bits are those of resolve_reference.
//
// Compile-time: CLUSTER (CTAs), PHASE (0: prediction, 1: true selection). part: WHOLE, ENTERING or REST of
// kernels/residency.py. cluster.cuh goes before this text.
// No includes, so that nvrtc needs no header path.

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int AGES = 9;  // kept_steps + 1 at most
// Entries a lane looks up at once: what is looked up depends on what was, and one at a time a selection of 16,384
// took 73 us (H100), most of it waiting.
constexpr int EACH = 4;
constexpr int KEPT_AGES = 16;  // of a lane's slots, as many as 64 bits hold
constexpr int NO_ENTRY = 0x7fffffff;  // in the place of a slot
constexpr int ENTERING = 1, REST = 2;

struct Shared {
    int warp_misses[WARPS], warp_older[WARPS][AGES];
    int cta_misses, cta_older[AGES];  // read by the other CTAs; older: free slots of more than i steps
};

// The consecutive entries of a list of n that this warp takes: a whole number of 32 each, in CTA and warp order.
struct Segment {
    int from, to;
};

__device__ Segment segment_of(int n, unsigned rank) {
    int share = (n + CLUSTER * THREADS - 1) / (CLUSTER * THREADS) * 32;
    int from = min(((int)rank * WARPS + (int)(threadIdx.x >> 5)) * share, n);
    return {from, min(from + share, n)};
}

// The misses counted before this warp's, given its own (the same in every lane), and the cluster's total.
// What was written before it can be read after it by every CTA.
__device__ int place_of_misses(int count, unsigned rank, Shared& shared, int& total) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (lane == 0) shared.warp_misses[warp] = count;
    __syncthreads();
    int counted = lane < WARPS ? shared.warp_misses[lane] : 0;
    if (warp == 0) {
        int sum = __reduce_add_sync(ALL, counted);
        if (lane == 0) shared.cta_misses = sum;
    }
    cluster_publish();
    cluster_wait();
    int of_cta = lane < CLUSTER ? (int)remote_load(&shared.cta_misses, lane) : 0;
    total = __reduce_add_sync(ALL, of_cta);
    return __reduce_add_sync(ALL, (lane < warp ? counted : 0) + (lane < (int)rank ? of_cta : 0));
}

// The most steps, kept_steps at most, whose rows can stay when `misses` slots are taken, and how many free slots
// come before this warp's. older: lane i has this warp's free slots whose rows no step attended to in the last i.
__device__ int place_of_free(int older, int kept_steps, int misses, unsigned rank, Shared& shared, int& steps) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, total = 0, earlier = 0;
    if (lane < AGES) shared.warp_older[warp][lane] = older;
    __syncthreads();
    if (warp == 0 && lane < AGES) {
        for (int other = 0; other < WARPS; ++other) total += shared.warp_older[other][lane];
        shared.cta_older[lane] = total;
    }
    cluster_publish();
    cluster_wait();
    int of_cta[CLUSTER];
#pragma unroll
    for (int cta = 0; cta < CLUSTER; ++cta)
        of_cta[cta] = lane < AGES ? (int)remote_load(&shared.cta_older[lane], cta) : 0;
    total = 0;
#pragma unroll
    for (int cta = 0; cta < CLUSTER; ++cta) {
        total += of_cta[cta];
        earlier += cta < (int)rank ? of_cta[cta] : 0;
    }
    steps = 31 - __clz(__ballot_sync(ALL, lane <= kept_steps && total >= misses) | 1);
    int of_warps = __reduce_add_sync(ALL, lane < warp ? shared.warp_older[lane][steps] : 0);
    return __shfl_sync(ALL, earlier, steps) + of_warps;
}

// The step when a slot's row was last attended to, and the mark of when it was last listed for less; -1 never.
struct alignas(8) Stamp {
    int attended, listed;
};

__device__ bool is_slot(int slot) { return slot >= 0 && slot != NO_ENTRY; }
__device__ int in_ring(int slot, int n_slots) { return slot < n_slots ? slot : slot - n_slots; }

// Another CTA may have written these.
__device__ int load_shared_by_ctas(const int* source) { return __ldcg(source); }
__device__ Stamp load_stamp(const Stamp* source) {
    int2 both = __ldcg((const int2*)source);
    return {both.x, both.y};
}

// How many steps ago a slot's row was attended to, 9 at most; 0 if the selection at hand uses it.
__device__ int age_of(Stamp stamp, int now, int mark, int attended) {
    if ((attended ? stamp.attended : stamp.listed) == mark) return 0;
    return stamp.attended < 0 ? AGES : min(now - stamp.attended, AGES);
}

// A lane's EACH entries of the selection from `first` on, 32 apart: tokens, and their slots or -1.
__device__ void look_up(const int* tokens, const int* slot_of_token, int first, int end, int* token, int* slot) {
#pragma unroll
    for (int j = 0; j < EACH; ++j) token[j] = first + 32 * j < end ? tokens[first + 32 * j] : -1;
#pragma unroll
    for (int j = 0; j < EACH; ++j) slot[j] = token[j] < 0 ? NO_ENTRY : slot_of_token[token[j]];
}

// The ages of a lane's EACH slots from the `first` after `start` on, 32 apart.
__device__ void load_ages(
    const Stamp* stamps, int start, int n_slots, int first, int end, int now, int mark, int attended, int* age) {
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        int i = first + 32 * j;
        age[j] = i < end ? age_of(load_stamp(stamps + in_ring(start + i, n_slots)), now, mark, attended) : 0;
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) resolve_cluster(
    const int* tokens, const int* counts, int* slot_of_token, int* token_in_slot, Stamp* stamps, int* hand,
    const int* step, int* miss_tokens, int* miss_slots, int* miss_counts, unsigned long long* counters,
    int kv_heads, int k_max, int capacity, int n_slots, int attended, int kept_steps, int part) {
    __shared__ Shared shared;
    unsigned rank = cta_rank(), before = (1u << (threadIdx.x & 31)) - 1u;
    int lane = threadIdx.x & 31, sequence = blockIdx.z;
    long long row = (long long)sequence * kv_heads + blockIdx.y;
    int count = counts[row], now = *step, start = hand[row], mark = attended ? now : 2 * now + PHASE;
    tokens += row * k_max, miss_tokens += row * k_max, miss_slots += row * k_max;
    counters += sequence * 8 + PHASE * 4;  // [B, 2, 4]
    slot_of_token += row * capacity, token_in_slot += row * n_slots, stamps += row * n_slots;
    int* mine_stamps = (int*)stamps + (attended ? 0 : 1);  // of slot s at 2 s

    Segment mine = segment_of(count, rank);
    bool one_group = mine.to - mine.from <= 32 * EACH;  // then what was looked up stays in registers
    int token[EACH], slot[EACH], missed = 0, predicted = 0;
    for (int first = mine.from + lane; first - lane < mine.to; first += 32 * EACH) {
        int last[EACH];
        look_up(tokens, slot_of_token, first, mine.to, token, slot);
#pragma unroll
        for (int j = 0; j < EACH; ++j) last[j] = PHASE == 1 && is_slot(slot[j]) ? stamps[slot[j]].listed : -1;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            missed += __popc(__ballot_sync(ALL, slot[j] < 0));
            predicted += last[j] == 2 * now;  // by this step's prediction
            if (is_slot(slot[j])) mine_stamps[2 * slot[j]] = mark;
        }
    }
    int misses, place = place_of_misses(missed, rank, shared, misses);
    if (PHASE == 1 && part != REST) {
        predicted = __reduce_add_sync(ALL, predicted);
        if (lane == 0 && predicted) atomicAdd(counters + 2, (unsigned long long)predicted);
    }
    if (rank == 0 && threadIdx.x == 0) {
        miss_counts[row] = misses;
        int selected = part == ENTERING ? 0 : count;
        atomicAdd(counters, (unsigned long long)selected);
        atomicAdd(counters + 1, (unsigned long long)(long long)(selected - misses));
        if (part != REST) atomicAdd(counters + 3, (unsigned long long)count);
    }
    for (int first = mine.from + lane; first - lane < mine.to && misses; first += 32 * EACH) {
        if (!one_group) look_up(tokens, slot_of_token, first, mine.to, token, slot);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            unsigned all = __ballot_sync(ALL, slot[j] < 0);
            if (slot[j] < 0) miss_tokens[place + __popc(all & before)] = token[j];
            place += __popc(all);
        }
    }

    mine = segment_of(misses ? n_slots : 0, rank);  // slots in ring order from the hand
    bool few = mine.to - mine.from <= 32 * KEPT_AGES;
    unsigned long long ages = 0;  // of this lane's slots, 4 bits each, if they are few
    int older = 0, steps = 0;     // lane i: this warp's free slots whose rows no step attended to in the last i
    for (int first = mine.from + lane, at = 0; first - lane < mine.to; first += 32 * EACH, at += EACH) {
        int age[EACH];
        load_ages(stamps, start, n_slots, first, mine.to, now, mark, attended, age);
#pragma unroll
        for (int j = 0; j < EACH; ++j)
            if (few) ages |= (unsigned long long)age[j] << 4 * (at + j);
        for (int kept = 0; kept <= kept_steps; ++kept) {
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                unsigned all = __ballot_sync(ALL, age[j] > kept);
                if (lane == kept) older += __popc(all);
            }
        }
    }
    if (misses) place = place_of_free(older, kept_steps, misses, rank, shared, steps);
    cluster_arrive_relaxed();  // this thread reads no other CTA's shared memory below
    for (int first = mine.from + lane, at = 0; first - lane < mine.to && place < misses;
         first += 32 * EACH, at += EACH) {
        int age[EACH], given[EACH], evicted[EACH];  // given: the miss that a slot is for, -1 none
        if (!few) load_ages(stamps, start, n_slots, first, mine.to, now, mark, attended, age);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            if (few) age[j] = (int)(ages >> 4 * (at + j)) & 15;
            bool is_free = age[j] > steps;
            unsigned all = __ballot_sync(ALL, is_free);
            given[j] = is_free ? place + __popc(all & before) : misses;
            given[j] = given[j] < misses ? given[j] : -1;
            place += __popc(all);
        }
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            if (given[j] < 0) continue;
            token[j] = load_shared_by_ctas(miss_tokens + given[j]);
            evicted[j] = token_in_slot[in_ring(start + first + 32 * j, n_slots)];
        }
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            if (given[j] < 0) continue;
            int free_slot = in_ring(start + first + 32 * j, n_slots);
            if (evicted[j] >= 0) slot_of_token[evicted[j]] = -1;
            slot_of_token[token[j]] = free_slot;
            token_in_slot[free_slot] = token[j];
            stamps[free_slot] = attended ? Stamp{mark, -1} : Stamp{-1, mark};
            miss_slots[given[j]] = free_slot;
            if (given[j] == misses - 1) hand[row] = in_ring(free_slot + 1, n_slots);
        }
    }
    cluster_wait();  // no CTA leaves while another may read its shared memory
}
