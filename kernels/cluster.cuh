// Thread block clusters: rank, barrier, and access to the other CTAs' shared memory. No includes.

// A kernel that starts early (early_launch.py) waits here for all that the kernels ahead write and read.
__device__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

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

// Not ordered with any access: for a CTA that only says it needs the others' memory no more. What was read there must
// have been used before it, or the other CTA may be gone while the load is on its way (a launch failure).
__device__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

// Publish what this CTA's threads wrote to its own shared memory. A release by every thread is a fence of GPU
// scope by every warp (SASS of sm_90); __syncthreads and fences are cumulative, so that one warp's will do.
__device__ void cluster_publish() {
    __syncthreads();
    if (threadIdx.x < 32) asm volatile("fence.acq_rel.cluster;" ::: "memory");
    __syncwarp();
    cluster_arrive_relaxed();
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

__device__ unsigned long long remote_load_u64(const void* local, unsigned rank) {
    unsigned long long value;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(remote_address(local, rank)) : "memory");
    return value;
}
