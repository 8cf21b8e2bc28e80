// Resolve a selection against the resident set, by the cluster that made it: as residency.py's resolve.
//
//   1. hits: every warp looks up the tokens it selected; those with a slot are stamped, the others listed;
//   2. misses: a prefix over warps and CTAs gives each its place, in token order;
//   3. victims: the slots in ring order from the hand, shared out over the cluster's warps; a prefix over the
//      free ones says which miss takes which slot.
// What one CTA writes to global memory and another reads goes through a cluster barrier (release, acquire)
// and load_fresh(). cluster.cuh and label_mma.cuh go before this text.

constexpr int SLOTS = 4;  // look-ups a lane has in flight, and slots it takes of the ring at once

// The parts of the resident set of one (sequence, KV head), and what resolving writes.
struct Resident {
    int *slot_of_token, *token_in_slot, *stamps, *hand;
    int *miss_tokens, *miss_slots, *miss_count;
    unsigned long long* counters;  // [3] of the phase: selected, hits, hits that the prediction had brought
    int n_slots, now, phase;
};

struct Sums {
    int warps[WARPS];
    int cta;  // read by the other CTAs
};

struct ResolveShared {
    Sums misses, free[2];
    int predicted[WARPS];
};

// A number a warp, summed over the cluster's warps before this one, and over all.
struct Place {
    int before, total;
};

// Holds one cluster barrier. `sums` may be used again after the next one.
__device__ Place find_place(int count, unsigned rank, Sums& sums) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (lane == 0) sums.warps[warp] = count;
    __syncthreads();
    int in_warp = lane < WARPS ? sums.warps[lane] : 0;
    if (warp == 0) {
        int sum = __reduce_add_sync(ALL, in_warp);
        if (lane == 0) sums.cta = sum;
    }
    cluster_sync();
    int in_cta = lane < CLUSTER ? (int)remote_load(&sums.cta, lane) : 0;
    int before = (lane < warp ? in_warp : 0) + (lane < rank ? in_cta : 0);
    return {__reduce_add_sync(ALL, before), __reduce_add_sync(ALL, in_cta)};
}

// Stamp the hits among this warp's `count` tokens in `list` and close the list up to the misses, in order.
// Returns how many; adds to this lane's `predicted`.
__device__ int mark_hits(unsigned* list, int count, const Resident& resident, int& predicted) {
    int lane = threadIdx.x & 31, misses = 0;
    for (int base = 0; base < count; base += 32 * SLOTS) {
        int tokens[SLOTS], slots[SLOTS];
#pragma unroll
        for (int j = 0; j < SLOTS; ++j) {
            int i = base + 32 * j + lane;
            tokens[j] = i < count ? (int)list[i] : -1;
            slots[j] = tokens[j] >= 0 ? resident.slot_of_token[tokens[j]] : -1;
        }
        if (resident.phase == 1) {
#pragma unroll
            for (int j = 0; j < SLOTS; ++j)
                predicted += slots[j] >= 0 && resident.stamps[slots[j]] == resident.now - 1;
        }
        __syncwarp();  // all lanes have read their part of the list
#pragma unroll
        for (int j = 0; j < SLOTS; ++j) {
            bool miss = tokens[j] >= 0 && slots[j] < 0;
            if (slots[j] >= 0) resident.stamps[slots[j]] = resident.now;
            unsigned all = __ballot_sync(ALL, miss);
            if (miss) list[misses + __popc(all & ((1u << lane) - 1u))] = tokens[j];
            misses += __popc(all);
        }
    }
    __syncwarp();
    return misses;
}

// Give `misses` tokens, listed in resident.miss_tokens, the free slots in ring order from `hand`. The stamps
// and the list are complete at the next cluster barrier or before. Ends with an open cluster barrier.
__device__ void give_slots(int misses, int hand, const Resident& resident, unsigned rank, ResolveShared& shared) {
    constexpr int CLUSTER_WARPS = CLUSTER * WARPS;
    int warp = rank * WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31, n_slots = resident.n_slots;
    int rounds = min((n_slots + CLUSTER_WARPS * 32 - 1) / (CLUSTER_WARPS * 32), SLOTS);  // of 32 slots a warp
    int stride = CLUSTER_WARPS * 32 * rounds, given = 0, pass = 0;
    for (int start = 0; given < misses && start < n_slots; start += stride, ++pass) {
        int slots[SLOTS], held[SLOTS], tokens[SLOTS], taken[SLOTS];
        unsigned free[SLOTS];  // one bit a lane
        int count = 0;
#pragma unroll
        for (int j = 0; j < SLOTS; ++j) {
            int offset = start + (warp * rounds + j) * 32 + lane;
            bool inside = j < rounds && offset < n_slots;
            slots[j] = hand + offset < n_slots ? hand + offset : hand + offset - n_slots;
            free[j] = inside && load_fresh(resident.stamps + slots[j]) != resident.now;
            held[j] = inside ? resident.token_in_slot[slots[j]] : -1;
        }
#pragma unroll
        for (int j = 0; j < SLOTS; ++j) {
            free[j] = __ballot_sync(ALL, free[j]);
            count += __popc(free[j]);
        }
        Place place = find_place(count, rank, shared.free[pass & 1]);
        int first = given + place.before;
        given += place.total;
        if (given >= misses || start + stride >= n_slots) cluster_arrive();
#pragma unroll
        for (int j = 0; j < SLOTS; ++j) {
            taken[j] = first + __popc(free[j] & ((1u << lane) - 1u));
            first += __popc(free[j]);
            if (!(free[j] >> lane & 1)) taken[j] = misses;
            tokens[j] = taken[j] < misses ? load_fresh(resident.miss_tokens + taken[j]) : -1;
        }
#pragma unroll
        for (int j = 0; j < SLOTS; ++j) {
            int slot = slots[j];
            if (tokens[j] < 0) continue;
            if (held[j] >= 0) resident.slot_of_token[held[j]] = -1;
            resident.slot_of_token[tokens[j]] = slot;
            resident.token_in_slot[slot] = tokens[j];
            resident.stamps[slot] = resident.now;
            resident.miss_slots[taken[j]] = slot;
            if (taken[j] == misses - 1) *resident.hand = slot + 1 < n_slots ? slot + 1 : 0;
        }
    }
    if (misses == 0) cluster_arrive();
}

// Every warp's `count` selected tokens are in its `list` of shared memory, in token order over the cluster's
// warps; `selected` over all. Ends with an open cluster barrier.
__device__ void resolve_selection(
    unsigned* list, int count, int selected, const Resident& resident, unsigned rank, ResolveShared& shared) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, hand = *resident.hand, predicted = 0;
    int misses = mark_hits(list, count, resident, predicted);
    predicted = __reduce_add_sync(ALL, predicted);
    if (lane == 0) shared.predicted[warp] = predicted;
    Place place = find_place(misses, rank, shared.misses);
    for (int i = lane; i < misses; i += 32) resident.miss_tokens[place.before + i] = list[i];
    if (warp == 0) {
        predicted = __reduce_add_sync(ALL, lane < WARPS ? shared.predicted[lane] : 0);
        if (lane == 0 && predicted) atomicAdd(resident.counters + 2, (unsigned long long)predicted);
        if (lane == 0 && rank == 0) {
            atomicAdd(resident.counters, (unsigned long long)selected);
            atomicAdd(resident.counters + 1, (unsigned long long)(selected - place.total));
            *resident.miss_count = place.total;
        }
    }
    give_slots(place.total, hand, resident, rank, shared);
}
