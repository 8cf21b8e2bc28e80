// Rows from global or host memory to shared memory by the bulk copy engine, and the barriers that say when they are
// there. Compile-time: ROW_BYTES (a multiple of 16). No includes.

typedef unsigned long long Barrier;

__device__ unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

__device__ void init_barrier(Barrier* barrier) {  // completed by one arrival, and the bytes it expects
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
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

__device__ void wait(Barrier* barrier, unsigned parity) {
    while (!has_completed(barrier, parity)) {
    }
}
