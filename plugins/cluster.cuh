// The blocks of a cluster: a barrier for all their threads, and reading from each other's shared memory. Needs sixteen.cuh.
__device__ __forceinline__ void clusterArrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void clusterWait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// What lies at the place of `mine` in the block with that rank.
__device__ __forceinline__ u32 remote(const u32* mine, u32 rank) {
    u32 v;
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.u32 %0, [a]; }" : "=r"(v) : "r"(shared(mine)), "r"(rank) : "memory");
    return v;
}
__device__ __forceinline__ u64 remote(const u64* mine, u32 rank) {
    u64 v;
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.u64 %0, [a]; }" : "=l"(v) : "r"(shared(mine)), "r"(rank) : "memory");
    return v;
}
