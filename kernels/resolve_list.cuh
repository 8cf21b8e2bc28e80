// Resolve a list of tokens against the resident set: the CTAs of a cluster each have a part of the list.
//
//   1. look up: each warp takes consecutive tokens, stamps the slots of the hits and counts misses;
//   2. list: a prefix over warps and CTAs gives every miss its place, in token order;
//   3. give: the free slots, counted the same way in ring order from the hand, go to the misses. Rows that
//      the last `kept_steps` steps attended to stay, or of fewer steps if there are too few others.
// The bits are those of resolve_reference.
//
// Compile-time: CLUSTER (CTAs), THREADS. cluster.cuh and order_key.cuh go before this text. No includes, so that
// nvrtc needs no header path.

constexpr int LIST_WARPS = THREADS / 32;
constexpr int SLOT_AGES = 9;  // kept_steps + 1 at most
// Entries a lane looks up at once: what is looked up depends on what was, and one at a time a selection of 16,384
// took 73 us (H100), most of it waiting.
constexpr int EACH = 4;
constexpr int KEPT_AGES = 16;  // of a lane's slots, as many as 64 bits hold
constexpr int NO_ENTRY = 0x7fffffff;  // in the place of a slot
constexpr int WHOLE = 0, ENTERING = 1, REST = 2;  // parts of a selection, of kernels/residency.py

struct ListShared {
    int warp_misses[LIST_WARPS], warp_older[LIST_WARPS][SLOT_AGES];
    int cta_misses, cta_older[SLOT_AGES];  // read by the other CTAs; older: free slots of more than i steps
};

// Consecutive entries of a list.
struct Segment {
    int from, to;
};

// Of n entries those that a CTA takes, and of these a warp's: a whole number of 32 each.
__device__ Segment cta_segment(int n, unsigned rank) {
    int share = (n + CLUSTER * THREADS - 1) / (CLUSTER * THREADS) * THREADS;
    int from = min((int)rank * share, n);
    return {from, min(from + share, n)};
}

__device__ Segment warp_segment(Segment cta) {
    int share = (cta.to - cta.from + THREADS - 1) / THREADS * 32;
    int from = min(cta.from + (int)(threadIdx.x >> 5) * share, cta.to);
    return {from, min(from + share, cta.to)};
}

// The misses counted before this warp's, given its own (the same in every lane), and the cluster's total.
// What was written before it can be read after it by every CTA.
__device__ int place_of_misses(int count, unsigned rank, ListShared& shared, int& total) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (lane == 0) shared.warp_misses[warp] = count;
    __syncthreads();
    int counted = lane < LIST_WARPS ? shared.warp_misses[lane] : 0;
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
__device__ int place_of_free(int older, int kept_steps, int misses, unsigned rank, ListShared& shared, int& steps) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, total = 0, earlier = 0;
    if (lane < SLOT_AGES) shared.warp_older[warp][lane] = older;
    __syncthreads();
    if (warp == 0 && lane < SLOT_AGES) {
        for (int other = 0; other < LIST_WARPS; ++other) total += shared.warp_older[other][lane];
        shared.cta_older[lane] = total;
    }
    cluster_publish();
    cluster_wait();
    int of_cta[CLUSTER];
#pragma unroll
    for (int cta = 0; cta < CLUSTER; ++cta)
        of_cta[cta] = lane < SLOT_AGES ? (int)remote_load(&shared.cta_older[lane], cta) : 0;
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
    return stamp.attended < 0 ? SLOT_AGES : min(now - stamp.attended, SLOT_AGES);
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

// The resident set of one KV head.
struct Slots {
    int *slot_of_token, *token_in_slot;
    Stamp* stamps;
    int* hand;
    int n_slots;
};

// Where the misses are listed.
struct Missed {
    int *tokens, *slots, *count;
};

// When and what for a list is resolved. counters [4]: of its sequence and phase.
struct Purpose {
    int now, phase, attended, kept_steps, part;
    unsigned long long* counters;
};

// Give the tokens of a list slots. mine: this CTA's of the list, which the CTAs share in their order. The caller
// waits for the cluster (cluster_wait) before it returns: this function has arrived.
__device__ void resolve_list(
    const int* tokens, Segment mine_of_list, Slots resident, Missed missed_rows, Purpose purpose, unsigned rank,
    ListShared& shared) {
    int lane = threadIdx.x & 31, now = purpose.now, attended = purpose.attended, n_slots = resident.n_slots;
    int start = *resident.hand, mark = attended ? now : 2 * now + purpose.phase;
    unsigned before = (1u << lane) - 1u;
    int* mine_stamps = (int*)resident.stamps + (attended ? 0 : 1);  // of slot s at 2 s

    Segment mine = warp_segment(mine_of_list);
    bool one_group = mine.to - mine.from <= 32 * EACH;  // then what was looked up stays in registers
    int token[EACH], slot[EACH], missed = 0, predicted = 0;
    for (int first = mine.from + lane; first - lane < mine.to; first += 32 * EACH) {
        int last[EACH];
        look_up(tokens, resident.slot_of_token, first, mine.to, token, slot);
#pragma unroll
        for (int j = 0; j < EACH; ++j) last[j] = purpose.phase && is_slot(slot[j]) ? resident.stamps[slot[j]].listed : -1;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            missed += __popc(__ballot_sync(ALL, slot[j] < 0));
            predicted += last[j] == 2 * now;  // by this step's prediction
            if (is_slot(slot[j])) mine_stamps[2 * slot[j]] = mark;
        }
    }
    int misses, place = place_of_misses(missed, rank, shared, misses);
    int listed = mine_of_list.to - mine_of_list.from;
    if (purpose.part != REST) {
        predicted = __reduce_add_sync(ALL, predicted);
        if (lane == 0 && predicted) atomicAdd(purpose.counters + 2, (unsigned long long)predicted);
        if (threadIdx.x == 0 && listed) atomicAdd(purpose.counters + 3, (unsigned long long)listed);
    }
    if (threadIdx.x == 0) {
        long long selected = purpose.part == WHOLE ? listed : 0, hits = selected - (rank == 0 ? misses : 0);
        if (selected) atomicAdd(purpose.counters, (unsigned long long)selected);
        if (hits) atomicAdd(purpose.counters + 1, (unsigned long long)hits);
    }
    if (rank == 0 && threadIdx.x == 0) *missed_rows.count = misses;
    for (int first = mine.from + lane; first - lane < mine.to && misses; first += 32 * EACH) {
        if (!one_group) look_up(tokens, resident.slot_of_token, first, mine.to, token, slot);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            unsigned all = __ballot_sync(ALL, slot[j] < 0);
            if (slot[j] < 0) missed_rows.tokens[place + __popc(all & before)] = token[j];
            place += __popc(all);
        }
    }

    mine = warp_segment(cta_segment(misses ? n_slots : 0, rank));  // slots in ring order from the hand
    bool few = mine.to - mine.from <= 32 * KEPT_AGES;
    unsigned long long ages = 0;  // of this lane's slots, 4 bits each, if they are few
    int older = 0, steps = 0;     // lane i: this warp's free slots whose rows no step attended to in the last i
    for (int first = mine.from + lane, at = 0; first - lane < mine.to; first += 32 * EACH, at += EACH) {
        int age[EACH];
        load_ages(resident.stamps, start, n_slots, first, mine.to, now, mark, attended, age);
#pragma unroll
        for (int j = 0; j < EACH; ++j)
            if (few) ages |= (unsigned long long)age[j] << 4 * (at + j);
        for (int kept = 0; kept <= purpose.kept_steps; ++kept) {
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                unsigned all = __ballot_sync(ALL, age[j] > kept);
                if (lane == kept) older += __popc(all);
            }
        }
    }
    if (misses) place = place_of_free(older, purpose.kept_steps, misses, rank, shared, steps);
    cluster_arrive_relaxed();  // this thread reads no other CTA's shared memory below
    for (int first = mine.from + lane, at = 0; first - lane < mine.to && place < misses;
         first += 32 * EACH, at += EACH) {
        int age[EACH], given[EACH], evicted[EACH];  // given: the miss that a slot is for, -1 none
        if (!few) load_ages(resident.stamps, start, n_slots, first, mine.to, now, mark, attended, age);
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
            token[j] = load_shared_by_ctas(missed_rows.tokens + given[j]);
            evicted[j] = resident.token_in_slot[in_ring(start + first + 32 * j, n_slots)];
        }
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            if (given[j] < 0) continue;
            int free_slot = in_ring(start + first + 32 * j, n_slots);
            if (evicted[j] >= 0) resident.slot_of_token[evicted[j]] = -1;
            resident.slot_of_token[token[j]] = free_slot;
            resident.token_in_slot[free_slot] = token[j];
            resident.stamps[free_slot] = attended ? Stamp{mark, -1} : Stamp{-1, mark};
            missed_rows.slots[given[j]] = free_slot;
            if (given[j] == misses - 1) *resident.hand = in_ring(free_slot + 1, n_slots);
        }
    }
}
