// The blocks of a cluster (Hopper): a barrier for all their threads, and reading from each other's shared memory. Needs sixteen.cuh.
__device__ __forceinline__ void clusterArrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void clusterWait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void clusterSync() { clusterArrive(), clusterWait(); }
__device__ __forceinline__ u32 clusterRank() { u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
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
__device__ __forceinline__ float2 remote(const float2* mine, u32 rank) {
    float2 v;
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %2, %3; ld.shared::cluster.v2.f32 {%0, %1}, [a]; }" : "=f"(v.x), "=f"(v.y) : "r"(shared(mine)), "r"(rank) : "memory");
    return v;
}
__device__ __forceinline__ float4 remote(const float4* mine, u32 rank) {
    float4 v;
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a]; }" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(shared(mine)), "r"(rank) : "memory");
    return v;
}
