// Blocks of a cluster read each other's shared memory (Hopper).
__device__ __forceinline__ void clusterSync() { asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ float4 remote(const float4* p, int rank) {
    float4 v;
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a]; }" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(shared(p)), "r"(rank) : "memory");
    return v;
}
__device__ __forceinline__ float2 remote(const float2* p, int rank) {
    float2 v;
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %2, %3; ld.shared::cluster.v2.f32 {%0, %1}, [a]; }" : "=f"(v.x), "=f"(v.y) : "r"(shared(p)), "r"(rank) : "memory");
    return v;
}
