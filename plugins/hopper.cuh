// Barriers in shared memory, and the descriptors by which the copy engine (TMA) fetches boxes of an array.
struct alignas(64) TensorMap { u8 opaque[128]; };
__device__ __forceinline__ void init(u64* barrier, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(barrier)), "r"(count)); }
__device__ __forceinline__ void expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(u64* barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(barrier)) : "memory"); }
__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
    asm volatile("{ .reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone: }" ::"r"(shared(barrier)), "r"(parity) : "memory");
}
__device__ __forceinline__ void prepare(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// A box of an array into shared memory; the coordinates of its corner, the last axis first. What lies outside of the array is zero.
__device__ __forceinline__ void fetchBox(void* to, const TensorMap* map, u64* barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared(to)), "l"(map), "r"(shared(barrier)),
                 "r"(x), "r"(y), "r"(z)
                 : "memory");
}
__device__ __forceinline__ void fetchBox(void* to, const TensorMap* map, u64* barrier, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared(to)), "l"(map), "r"(shared(barrier)),
                 "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}
// Tensor cores of a warpgroup. A tile as TMA swizzles it: rows of ROW bytes (128 or 64), groups of 8 rows one after another; what a
// row has beyond them lies `next` bytes on (16 where that is nowhere).
template <int ROW>
__device__ __forceinline__ u64 descriptor(const void* tile, int next) {
    return ((u64)(shared(tile) & 0x3ffff) >> 4) | ((u64)(next >> 4) << 16) | ((u64)(8 * ROW >> 4) << 32) | ((u64)(ROW == 128 ? 1 : 2) << 62);
}
__device__ __forceinline__ void wgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmmaWait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
