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
// To the place of `mine` in the block with that rank; and that something was told there.
__device__ __forceinline__ void tell(const float2* mine, u32 rank, float x, float y) {
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.v2.f32 [a], {%2, %3}; }" ::"r"(shared(mine)), "r"(rank), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void arriveAt(u64* barrier, u32 rank) {
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %0, %1; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a]; }" ::"r"(shared(barrier)), "r"(rank) : "memory");
}
__device__ __forceinline__ void waitForCluster(u64* barrier, u32 parity) {  // for what other blocks told
    asm volatile("{ .reg .pred p;\nagain: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone: }" ::"r"(shared(barrier)), "r"(parity)
                 : "memory");
}
