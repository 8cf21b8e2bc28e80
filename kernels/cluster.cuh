// Thread block clusters: rank, barrier, and access to the other CTAs' shared memory. No includes.

__device__ unsigned cta_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// The address of another CTA's copy of a shared variable.
__device__ unsigned remote_address(const void* local, unsigned rank) {
    unsigned address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"((unsigned)__cvta_generic_to_shared(local)), "r"(rank));
    return address;
}

__device__ unsigned remote_load(const void* local, unsigned rank) {
    unsigned value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote_address(local, rank)) : "memory");
    return value;
}

__device__ void remote_add(const void* local, unsigned rank, unsigned value) {
    asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;"
                 :
                 : "r"(remote_address(local, rank)), "r"(value)
                 : "memory");
}

__device__ void remote_or(const void* local, unsigned rank, unsigned bits) {
    asm volatile("red.relaxed.cluster.shared::cluster.or.b32 [%0], %1;"
                 :
                 : "r"(remote_address(local, rank)), "r"(bits)
                 : "memory");
}

__device__ unsigned long long remote_load_u64(const void* local, unsigned rank) {
    unsigned long long value;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(remote_address(local, rank)) : "memory");
    return value;
}
