// What the CUDA sources of kernels/ need of CUDA, on one CPU thread: every GPU thread is a fiber that gives way
// where it would wait. Shared memory starts as garbage; a wait that nothing ends is an error, not a hang.
// Races are not found: fibers change places at barriers and warp operations only.

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <math.h>
#include <memory>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#define __device__ static
#define __global__
#define __cluster_dims__(...)
#define __launch_bounds__(...)

struct Index {
    unsigned x, y, z;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

constexpr int SHARED_BYTES = 227 << 10, STATIC_SHARED_BYTES = 32 << 10, STACK_BYTES = 64 << 10;

// A barrier of `size` fibers: the last to arrive begins the next generation.
struct Meeting {
    int size, arrived = 0;
    unsigned generation = 0;
};

struct Warp {
    Meeting meeting{32};
    uint64_t values[32], read[2][32];  // of the generation that arrives, and of the last two complete ones
};

struct Cta {
    std::unique_ptr<unsigned char[]> shared{new unsigned char[SHARED_BYTES]};
    Meeting meeting{0};
    int counted[2] = {};  // of __syncthreads_count, by generation
    std::vector<Warp> warps;
};

struct Cluster {
    Index block;
    Meeting meeting{0};
    std::vector<Cta> ctas;
    bool progress = false;
};

struct Fiber {
    jmp_buf place;
    ucontext_t start;
    void* stack;
    unsigned thread, cta, cluster_phase;
    bool started = false, done = false;
};

static Cluster* cluster;
static Fiber* self;
static jmp_buf scheduler;
static const std::function<void()>* body;

static void give_way() {
    if (!_setjmp(self->place)) _longjmp(scheduler, 1);
}

static unsigned arrive_at(Meeting& meeting) {
    unsigned generation = meeting.generation;
    if (++meeting.arrived == meeting.size) meeting.arrived = 0, ++meeting.generation, cluster->progress = true;
    return generation;
}

static void wait_for(const Meeting& meeting, unsigned generation) {
    while (meeting.generation == generation) give_way();
}

static Cta& my_cta() { return cluster->ctas[self->cta]; }

#define threadIdx (Index{self->thread, 0, 0})
#define blockIdx (cluster->block)

template <class T>
static T& static_shared() {
    static_assert(sizeof(T) <= STATIC_SHARED_BYTES);
    return *(T*)my_cta().shared.get();
}
static unsigned* dynamic_shared() { return (unsigned*)(my_cta().shared.get() + STATIC_SHARED_BYTES); }

static void __syncthreads() {
    Meeting& meeting = my_cta().meeting;
    wait_for(meeting, arrive_at(meeting));
}

static int __syncthreads_count(bool counts) {
    Cta& cta = my_cta();
    unsigned generation = cta.meeting.generation;
    if (cta.meeting.arrived == 0) cta.counted[generation & 1] = 0;
    cta.counted[generation & 1] += counts;
    wait_for(cta.meeting, arrive_at(cta.meeting));
    return cta.counted[generation & 1];
}

// Every lane's value, once all 32 have arrived.
static const uint64_t* exchange(uint64_t value) {
    Warp& warp = my_cta().warps[self->thread / 32];
    warp.values[self->thread % 32] = value;
    unsigned generation = warp.meeting.generation;
    if (warp.meeting.arrived == 31) memcpy(warp.read[generation & 1], warp.values, sizeof warp.values);
    wait_for(warp.meeting, arrive_at(warp.meeting));
    return warp.read[generation & 1];
}

static void __syncwarp() { exchange(0); }

static unsigned __ballot_sync(unsigned, bool vote) {
    const uint64_t* votes = exchange(vote);
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (unsigned)votes[i] << i;
    return bits;
}

static int __reduce_add_sync(unsigned, int value) {
    const uint64_t* values = exchange((uint32_t)value);
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i) sum += (unsigned)values[i];
    return (int)sum;
}

static int __shfl_sync(unsigned, int value, int lane) { return (int)exchange((uint32_t)value)[lane & 31]; }

static int shuffle(int value, int lane) {  // one's own value where there is no such lane
    const uint64_t* values = exchange((uint32_t)value);
    return (int)values[lane < 0 || lane > 31 ? self->thread % 32 : lane];
}
static int __shfl_up_sync(unsigned, int value, int by) { return shuffle(value, (int)(self->thread % 32) - by); }
static int __shfl_down_sync(unsigned, int value, int by) { return shuffle(value, (int)(self->thread % 32) + by); }
static int __shfl_xor_sync(unsigned, int value, int mask) { return shuffle(value, (int)(self->thread % 32) ^ mask); }

static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
static int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }
static int __clzll(long long bits) { return bits ? __builtin_clzll((unsigned long long)bits) : 64; }
static float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, 4);
    return bits;
}
template <class T, class U>
static T atomicAdd(T* target, U value) {
    T before = *target;
    *target += (T)value;
    return before;
}
static void atomicOr(unsigned* target, unsigned bits) { *target |= bits; }
template <class T>
static T __ldcg(const T* source) { return *source; }
template <class T>
static T min(T a, T b) { return b < a ? b : a; }
template <class T>
static T max(T a, T b) { return a < b ? b : a; }

// cluster.cuh
static unsigned cta_rank() { return self->cta; }
static void wait_for_inputs() {}
static void cluster_arrive() { self->cluster_phase = arrive_at(cluster->meeting); }
static void cluster_wait() { wait_for(cluster->meeting, self->cluster_phase); }
static void cluster_arrive_relaxed() { cluster_arrive(); }
static void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
static void cluster_publish() {
    __syncthreads();
    cluster_arrive();
}
template <class T>
static T* of_cta(const T* local, unsigned rank) {
    size_t offset = (const unsigned char*)local - my_cta().shared.get();
    if (offset >= SHARED_BYTES || rank >= cluster->ctas.size()) fprintf(stderr, "not in shared memory\n"), abort();
    return (T*)(cluster->ctas[rank].shared.get() + offset);
}
static unsigned remote_load(const void* local, unsigned rank) { return *of_cta((const unsigned*)local, rank); }
static unsigned long long remote_load_u64(const void* local, unsigned rank) {
    return *of_cta((const unsigned long long*)local, rank);
}

static void run_fiber() {
    (*body)();
    self->done = cluster->progress = true;
    _longjmp(scheduler, 1);
}

static void resume(Fiber& fiber) {
    self = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

// Run `kernel` in clusters (y, z) of `ctas` CTAs of `threads`; backwards: fibers take turns from the last one.
// Returns false if they wait for something that never comes.
static bool run_clusters(int grid_y, int grid_z, int ctas, int threads, bool backwards, std::function<void()> kernel) {
    std::vector<Fiber> fibers(ctas * threads);
    for (Fiber& fiber : fibers)
        fiber.stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    body = &kernel;
    bool waits = false;
    for (int block = 0; block < grid_y * grid_z && !waits; ++block) {
        Cluster here{{0, (unsigned)(block % grid_y), (unsigned)(block / grid_y)}, {ctas * threads}};
        here.ctas = std::vector<Cta>(ctas);
        for (Cta& cta : here.ctas) {
            memset(cta.shared.get(), 0xcd, SHARED_BYTES);
            cta.meeting.size = threads, cta.warps = std::vector<Warp>(threads / 32);
        }
        cluster = &here;
        for (int i = 0; i < ctas * threads; ++i) {
            Fiber& fiber = fibers[i];
            fiber.thread = i % threads, fiber.cta = i / threads, fiber.started = fiber.done = false;
            getcontext(&fiber.start);
            fiber.start.uc_stack.ss_sp = fiber.stack, fiber.start.uc_stack.ss_size = STACK_BYTES;
            makecontext(&fiber.start, run_fiber, 0);
        }
        for (bool all_done = false; !all_done && !waits; waits = !all_done && !here.progress) {
            here.progress = false, all_done = true;
            for (int i = 0; i < ctas * threads; ++i) {
                Fiber& fiber = fibers[backwards ? ctas * threads - 1 - i : i];
                if (!fiber.done) resume(fiber), all_done = all_done && fiber.done;
            }
        }
    }
    for (Fiber& fiber : fibers) munmap(fiber.stack, STACK_BYTES);
    return !waits;
}
