// Partial attention of one decode step over a piece of a row list (sm_90 and newer), rows read where they lie.
//
// The list is sinks, selection, ring, in token order, as in sparse_decode.py. A CTA has a piece of it for one KV
// head and the query heads of its group. It looks up where the piece's rows are, once; then each warp asks the
// bulk copy engine for its blocks of 16 rows, STAGES blocks ahead, so that index reads, softmax and products never
// hold a load back. Tensor cores multiply the queries (16 rows of an operand, of which GROUP are used) with keys,
// and the weights with values. The warps' results are joined in warp order: the bits depend on the list alone.
//
// Compile-time: DIM (64 or 128), GROUP (at most 8), HALF (1: float16, 0: bfloat16), WARPS, STAGES, ROW_BYTES (4 DIM).
// Dynamic shared memory: the warps' rings, later their results; the places of the piece's rows. bulk_copy.cuh goes
// before this text. No includes: nvrtc needs no header path.

constexpr int BLOCK = 16;                       // rows of a stage: one operand of the tensor cores
constexpr int STRIDE = ROW_BYTES + 16;          // of rows in shared memory: 8 of them lie in different banks
constexpr int STAGE_BYTES = BLOCK * STRIDE;
constexpr int THREADS = 32 * WARPS;
constexpr unsigned ALL = 0xffffffffu;
constexpr int STEPS = DIM / 16;                 // of 16 numbers of a key; pairs of 8 of a value
constexpr float LOG2E = 1.4426950408889634f;
constexpr float NEVER = -3e38f;                 // below every logit: a row that there is not

struct Shared {
    Barrier arrived[WARPS][STAGES];
    float tops[WARPS][GROUP], sums[WARPS][GROUP];
};

__device__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers as one register of the rows' type; the first in the lower half.
__device__ unsigned pack(float low, float high) {
    unsigned pair;
    if constexpr (HALF) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// d[4] += a[16 rows, 16] b[16, 8 columns], of whose rows the upper eight of a are zero.
__device__ void multiply_add(float* d, unsigned a0, unsigned a2, unsigned b0, unsigned b1) {
    if constexpr (HALF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(0u), "r"(a2), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(0u), "r"(a2), "r"(b0), "r"(b1));
}

// Four 8 x 8 tiles from the addresses that the lanes hold, 8 lanes a tile.
__device__ void load_tiles(unsigned* tiles, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(address)
                 : "memory");
}

__device__ void load_tiles_turned(unsigned* tiles, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(address)
                 : "memory");
}

// What one sequence attends to with one KV head: n_sinks sinks, count selected rows, then the ring from
// ring_start on; total rows.
struct List {
    const int *tokens, *slot_of_token;
    int n_sinks, count, ring_start, total, sinks, recent;
};

// The places of rows first, first + 1, ... of the list to places [n]; past `last` the last one again.
__device__ void find_places(List list, int first, int last, int n, int* places) {
    for (int i = threadIdx.x; i < n; i += THREADS) {
        int row = min(first + i, last - 1), k = row - list.n_sinks, place;
        if (k < 0) place = row;
        else if (k < list.count) place = list.sinks + list.recent + list.slot_of_token[list.tokens[k]];
        else place = list.sinks + (list.ring_start + k - list.count) % list.recent;
        places[i] = place;
    }
}

// Ask for a block's rows, a lane each.
__device__ void fetch(const char* rows, const int* places, char* stage, Barrier* arrived, int lane) {
    if (lane == 0) arrive_expecting(arrived, BLOCK * ROW_BYTES);
    __syncwarp();
    if (lane < BLOCK) copy_row(stage + lane * STRIDE, rows + (long long)places[lane] * ROW_BYTES, arrived);
}

// The queries' operand: row `lane / 4` of 16 x DIM, zero past the group.
__device__ void load_queries(const unsigned short* query, long long query_h, int lane, unsigned (*operand)[2]) {
    int head = lane >> 2;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned short* source = query + head * query_h + step * 16 + half * 8 + 2 * (lane & 3);
            operand[step][half] = head < GROUP ? (unsigned)source[0] | (unsigned)source[1] << 16 : 0u;
        }
    }
}

// A warp's running softmax: of head lane / 4 the largest logit, this lane's part of the sum of weights, and the
// weighted values, numbers 8 j + 2 (lane % 4) and the next one in out[j].
struct Running {
    float top, sum, out[DIM / 8][4];
};

// Take a block of rows in; `rows` of them are there.
__device__ void attend(
    const unsigned (*queries)[2], unsigned stage, int rows, float scale, float softcap, int lane, Running& running) {
    float logits[2][4] = {};
    // Lanes 0 to 7 and 16 to 23 address rows 0 to 7, the others rows 8 to 15; the upper half the next 8 numbers.
    unsigned keys = stage + ((lane & 7) + (lane >> 3 & 1) * 8) * STRIDE + (lane >> 4) * 16;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        unsigned tiles[4];  // rows 0 to 7, rows 8 to 15, and both of the next 8 numbers
        load_tiles(tiles, keys + step * 32);
        multiply_add(logits[0], queries[step][0], queries[step][1], tiles[0], tiles[2]);
        multiply_add(logits[1], queries[step][0], queries[step][1], tiles[1], tiles[3]);
    }
    float most = NEVER, weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // row 8 (i / 2) + 2 (lane % 4) + i % 2
        float logit = logits[i >> 1][i & 1] * scale;
        if (softcap != 0.f) logit = softcap * (1.f - 2.f / (power_of_2(logit * (2.f * LOG2E / softcap)) + 1.f));
        weights[i] = 8 * (i >> 1) + 2 * (lane & 3) + (i & 1) < rows ? logit * LOG2E : NEVER;
        most = fmaxf(most, weights[i]);
    }
    most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
    most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
    float top = fmaxf(running.top, most), shrink = power_of_2(running.top - top);
    running.top = top;
    running.sum *= shrink;
#pragma unroll
    for (int i = 0; i < 4; ++i) running.sum += weights[i] = power_of_2(weights[i] - top);
    unsigned low = pack(weights[0], weights[1]), high = pack(weights[2], weights[3]);
    unsigned values = stage + ROW_BYTES / 2 + (lane & 15) * STRIDE + (lane >> 4) * 16;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        unsigned tiles[4];  // of 8 numbers: rows 0 to 7, rows 8 to 15; then of the next 8 numbers
        load_tiles_turned(tiles, values + step * 32);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* out = running.out[2 * step + half];
            out[0] *= shrink, out[1] *= shrink;
            multiply_add(out, low, high, tiles[2 * half], tiles[2 * half + 1]);
        }
    }
}

// Join the warps' results in warp order, and write them to the piece's place: out [GROUP, splits, DIM].
__device__ void join(
    Running& running, float* results, Shared& shared, int lane, int warp, int splits, float* out, float* tops,
    float* sums) {
    int head = lane >> 2;
    float sum = running.sum + __shfl_xor_sync(ALL, running.sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    __syncthreads();  // the rings are read no more
    if (head < GROUP) {
        if ((lane & 3) == 0) shared.tops[warp][head] = running.top, shared.sums[warp][head] = sum;
        float* mine = results + (warp * GROUP + head) * DIM + 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < DIM / 8; ++j) mine[8 * j] = running.out[j][0], mine[8 * j + 1] = running.out[j][1];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
        int of_head = i / DIM;
        float top = NEVER, total = 0.f, value = 0.f;
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, shared.tops[w][of_head]);
        for (int w = 0; w < WARPS; ++w) {
            float weight = power_of_2(shared.tops[w][of_head] - top);
            total += weight * shared.sums[w][of_head];
            value += weight * results[(w * GROUP + of_head) * DIM + i % DIM];
        }
        out[(long long)of_head * splits * DIM + i % DIM] = value;
        if (i % DIM == 0) tops[of_head * splits] = top, sums[of_head * splits] = total;
    }
}

// Grid: (splits, KV heads, batch). Strides in numbers. slots [B, Hkv, places, 2 DIM]; partial [B, Hq, splits, DIM].
extern "C" __global__ void __launch_bounds__(THREADS) attend_bulk(
    const unsigned short* query, const char* slots, const int* tokens, const int* counts, const int* slot_of_token,
    const int* lengths, float* partial, float* tops, float* sums, long long query_b, long long query_h,
    long long slots_b, long long slots_h, long long map_b, long long map_h, float scale, float softcap, int kv_heads,
    int budget, int sinks, int recent, int piece) {
    extern __shared__ __align__(128) char rings[];  // [WARPS, STAGES, BLOCK, STRIDE]
    __shared__ Shared shared;
    int* places = (int*)(rings + WARPS * STAGES * STAGE_BYTES);  // [piece]
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, splits = gridDim.x;
    int sequence = blockIdx.z, head = blockIdx.y, row = sequence * kv_heads + head;
    int length = lengths[sequence], n_sinks = min(sinks, length), ring_start = max(sinks, length - recent);
    int count = counts[row], total = n_sinks + count + max(length - ring_start, 0);
    List list = {tokens + (long long)row * budget, slot_of_token + sequence * map_b + head * map_h, n_sinks, count,
                 ring_start, total, sinks, recent};
    int first = blockIdx.x * piece, last = min(first + piece, total);
    long long result = (long long)row * GROUP * splits + blockIdx.x;
    tops += result, sums += result, partial += result * DIM;
    if (first >= last) {
        if (threadIdx.x < GROUP) tops[threadIdx.x * splits] = __int_as_float(0xff800000);  // nothing: -inf
        return;
    }
    if (lane == 0)
        for (int stage = 0; stage < STAGES; ++stage) init_barrier(&shared.arrived[warp][stage]);
    show_barriers_to_engine();
    int blocks = (last - first + BLOCK - 1) / BLOCK;
    find_places(list, first, last, blocks * BLOCK, places);
    __syncthreads();

    const char* rows = slots + (sequence * slots_b + head * slots_h) * (ROW_BYTES / (2 * DIM));
    char* ring = rings + warp * STAGES * STAGE_BYTES;
    for (int ahead = 0, block = warp; ahead < STAGES && block < blocks; ++ahead, block += WARPS)
        fetch(rows, places + block * BLOCK, ring + ahead * STAGE_BYTES, &shared.arrived[warp][ahead], lane);
    unsigned queries[STEPS][2];
    load_queries(query + sequence * query_b + head * GROUP * query_h, query_h, lane, queries);
    Running running = {NEVER, 0.f, {}};
    int stage = 0, parity = 0;
    for (int block = warp; block < blocks; block += WARPS) {
        wait(&shared.arrived[warp][stage], parity);
        char* here = ring + stage * STAGE_BYTES;
        attend(queries, shared_address(here), min(BLOCK, last - first - block * BLOCK), scale, softcap, lane, running);
        __syncwarp();  // every lane has read the stage
        int next = block + STAGES * WARPS;
        if (next < blocks) fetch(rows, places + next * BLOCK, here, &shared.arrived[warp][stage], lane);
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    join(running, (float*)rings, shared, lane, warp, splits, partial, tops, sums);
}
